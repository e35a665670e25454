"""What clients may ask, as the OpenAI API names it, and what they get. Unknown fields are refused, never ignored.

Each field of OpenAI's that cannot exist here is accepted with the value that asks for nothing, and refused with the reason
otherwise (`refuse_impossible`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nextvec.sampling.settings import Method, Sampling
from nextvec.serve.errors import ApiError

# a list stops at its first mistake: a body of a mistake in each of its half a million parts must cost no more than one
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
MESSAGES = 2048  # of a chat, and parts of a message
MAX_TOKENS = 16  # of a completion that does not say it, as OpenAI's
METHOD = (
    "How a CALM draws a patch: token, each token by its sharpened law (where the head has one); pool, a choice by votes from "
    "many draws at a temperature; centre, the mean of a few latents, decoded once, without a temperature; auto, the default: "
    "token where it can be and no candidates are asked for, else pool"
)
TEMPERATURE = "In (0, 1]; 1 is the model's own law. Default 0.5. 0, where tokens have laws, the likeliest"
CANDIDATES = (
    "Draws behind each patch of a CALM: in a pool below temperature 1, default 200; averaged by centre, default 8"
)
PENALTY = "From -2 to 2, on tokens that the text drawn so far has; method token alone"
WHOLE = "it changes the likelihoods of tokens, which most CALMs do not have, and all models answer alike here"
UNKNOWN = "a patch that is drawn as a vector has no likelihood, and all models answer alike here"
NOTHING: dict[str, tuple[tuple[Any, ...], str]] = {  # values that ask for nothing, and why others cannot be had
    "best_of": ((1,), "not every model here has likelihoods to rank texts by: ask for n texts and choose"),
    "logit_bias": (({},), WHOLE),
    "logprobs": ((False,), UNKNOWN),
    "top_logprobs": ((), UNKNOWN),
    "suffix": (("",), "the models read text from left to right"),
    "tools": (([],), "the models were not trained to call tools"),
    "tool_choice": (("none", "auto"), "the models were not trained to call tools"),
    "response_format": (({"type": "text"},), "text is drawn freely"),
}


class Asked(BaseModel):
    """No unknown field (the first is told), and no value of another JSON type than the field's; 16.0 is an integer, as JSON
    Schema says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        unknown = next((name for name in body if name not in cls.model_fields), None)
        return {name: _whole(value) for name, value in body.items() if name in cls.model_fields or name == unknown}


def _whole(value: Any, depth: int = 2) -> Any:
    """Whole floats as integers, in lists of lists too: prompts of token ids. Those beyond 64 bits stay, to be refused."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return [_whole(one, depth - 1) for one in value] if isinstance(value, list) and depth else value


class StreamOptions(Asked):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding of chunks; there is none here


class Law(Asked):
    """How a patch or a token is drawn. Ours beyond OpenAI's: method, candidates, top_k."""

    model: str = Field(description="One of the ids of /v1/models")
    temperature: float | None = Field(default=None, description=TEMPERATURE)
    method: Method | None = Field(default=None, description=METHOD)
    candidates: int | None = Field(default=None, ge=1, description=CANDIDATES)
    top_p: float | None = Field(default=None, description="Method token alone: where laws of single tokens are known")
    top_k: int | None = Field(default=None, ge=1, description="Method token alone")
    frequency_penalty: float | None = Field(default=None, description=PENALTY)
    presence_penalty: float | None = Field(default=None, description=PENALTY)


class Drawing(Law):
    """What completions and chats have in common."""

    max_tokens: int | None = Field(default=None, ge=1, description="New tokens at most")
    n: int | None = Field(default=None, ge=1, description="Texts per prompt")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="The same seed gives the same text")
    stop: str | Texts | None = Field(default=None, description="A text ends before the first of these, at most 16")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    logit_bias: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Drawing):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] = Field(
        description="Text, token ids, or several of either"
    )
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | bool | None = None
    suffix: str | None = None


class TextPart(Asked):
    type: Literal["text"]
    text: str


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MESSAGES, fail_fast=True)] | None
    name: str | None = None
    # of an answer of OpenAI's that is sent back, as its client spells it
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class ChatRequest(Drawing):
    messages: list[Message] = Field(min_length=1, max_length=MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="OpenAI's newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: Any = None
    parallel_tool_calls: bool | None = None  # of no tools
    service_tier: str | None = None


class PatchRequest(Law):
    """Of the page's own endpoint: one text, each patch with the vote that chose it, if one did."""

    prompt: str = ""
    max_tokens: int = Field(default=64, ge=1)
    seed: int = Field(default=Sampling.seed, ge=-(2**63), lt=2**63)
    detail: bool = True


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class ModelTraits(BaseModel):
    """What a client of ours wants to know. kind: calm or token_lm; latent: dimensions, None for a model that draws tokens;
    by_token: whether method token can be asked for."""

    kind: str
    patch_size: int
    context_tokens: int
    latent: int | None
    by_token: bool
    chat: bool


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nextvec"
    nextvec: ModelTraits


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class TextAnswer(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class Health(BaseModel):
    status: Literal["ok", "failed"]
    models: dict[str, int]  # rows at work and waiting, by model


def refuse_impossible(asked: Drawing) -> None:
    """Raise ApiError (400) with the reason for a field that cannot be had here."""
    for name, (nothing, why) in NOTHING.items():
        value = getattr(asked, name, None)
        if value is not None and not any(value == each and type(value) in (type(each), float) for each in nothing):
            raise ApiError(400, f"{name} cannot be had: {why}", param=name, code="unsupported_parameter")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
