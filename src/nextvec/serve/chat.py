"""Chats as prompts, by the template that a tokenizer's makers wrote (Jinja, in a sandbox); most base models have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextvec.errors import DataError
from nextvec.files import read_json
from nextvec.serve.errors import ApiError

if TYPE_CHECKING:
    from nextvec.serve.schema import Message
    from nextvec.text.tokenizer import TextTokenizer

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """A run's chat template. The special tokens that it writes are read as such; in a message they are refused."""

    def __init__(self, source: str, names: dict[str, str], where: Path) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: date.today().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"the chat template of {where} cannot be read: {error}") from None
        self._names = names

    def encode(self, messages: Sequence[Message], tokenizer: TextTokenizer) -> list[int]:
        """Ids of the chat, up to where the answer begins. Raises ApiError (400) for what the template refuses."""
        from jinja2 import TemplateError

        for message in messages:
            for special in tokenizer.special_texts:
                if special in message.text:
                    raise ApiError(400, f"a message must not contain the special token {special}", param="messages")
        told = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text = self._template.render(messages=told, add_generation_prompt=True, **self._names)
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from None
        return tokenizer.encode_marked(text)


def find_template(run: Path) -> ChatTemplate | None:
    """The template in a run's folder: chat_template.jinja, or chat_template of tokenizer_config.json. Raises DataError."""
    settings: dict[str, Any] = read_json(run / SETTINGS, "tokenizer settings") if (run / SETTINGS).is_file() else {}
    source = settings.get("chat_template")
    if (run / TEMPLATE).is_file():
        source = (run / TEMPLATE).read_text(encoding="utf-8")
    if isinstance(source, list):  # several by name
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        names[key] = name if isinstance(name, str) else ""
    return ChatTemplate(source, names, run)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
