"""What bounds the server: how much it does at once, how much may wait, and how long a client may take."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from nextvec.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")  # as browsers send it


@dataclass(frozen=True)
class ServeSettings:
    """Limits of one server. Raises ConfigError for values out of range."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = field(default=None, repr=False)
    slots: int = 16  # rows at work at once, for each model
    queue: int = 64  # rows that may wait for a slot, for each model; beyond it 429
    context_tokens: int | None = None  # prompt and new text of a row; None: what the model was trained on
    deterministic: bool = False
    origins: tuple[str, ...] = ()  # web pages of other origins that may call the server
    connections: int = 256  # open at once; one more is closed at once
    body_bytes: int = 1 << 20  # of a request
    candidates: int = 1000  # draws in a pool at most: memory of a step grows with it
    request_seconds: float = 30.0  # until a request's head and body are in
    write_seconds: float = 60.0  # until a client that takes nothing is let go
    drain_seconds: float = 30.0  # after SIGTERM, for the requests in hand

    def __post_init__(self) -> None:
        for name in ("slots", "queue", "connections", "body_bytes", "candidates"):
            if getattr(self, name) < (0 if name == "queue" else 1):
                raise ConfigError(f"{name} must be at least {0 if name == 'queue' else 1}; got {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"the port must be in [0, 65535], 0 for any free one; got {self.port}")
        if self.context_tokens is not None and self.context_tokens < 1:
            raise ConfigError(f"context_tokens must be at least 1; got {self.context_tokens}")
        if self.api_key is not None and not self.api_key:
            raise ConfigError("the API key is empty: give one of some length, or leave it out")
        if not 0 <= self.drain_seconds < math.inf:
            raise ConfigError(f"the seconds to drain must be a number of at least 0; got {self.drain_seconds:g}")
        for origin in self.origins:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"an origin is written scheme://host or scheme://host:port, without a path or a slash at the end, or * for "
                    f"all; got {origin!r}"
                )

    @property
    def rows(self) -> int:
        """Rows of one model that the server holds at most, at work and waiting."""
        return self.slots + self.queue
