"""SPEC.yaml: what a sweep varies, over which seeds, on what data, at which budget; and the shipped specs by name.

A row is a set of overrides of stages, dotted as `nextvec train` takes them with the stage in front: `lm.energy.draws`,
`autoencoder.model.latent`, `baseline.optim.lr`; `stage.` stands for the stage that the row trains last. `budget.tokens`
(or flops, seconds) among them is the row's own budget.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from nextvec.configs.read import read_settings
from nextvec.errors import ConfigError
from nextvec.head_settings import leave_behind
from nextvec.settings import Config, Count, Positive, Rate, Seed, as_number, layered, load_yaml, unknown_name
from nextvec.train import VERBS

STAGES = tuple(VERBS)
Stage = Literal["autoencoder", "lm", "baseline"]
ABOVE_ZERO = Annotated[float, Field(gt=0)]
SETS = {"small": lambda name: not name.startswith("paper-"), "paper": lambda name: name.startswith("paper-")}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class DataSpec(Config):
    """Where the text comes from: `source`, prepared once for the sweep, or `shards` that exist."""

    source: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()  # as `nextvec prepare` reads
    shards: str | None = None  # what `nextvec prepare` wrote, with held-out documents
    tokenizer: str | None = None  # a tokenizer's file or folder; None: a byte-level BPE is trained on `source`
    vocab_size: Positive = 2048  # tokens of the tokenizer that is trained
    valid_fraction: Rate = 0.05  # documents held out
    text_key: str = "text"  # key or column that holds the text

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if bool(self.source) == (self.shards is not None):
            raise ValueError("give either source or shards")
        if self.shards is not None and self.tokenizer is not None:
            raise ValueError("shards have their tokenizer: leave tokenizer out")
        return self


class BudgetSpec(Config):
    """What every row may spend on the stage that it trains last. Exactly one of tokens, flops and seconds."""

    tokens: ABOVE_ZERO | None = None  # of training text
    flops: ABOVE_ZERO | None = None  # operations of training as `nextvec flops` counts them, the head split
    seconds: ABOVE_ZERO | None = None  # turned into steps by a rate that is measured once and kept
    autoencoder: bool = False  # whether what the autoencoder of a row takes is part of the row's budget

    @model_validator(mode="after")
    def _rules(self) -> Self:
        amounts = {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}
        given = [name for name, value in amounts.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of tokens, flops, seconds; got {', '.join(given) or 'none'}")
        return self

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens:,.0f} tokens"
        return f"{self.flops:.3g} operations" if self.flops is not None else f"{self.seconds:g} s"


class EvaluateSpec(Config):
    """How finished rows are scored: held-out documents, protocol documents-N."""

    context_tokens: Positive = 512  # N
    draws: Annotated[int, Field(ge=2)] = 4  # S per position
    documents: Positive | None = None  # the first so many of the held-out ones; None: all
    document_tokens: Positive | None = 2048  # first tokens of each; None: all
    stride: Positive | None = None  # tokens between scored positions; None: the least common multiple of the rows' K
    batches: Positive = 8  # held-out batches of an evaluation during training
    curve: Count = 0  # points of training, evenly spaced, at which Brier figures are measured as well; 0: none


@dataclass(frozen=True)
class Row:
    """One point of a sweep, before seeds."""

    name: str
    stage: Stage  # trained last, at the budget, and scored
    changes: Mapping[str, Any]  # dotted, the stage first
    budget: BudgetSpec | None = None  # its own; None: that of the spec

    @property
    def folder(self) -> str:
        """A name for files."""
        return re.sub(r"[^\w.=+-]+", "-", self.name).strip("-") or "row"


class SweepSpec(Config):
    """A whole SPEC.yaml, the files of its `from` merged in."""

    name: str  # of the file
    about: str = ""  # the question, in a sentence
    data: DataSpec
    base: dict[Stage, dict[str, Any]] = Field(default_factory=dict)  # settings of every row, by stage
    stage: Stage = "lm"  # that rows train last, unless they say another
    grid: dict[str, Any] = Field(default_factory=dict)  # axis: values of a setting, or named sets of overrides
    rows: tuple[dict[str, Any], ...] = ()  # overrides each, with `name` and `stage` where wanted
    seeds: tuple[Seed, ...] = (0,)
    budget: BudgetSpec | None = None  # None: train.steps of the settings
    evaluate: EvaluateSpec = EvaluateSpec()
    paper: dict[str, float] = Field(default_factory=dict)  # the paper's BrierLM by row
    ranking: tuple[str, ...] = ()  # rows from best to worst, where the paper gives an order without figures
    reach: tuple[str, ...] = ()  # rows whose best final held-out loss others are timed to, by name or stage: name

    @model_validator(mode="before")
    @classmethod
    def _known_stages(cls, data: Any) -> Any:
        base = data.get("base") if isinstance(data, dict) else None
        for stage in base if isinstance(base, dict) else ():
            if stage not in STAGES:
                raise ValueError(f"base: {unknown_name('stage', str(stage), list(STAGES))}")
        return data

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers; got {list(self.seeds)}")
        points = self.points()
        for what, names in (("paper", self.paper), ("ranking", self.ranking), ("reach", self.reach)):
            for name in names:
                if name not in {row.name for row in points}:
                    raise ValueError(f"{what}: {unknown_name('row', name, [row.name for row in points])}")
        return self

    def points(self) -> list[Row]:
        """The rows of `rows`, then those of the grid. Raises ValueError in one sentence for what is no row."""
        found = [_listed_row(dict(given), self.stage) for given in self.rows] + list(_grid_rows(self.grid, self.stage))
        if not found:
            raise ValueError("a sweep needs rows: give rows or a grid")
        seen: dict[str, Row] = {}
        for row in found:
            key = f"{row.stage}/{row.folder}"
            if key in seen:
                raise ValueError(f"two rows are called {row.name!r}; give them names of their own with `name`")
            seen[key] = row
        return found

    def budget_of(self, row: Row) -> BudgetSpec | None:
        """What a row may spend: its own amount, by the spec's rule on the autoencoder, or all of the spec's."""
        if row.budget is None:
            return self.budget
        return row.budget.override(autoencoder=self.budget is not None and self.budget.autoencoder)

    def settings(self, row: Row, stage: str, seed: int) -> dict[str, Any]:
        """Nested settings of one stage of a row, as a file for `nextvec train` holds them."""
        settings: dict[str, Any] = {"train": {"seed": seed}}
        settings = layered(settings, self.base.get(stage, {}))  # type: ignore[call-overload]
        own = {key.partition(".")[2]: value for key, value in row.changes.items() if key.partition(".")[0] == stage}
        return {"kind": VERBS[stage], **layered(leave_behind(settings, own), own)}


def stages_of(stage: str) -> tuple[str, ...]:
    """The stages that a row trains, in order."""
    return ("autoencoder", "lm") if stage == "lm" else (stage,)


def read_spec(source: str) -> SweepSpec:
    """A spec file, or a shipped spec by its name. Raises ConfigError in one sentence."""
    path = _find(source)
    data = _merged(path, ())
    for key in ("base", "grid", "rows"):
        if key in data:
            data[key] = _numbers(data[key])
    if isinstance(data.get("base"), dict):
        data["base"] = {stage: _with_file(stage, settings) for stage, settings in data["base"].items()}
    return SweepSpec.parse({"name": path.stem, **data}, source)


def _with_file(stage: str, settings: Any) -> Any:
    """Settings of a stage over those of the file for `nextvec train` that they name under `from`."""
    if not isinstance(settings, dict) or "from" not in settings or stage not in STAGES:
        return settings
    inherited = _numbers(read_settings(str(settings["from"])))
    kind = inherited.pop("kind", VERBS[stage])
    if kind != VERBS[stage]:
        raise ConfigError(f"base.{stage}: {settings['from']} has kind {kind!r}, and this stage trains {VERBS[stage]!r}")
    own = {key: value for key, value in settings.items() if key != "from"}
    return layered(leave_behind(inherited, own), own)


def shipped() -> list[str]:
    """Names of the shipped specs."""
    return sorted(path.name[:-5] for path in _folder().iterdir() if re.fullmatch(r"[a-z].*\.yaml", path.name))


def named(words: list[str]) -> list[str]:
    """Specs to run: file names and names as given, `small` and `paper` as the shipped sets of these sizes."""
    found = []
    for word in words:
        found += [name for name in shipped() if SETS[word](name)] if word in SETS else [word]
    return found


def _folder() -> Path:
    return Path(str(files("nextvec.sweep") / "specs"))


def _find(source: str, beside: Path | None = None) -> Path:
    """The file of a spec: of the folder `beside`, a path, or a shipped name, in this order."""
    near = [beside / source, beside / f"{source}.yaml"] if beside is not None else []
    for path in (*near, Path(source), _folder() / f"{source}.yaml"):
        if path.is_file():
            return path
    if Path(source).suffix in (".yaml", ".yml"):
        raise ConfigError(f"{source} does not exist; `nextvec sweep --list` names the shipped specs")
    raise ConfigError(unknown_name("spec", source, [*shipped(), *SETS]))


def _merged(path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
    """The file's keys over those of the files that it names under `from`: a key replaces a key, whole."""
    if path in inside:
        raise ConfigError(f"{path} takes its settings `from` itself: {' from '.join(p.name for p in (*inside, path))}")
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping, got {type(data).__name__}")
    merged: dict[str, Any] = {}
    for parent in _listed(data.pop("from", [])):
        merged |= _merged(_find(str(parent), path.parent), (*inside, path))
    return merged | {str(key): value for key, value in data.items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _numbers(inner) for key, inner in value.items()}
    return [_numbers(inner) for inner in value] if isinstance(value, list) else as_number(value)


def _listed_row(given: dict[str, Any], stage: Stage) -> Row:
    stage = _stage(given.pop("stage", stage))
    name = given.pop("name", None)
    name = str(name or ", ".join(_label(key, value) for key, value in given.items()) or "base")
    return _row(name, stage, given)


def _grid_rows(grid: Mapping[str, Any], stage: Stage) -> Iterator[Row]:
    if not grid:
        return
    axes: list[list[tuple[str, dict[str, Any]]]] = []
    for axis, points in grid.items():
        if isinstance(points, Mapping) and points and all(isinstance(point, Mapping) for point in points.values()):
            axes.append([(name, dict(point)) for name, point in points.items()])
        elif isinstance(points, list) and points:
            axes.append([("" if axis == "stage" else _label(axis, value), {axis: value}) for value in points])
        else:
            raise ValueError(f"grid: {axis} needs a list of values, or named sets of overrides; got {points!r}")
    for combination in itertools.product(*axes):
        given = {key: value for _, point in combination for key, value in point.items()}
        own = _stage(given.pop("stage", stage))
        yield _row(", ".join(label for label, _ in combination if label), own, given)


def _row(name: str, stage: Stage, given: Mapping[str, Any]) -> Row:
    """A row of its overrides, its budget taken out of them. Raises ValueError, ConfigError for a budget that is none."""
    amounts = {key.partition(".")[2]: value for key, value in given.items() if key.partition(".")[0] == "budget"}
    if "autoencoder" in amounts:
        raise ValueError("budget.autoencoder is for the whole sweep: put it into `budget`")
    changes = {key: value for key, value in given.items() if key.partition(".")[0] != "budget"}
    budget = BudgetSpec.parse(amounts, f"row {name}: budget") if amounts else None
    return Row(name, stage, _changes(changes, stage), budget)


def _stage(value: Any) -> Stage:
    if value not in STAGES:
        raise ValueError(unknown_name("stage", str(value), list(STAGES)))
    return value


def _changes(given: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Dotted overrides with `stage.` replaced by the row's own. Raises ValueError for what names no stage."""
    found = {}
    for key, value in given.items():
        first, _, rest = key.partition(".")
        first = stage if first == "stage" else first
        if first not in STAGES or not rest:
            near = unknown_name("stage", first, list(STAGES)) if first not in STAGES else f"{key!r} names no setting"
            raise ValueError(f"{near} (a row's key is a stage and a setting, for instance lm.energy.draws)")
        if first not in stages_of(stage):
            raise ValueError(f"a row that trains {stage} has no stage {first}: leave {key} out")
        if f"{first}.{rest}" in (f"{stage}.train.seed", f"{first}.data.path"):
            raise ValueError(f"{key} is not a row's to set: it comes from `{'seeds' if 'seed' in rest else 'data'}`")
        found[f"{first}.{rest}"] = value
    return found


def _label(key: str, value: Any) -> str:
    shown = (
        f"{value:g}"
        if isinstance(value, float) and math.isfinite(value)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
    return f"{key.rpartition('.')[2]}={shown}"
