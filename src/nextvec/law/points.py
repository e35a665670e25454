"""The points of a law: finished rows of a sweep that vary the backbone's width, the tokens of training and K, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvec.config import AutoencoderRun, CalmRun, RunConfig, TokenLMRun, parse_run
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.compare import check_same
from nextvec.evaluate.cost import cost
from nextvec.scoring.brier import MAX_ORDER, BrierResult
from nextvec.settings import differences
from nextvec.sweep.folder import SWEEP
from nextvec.sweep.plan import flops_per_token, tokens_per_step
from nextvec.sweep.tables import read_sweep_results

LEAST = 3  # rows of a K; with fewer its offset is a guess
VARIED = {  # settings in which rows of one K may differ, beside the seed
    "model.backbone.width", "model.backbone.inner", "model.backbone.heads", "train.steps", "train.seed",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One finished row at one seed."""

    row: str
    K: int
    run: RunConfig
    encoder: AutoencoderRun | None  # that its CALM was trained on
    brier: BrierResult

    @property
    def parameters(self) -> float:
        """N: parameters of the backbone, blocks and norms, without embedding, compressor and head."""
        return backbone_parameters(self.run)

    @property
    def tokens(self) -> float:
        """D, trained on."""
        return float(self.run.train.steps * tokens_per_step(self.run))

    @property
    def flops(self) -> float:
        """Operations of its whole training, the autoencoder's with them."""
        return self.tokens * flops_per_token(self.run) + encoder_flops(self.encoder)


@dataclass(frozen=True)
class Grid:
    """What a law is fitted to."""

    path: Path
    text: str  # what the rows were trained on, in words
    points: tuple[Point, ...]
    missing: int  # rows times seeds of the sweep without a result
    notes: tuple[str, ...]  # rows left out, and why

    @property
    def sizes(self) -> list[int]:
        """The K that it has points of, ascending."""
        return sorted({point.K for point in self.points})

    def of(self, K: int) -> list[Point]:
        """From the smallest backbone to the largest."""
        return sorted((point for point in self.points if point.K == K), key=lambda point: point.parameters)


def backbone_parameters(run: RunConfig) -> float:
    """N: parameters of the backbone alone, the same function of its settings for every K."""
    parts = cost(run.model).parameters
    return parts.attention + parts.mlp


def encoder_flops(encoder: AutoencoderRun | None) -> float:
    """Operations of an autoencoder's whole training; 0 where there is none."""
    if encoder is None:
        return 0.0
    return encoder.train.steps * tokens_per_step(encoder) * flops_per_token(encoder)


def read_grid(path: Path) -> Grid:
    """The finished rows of a sweep's folder. Raises ConfigError in one sentence where they give no law."""
    path = Path(path)
    if not (path / SWEEP).is_file():
        raise ConfigError(f"there is no law yet: {path} holds no results; run `nextvec sweep law --out {path}` first")
    sweep = read_sweep_results(path)
    found, notes = [], []
    for row in sweep.rows:
        for seed, result in row.results.items():
            if result["failed"] or result["brier"] is None:
                notes.append(f"{row.name}, seed {seed}, is left out: {result['failed'] or 'it has no Brier figures'}")
            else:
                found.append(_point(row.name, result, path))
    by_size: dict[int, list[Point]] = {}
    for point in found:
        by_size.setdefault(point.K, []).append(point)
    for K, points in sorted(by_size.items()):
        _check_alike(points)
        if len(points) < LEAST:
            notes.append(f"K = {K} is left out: {len(points)} of its rows are finished, and {LEAST} are needed")
            found = [point for point in found if point.K != K]
    _check_spread(found, path)
    for point in found[1:]:
        check_same(found[0].brier, point.brier, (found[0].row, point.row))
        if _scored(found[0]) != _scored(point):
            raise DataError(
                f"{found[0].row} and {point.row} of {path} were scored at other positions: a file was changed"
            )
    source = sweep.spec["data"].get("source") or [sweep.spec["data"].get("shards")]
    text = f"{', '.join(map(str, source))}, {found[0].run.model.vocab_size:,} tokens of vocabulary"
    return Grid(path, text, tuple(found), sweep.missing, tuple(notes))


def _point(name: str, result: Mapping[str, Any], path: Path) -> Point:
    identity, stage = result["identity"], result["stage"]
    run = parse_run(identity[stage], f"{path}, row {name}")
    if not isinstance(run, CalmRun | TokenLMRun):
        raise ConfigError(f"{path} has the row {name}, which trains no language model: a law is of such rows")
    brier = BrierResult.from_dict(result["brier"])
    if brier.per_document is None or len(brier.brier) != MAX_ORDER:
        raise DataError(f"{path} has the row {name} without Brier-1..4 of each document; run it again")
    plain = identity["autoencoder"]
    encoder = None if plain is None else parse_run(plain, f"{path}, row {name}, its autoencoder")
    assert encoder is None or isinstance(encoder, AutoencoderRun)
    return Point(name, run.model.patch_size, run, encoder, brier)


def _scored(point: Point) -> object:
    assert point.brier.per_document is not None, "looked at when it was read"
    return point.brier.per_document.document, point.brier.per_document.positions


def _check_alike(points: list[Point]) -> None:
    """Raises ConfigError where rows of one K differ in more than a law is about."""
    first = points[0]
    for point in points[1:]:
        for key, here, there in differences(first.run.model_dump(mode="json"), point.run.model_dump(mode="json")):
            if key not in VARIED:
                raise ConfigError(
                    f"{first.row} and {point.row} differ in {key} ({here} and {there}): rows of a law differ in "
                    "backbone width, tokens, K and seed alone"
                )
        if encoder_flops(first.encoder) != encoder_flops(point.encoder):
            raise ConfigError(
                f"{first.row} and {point.row} stand on autoencoders of other settings, and a law has one a K"
            )


def _check_spread(points: list[Point], path: Path) -> None:
    """Raises ConfigError where too little is finished."""
    sizes, tokens = {point.parameters for point in points}, {point.tokens for point in points}
    if len(sizes) < 2 or len(tokens) < 2:
        raise ConfigError(
            f"{path} has too few finished rows for a law ({len(points)} that can be used, of {len(sizes)} widths and "
            f"{len(tokens)} budgets of tokens, and it takes two of each): go on with `nextvec sweep law --out {path}`"
        )
