"""A settings file, given as a path or by the name of a shipped one: what it lacks comes from others, its model from a preset.

from: paper/calm-m               # one file or a list: beside this one, a path, or shipped; settings here go before theirs
model: {preset: calm-l}          # sizes of nextvec.presets, without vocabulary and autoencoder, which training brings
train: {accumulate: 128}
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from nextvec.errors import ConfigError
from nextvec.head_settings import leave_behind
from nextvec.presets import preset
from nextvec.settings import layered, load_yaml, unknown_name

BROUGHT = {
    "kind",
    "vocab_size",
    "mask_id",
    "autoencoder",
}  # settings of a model that come from tokenizer and autoencoder


def shipped() -> list[str]:
    """Names of the shipped settings files."""
    return sorted(
        path.relative_to(_folder()).with_suffix("").as_posix()
        for path in _folder().rglob("*.yaml")
        if not path.name.startswith("_")
    )


def is_settings(source: str) -> bool:
    """Whether `source` is a file or names a shipped one."""
    return _found(source) is not None


def read_settings(source: str) -> dict[str, Any]:
    """Nested settings of a path or shipped name. Raises ConfigError in one sentence."""
    data = _merged(_find(source), ())
    model = data.get("model")
    if isinstance(model, dict) and "preset" in model:
        data = _with_preset(data, model, source)
    return data


def _with_preset(data: dict[str, Any], model: dict[str, Any], source: str) -> dict[str, Any]:
    model = dict(model)
    config = preset(str(model.pop("preset")))
    kind = getattr(config, "kind", "autoencoder")
    if data.setdefault("kind", kind) != kind:
        raise ConfigError(f"{source}: model.preset is of the kind {kind!r}, and the settings are of {data['kind']!r}")
    sizes = config.model_dump(mode="json", exclude_unset=True)
    return {**data, "model": layered({name: size for name, size in sizes.items() if name not in BROUGHT}, model)}


def _merged(path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
    """The file's settings over those of the files that it names under `from`, each single one for itself."""
    if path in inside:
        raise ConfigError(f"{path} takes its settings `from` itself: {' from '.join(p.name for p in (*inside, path))}")
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    parents = data.pop("from", [])
    merged: dict[str, Any] = {}
    for parent in parents if isinstance(parents, list) else [parents]:
        merged = _over(merged, _merged(_find(str(parent), path.parent), (*inside, path)))
    return _over(merged, data)


def _over(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return layered(leave_behind(settings, changes), changes)


def _find(source: str, beside: Path | None = None) -> Path:
    found = _found(source, beside)
    if found is None:
        known = shipped()
        near = unknown_name("shipped file", source, known).partition("; ")[2]
        raise ConfigError(f"config file {source} does not exist; {near}")
    return found


def _found(source: str, beside: Path | None = None) -> Path | None:
    near = [beside / source, beside / f"{source}.yaml"] if beside is not None else []
    name = source.removeprefix("configs/").removesuffix(".yaml")
    return next((p for p in (*near, Path(source), _folder() / f"{name}.yaml") if p.is_file()), None)


def _folder() -> Path:
    return Path(str(files("nextvec.configs")))
