"""What all settings share: frozen records that refuse unknown keys, one-sentence errors, YAML and `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nextvec.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
CHOICE = "kind="  # begins the name of a kind among several, which is no key and is left out of an error's sentence


class Config(BaseModel):
    """Base of all settings: frozen, unknown keys refused with the nearest known name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(unknown_key(str(key), list(cls.model_fields)))
        return data

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "config") -> Self:
        """Validate a plain dict (from YAML or JSON). Raises ConfigError in one sentence."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_sentence(error)}") from None

    def override(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).parse({**self.model_dump(), **changes}, type(self).__name__)


def load_yaml(path: Path) -> Any:
    """Read a YAML file. Raises ConfigError in one sentence when missing or malformed."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} cannot be read: {reason}") from None


def dump_yaml(config: Config) -> str:
    """Settings as YAML text, in field order."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of `data` with dotted `key.sub=value` overrides; values are read as YAML."""
    data = dict(data)
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"an override is written key=value, for instance optim.lr=1e-3; got {item!r}")
        data = with_value(data, key, yaml_value(key, value))
    return data


def with_value(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the value of one dotted key."""
    first, _, rest = key.partition(".")
    if not rest:
        return {**data, first: value}
    inner = data.get(first)
    return {**data, first: with_value(inner if isinstance(inner, dict) else {}, rest, value)}


def layered(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with each changed leaf set; keys may be dotted, nested or both."""
    found = dict(settings)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            found = layered(found, {f"{key}.{inner}": item for inner, item in value.items()})
        else:
            found = with_value(found, key, value)
    return found


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, added: bool = True, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Where two nested settings differ: dotted keys in the order of `before`, with both values, None for one that is not there.

    added: then also the keys that `before` lacks.
    """
    for key in {**before, **now} if added else before:
        a, b = before.get(key), now.get(key)
        if all(value is None or isinstance(value, Mapping) for value in (a, b)):
            yield from differences(a or {}, b or {}, added=added, prefix=f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def unknown_key(key: str, known: list[str]) -> str:
    """One sentence for an unknown key, with the nearest known name."""
    return unknown_name("key", key, known)


def unknown_name(what: str, name: str, known: list[str]) -> str:
    """One sentence for an unknown `what`, with the nearest known name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known {what}s are {', '.join(known)}"
    return f"unknown {what} {name!r}{hint}"


def yaml_value(key: str, text: str) -> Any:
    """One value written as YAML. Raises ConfigError, naming its key."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: the value {text!r} cannot be read; quote text that YAML would take apart") from None
    return as_number(value)


def as_number(value: Any) -> Any:
    """Text that is a number as a float (YAML 1.1 reads 1e-3 as text); anything else as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sentence(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(CHOICE))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = "is required"
        elif item["type"] != "value_error":
            message = f"{message}; got {item['input']!r}"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
