"""From a request to a job: which model, which token ids, which settings; refused here if it could not be done."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from nextvec.sampling.draw import abilities
from nextvec.sampling.settings import Sampling
from nextvec.serve.errors import ApiError
from nextvec.serve.models import Served
from nextvec.serve.schema import Drawing, Message
from nextvec.serve.settings import ServeSettings
from nextvec.serve.worker import Job

STOPS, STOP_LENGTH = 16, 256  # looked for in every piece of text


def find(models: Mapping[str, Served], name: str) -> Served:
    """The model of this name. Raises ApiError (404)."""
    if name not in models:
        raise ApiError(
            404,
            f"there is no model {name[:100]!r}: this server has {', '.join(models)}",
            param="model",
            code="model_not_found",
        )
    return models[name]


def prompt_ids(
    served: Served, prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], settings: ServeSettings
) -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError (400) for ids that the model has not, text that is not Unicode, too many."""
    texts: list[str] = []
    ids: list[list[int]] = []
    if isinstance(prompt, str):
        texts = [prompt]
    elif not prompt:
        raise ApiError(400, "prompt must hold at least one prompt; got an empty list", param="prompt")
    else:
        for each in prompt:
            if isinstance(each, str):
                texts.append(each)
            elif not isinstance(each, int):
                ids.append(list(each))
        ids = ids or ([] if texts else [[each for each in prompt if isinstance(each, int)]])
    if len(texts) + len(ids) > settings.rows:
        raise ApiError(
            400,
            f"a request has at most {settings.rows} prompts here; got {len(texts) + len(ids)}: split it",
            param="prompt",
        )
    for text in texts:
        check_text(text, "prompt")
        check_length(served, len(text), "prompt")
    for row in ids:
        if max(row, default=0) >= served.model.vocab_size:
            raise ApiError(
                400,
                f"tokens of a prompt must be below {served.model.vocab_size}, the model's vocabulary; got {max(row)}",
                param="prompt",
            )
    return ids or served.tokenizer.encode_batch(texts)


def chat_ids(served: Served, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat. Raises ApiError (400) where the model has no template."""
    if served.template is None:
        raise ApiError(
            400,
            f"{served.id} is a base model: its tokenizer has no chat template; ask /v1/completions to continue a text",
            param="messages",
        )
    for number, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            where = f"messages.{number}.content"
            raise ApiError(400, f"{where} must be text or a list of parts of the type text", param=where)
        check_text(message.text, "messages")
    check_length(served, sum(len(message.text) for message in messages), "messages")
    return served.template.encode(messages, served.tokenizer)


def asked_job(
    served: Served, asked: Drawing, prompts: list[list[int]], max_tokens: int, settings: ServeSettings
) -> Job:
    """The job of a request. Raises ApiError or UserError for settings that the model cannot draw by."""
    top_p = None if asked.top_p == 1 else asked.top_p
    sampling = Sampling(
        temperature=Sampling.temperature if asked.temperature is None else asked.temperature,
        candidates=asked.candidates,
        max_tokens=max_tokens,
        seed=secrets.randbits(53) if asked.seed is None else asked.seed,  # a client's number type holds 53 bits
        top_k=asked.top_k,
        top_p=top_p,
        method=asked.method or Sampling.method,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
    )
    can = abilities(served.model)
    sampling = sampling.for_model(can)
    drawn = sampling.law.candidates
    if asked.candidates is None:
        sampling = replace(sampling, candidates=min(drawn, settings.candidates)).for_model(can)
    elif drawn > settings.candidates:
        raise ApiError(
            400, f"candidates is at most {settings.candidates} here; got {asked.candidates}", param="candidates"
        )
    if sampling.method == "centre" and asked.temperature is not None:
        raise ApiError(
            400,
            f"method centre has no temperature, and got {asked.temperature:g}: leave it out, more candidates make likelier text; "
            "or take method pool",
            param="temperature",
        )
    longest = max(map(len, prompts))
    if longest + max_tokens > served.context:
        raise ApiError(
            400,
            f"a prompt of {longest:,} tokens and {max_tokens:,} new ones take {longest + max_tokens:,}, and {served.id} reads "
            f"{served.context:,}: shorten the prompt or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if len(stop) > STOPS or any(not 1 <= len(each) <= STOP_LENGTH for each in stop):
        raise ApiError(400, f"stop is at most {STOPS} texts of 1 to {STOP_LENGTH} characters each", param="stop")
    for each in stop:
        check_text(each, "stop")
    return Job(prompts, sampling, asked.n or 1, tuple(stop))


def check_text(text: str, name: str) -> None:
    """Raise ApiError (400) for text with half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, f"{name} must be valid Unicode text; it holds half of a surrogate pair", param=name
        ) from None


def check_length(served: Served, characters: int, name: str) -> None:
    """Raise ApiError (400) for text that cannot fit, before it is tokenized."""
    if characters > served.longest_text:
        raise ApiError(
            400,
            f"{name} has {characters:,} characters, and the {served.context:,} tokens that {served.id} reads have at most "
            f"{served.longest_text:,}: shorten the text",
            param=name,
            code="context_length_exceeded",
        )
