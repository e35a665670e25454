"""Errors as clients of the OpenAI API read them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer that is an error. message: one sentence with the rule, the value and the fix."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """JSON in ASCII: a message may quote text that is not valid Unicode."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def busy(message: str, seconds: int) -> ApiError:
    """429 with the seconds after which to try again."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})
