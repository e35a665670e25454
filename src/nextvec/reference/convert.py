"""Published checkpoint -> run directory, and back.

Tensors are copied one at a time, in the order in which the source files hold them, each to its place in the new file: memory
stays at the file that is being read (mapped), whatever the size of the model or the cut of its shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nextvec.card import imported_card
from nextvec.config import (
    CalmConfig,
    ImportedAutoencoder,
    ImportedCalm,
    ImportedRun,
    ImportSettings,
    ModelRun,
    TokenLMConfig,
)
from nextvec.errors import ConfigError, DataError
from nextvec.files import atomic_open, write_json
from nextvec.reference.hub import Checkpoint, open_checkpoint
from nextvec.reference.names import IN_LM, Place, Published, Shape, autoencoder_names, calm_names, inside_lm
from nextvec.reference.settings import (
    LANGUAGE_MODELS,
    autoencoder_inside,
    generation_settings,
    kept_aside,
    kind_of,
    published_settings,
    read_autoencoder,
    read_calm,
)
from nextvec.reference.weights import PICKLED, Stored, TensorWriter, index, listing, read_weights
from nextvec.rundir import CONFIG, TOKENIZER, WEIGHTS, build_model, check_sum, describe_run, read_config, write_sum
from nextvec.text.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class Part:
    """Some files of weights, and where each of their tensors goes; those whose name starts with `ignored` go nowhere."""

    source: str
    files: list[Path]
    found: dict[str, Stored]
    table: list[Published]
    ignored: str | None = None


@dataclass(frozen=True)
class Converted:
    """A run directory made from a published checkpoint."""

    path: Path
    config: ImportedRun
    parameters: int
    has_tokenizer: bool


def convert(
    source: str, destination: Path, *, autoencoder: str | None = None, tokenizer: str | Path | None = None
) -> Converted:
    """Write the run directory `destination` from a published checkpoint: the autoencoder, or CALM with any published head.

    source: a directory, or an id on the Hugging Face hub; the autoencoder is the one inside the language model's file
    unless `autoencoder`, another such source, is given. tokenizer: anything `load_tokenizer` takes; by default the
    source's own tokenizer.json, and without one the run cannot read or write text.
    Raises DataError or ConfigError in one sentence; then `destination` holds no model.
    """
    checkpoint = open_checkpoint(source)
    destination = Path(destination)
    _check_free(destination / WEIGHTS)
    if not (checkpoint.folder / "config.json").is_file() and (checkpoint.folder / CONFIG).is_file():
        raise ConfigError(f"{source} is a run directory already; add --to reference to get the published format")
    config, parts = _plan(checkpoint, autoencoder)
    text = _tokenizer(tokenizer, checkpoint.folder, config.model.vocab_size)
    shapes = _shapes(config)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    for part in parts:
        _check(part, shapes)
    layout = _layout(parts, shapes)
    with atomic_open(destination / WEIGHTS, "w+b") as handle:
        writer = TensorWriter(handle, layout)
        for part in parts:
            by_name = {name: tensor for tensor in part.table for name in tensor.names}
            done: set[str] = set()
            for path in part.files:
                _copy(path, by_name, shapes, writer, done)
        describe_run(destination, config, text, imported_card(config, parameters))
    write_sum(destination)
    return Converted(destination, config, parameters, text is not None)


def convert_back(run: str | Path, destination: Path) -> ModelRun:
    """Write a run directory in the published format: config.json, pytorch_model.bin, and its tokenizer if it has one.

    A converted checkpoint comes back with every key, dtype and tensor as they were. Raises DataError or ConfigError.
    """
    run, destination = Path(run), Path(destination)
    config = read_config(run)
    if isinstance(config.model, TokenLMConfig):
        raise ConfigError(f"{run} is a token_lm; the published format is for an autoencoder and CALM")
    if isinstance(config.model, CalmConfig) and config.model.head.kind not in LANGUAGE_MODELS.values():
        raise ConfigError(f"{run} has the {config.model.head.kind} head, which the published format does not know")
    if isinstance(config.model, CalmConfig) and getattr(config.model.head, "predicts", "velocity") == "latent":
        raise ConfigError(f"{run} has a flow head that predicts the latent, which the published format does not know")
    if isinstance(config.model, CalmConfig) and config.model.input != "tokens":
        raise ConfigError(f"{run} has the input {config.model.input}, which the published format does not know")
    inner = config.model.autoencoder if isinstance(config.model, CalmConfig) else config.model
    variants = {
        "attention inside patches": inner.attention,
        "a latent without a variational layer": not inner.variational,
        "a factored latent": inner.factored,
    }
    for what in (name for name, present in variants.items() if present):
        raise ConfigError(f"{run} has an autoencoder with {what}, which the published format does not know")
    if (destination / CONFIG).exists():
        raise ConfigError(f"{destination} is a run directory; give a new directory")
    _check_free(destination / PICKLED)
    table = calm_names(config.model) if isinstance(config.model, CalmConfig) else autoencoder_names(config.model)
    shapes = _shapes(config)
    ours = [Published(name, (Place(name),)) for name in shapes]
    if not (run / WEIGHTS).is_file():
        raise DataError(f"{run / WEIGHTS} does not exist: the run was not finished")
    check_sum(run)
    _check(Part(str(run), [run / WEIGHTS], index([run / WEIGHTS]), ours), shapes)
    tokenizer = load_tokenizer(run) if (run / TOKENIZER).is_file() else None
    settings = published_settings(config, tokenizer)
    write_json(destination / "config.json", settings)
    if isinstance(config.model, CalmConfig):
        write_json(destination / "generation_config.json", generation_settings(settings))
    if tokenizer is not None:
        tokenizer.save(destination)
    state: dict[str, Tensor] = {}
    for tensor in table:
        value = _gather(run / WEIGHTS, tensor)
        state |= dict.fromkeys(tensor.names, value)  # one storage under both names, as published
    with atomic_open(destination / PICKLED, "wb") as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:  # torch hides what the file system said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return config


def _plan(checkpoint: Checkpoint, autoencoder: str | None) -> tuple[ImportedRun, list[Part]]:
    """Configuration of the run, and the files to copy its weights from."""
    source, settings = checkpoint.source, checkpoint.settings()
    kind = kind_of(settings, source)
    if autoencoder is not None and kind == "autoencoder":
        raise ConfigError(f"--autoencoder is for a language model, and {source} is an autoencoder itself")
    aside = ImportSettings(
        source=source, revision=checkpoint.revision, autoencoder=autoencoder, settings=kept_aside(settings, kind)
    )
    if kind == "autoencoder":
        config = ImportedAutoencoder(model=read_autoencoder(settings, source), imported=aside)
        return config, [_part(checkpoint, autoencoder_names(config.model))]
    if autoencoder is not None:
        other = open_checkpoint(autoencoder)
        found = other.settings()
        if kind_of(found, autoencoder) != "autoencoder":
            raise ConfigError(f"--autoencoder {autoencoder} is a language model; give a published Autoencoder")
        inner = read_autoencoder(found, autoencoder)
        model = read_calm(settings, inner, source, autoencoder)
        parts = [
            _part(checkpoint, calm_names(model, autoencoder=False), ignored=IN_LM),
            _part(other, inside_lm(autoencoder_names(inner))),
        ]
        return ImportedCalm(model=model, imported=aside), parts
    files = checkpoint.files()
    stored = index(files)
    inner = autoencoder_inside({name: tensor.shape for name, tensor in stored.items()}, settings, source)
    model = read_calm(settings, inner, source, source)
    return ImportedCalm(model=model, imported=aside), [Part(source, files, stored, calm_names(model))]


def _part(checkpoint: Checkpoint, table: list[Published], ignored: str | None = None) -> Part:
    files = checkpoint.files()
    return Part(checkpoint.source, files, index(files), table, ignored)


def _tokenizer(given: str | Path | None, folder: Path, vocab_size: int) -> TextTokenizer | None:
    """The tokenizer that the run gets. Raises DataError when its vocabulary is not the model's."""
    if given is None and not (folder / TOKENIZER).is_file():
        return None
    source = folder if given is None else given
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens and the model {vocab_size}: "
            "give the one that the model was trained with, by --tokenizer"
        )
    return tokenizer


def _check(part: Part, shapes: Mapping[str, Shape]) -> None:
    """Every tensor of the table is there under one of its names, in the right shape, and nothing else is."""
    found = {n: s for n, s in part.found.items() if part.ignored is None or not n.startswith(part.ignored)}
    missing = [tensor.name for tensor in part.table if not found.keys() & set(tensor.names)]
    unknown = sorted(found.keys() - {name for tensor in part.table for name in tensor.names})
    if missing or unknown:
        raise DataError(
            f"{part.source} does not hold the tensors of its config: missing {listing(missing) or 'nothing'}; "
            f"unknown {listing(unknown) or 'nothing'}"
        )
    for tensor in part.table:
        for name in found.keys() & set(tensor.names):
            if found[name].shape != tensor.shape(shapes):
                raise DataError(
                    f"{part.source}: {name} has shape {found[name].shape}, its config needs {tensor.shape(shapes)}"
                )


def _shapes(config: ModelRun) -> dict[str, Shape]:
    """Name and shape of every tensor of our model."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}


def _layout(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """Our tensors in the dtypes that they are published in."""
    layout: dict[str, Stored] = {}
    for part in parts:
        for tensor in part.table:
            for name in part.found.keys() & set(tensor.names):
                for place in tensor.places:
                    stored = Stored(shapes[place.name], part.found[name].dtype)
                    if layout.setdefault(place.name, stored) != stored:
                        raise DataError(f"{part.source}: {name} is {stored.dtype}, unlike what is joined with it")
    return layout


def _copy(
    path: Path, by_name: Mapping[str, Published], shapes: Mapping[str, Shape], writer: TensorWriter, done: set[str]
) -> None:
    """Copy one file's tensors to their places; one that comes again, in this file or another, must be the same."""
    for name, value in read_weights(path).items():
        tensor = by_name.get(name)
        if tensor is None:
            continue
        column = 0
        for place in tensor.places:
            rows = value
            if len(tensor.places) > 1:
                width = shapes[place.name][1]
                rows = value[:, column : column + width]
                column += width
            if tensor.name not in done:
                writer.put(place.name, rows, place.start)
            elif not writer.holds(place.name, rows, place.start):
                raise DataError(f"{path}: {name} is not the same as {tensor.name}, which it must repeat")
        done.add(tensor.name)


def _gather(path: Path, tensor: Published) -> Tensor:
    """A published tensor out of our file, which is mapped for this one only."""
    with safe_open(path, "pt") as file:
        parts = [file.get_slice(place.name)[place.start : place.stop] for place in tensor.places]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].clone()


def _check_free(path: Path) -> None:
    """Raises DataError unless `path` can be a new file in a folder that is there or can be made."""
    taken = next((folder for folder in path.parents if folder.exists()), None)
    if taken is not None and not taken.is_dir():
        raise DataError(f"{taken} is a file; give a new directory")
    if path.exists():
        raise DataError(f"{path} exists already; give a new directory")
