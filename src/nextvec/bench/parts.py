"""Where the time of a step goes: every moment of it belongs to exactly one part, so the parts add up to the step.

Boundaries are put around a few methods of the very step that is timed. In the forward pass a boundary reads the clock
when the method begins and ends; for the backward pass it hangs an identity into the graph behind the method's inputs
and outputs, whose gradient passes when the part's backward pass ends and begins. Autograd runs backward in the reverse
order of forward, so the intervals are whole. About ten clock readings per step; on CUDA they are events on the stream.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nextvec.bench import plain, plain_generation
from nextvec.bench.sampling import Evaluation, Generation, PlainGeneration
from nextvec.bench.steps import DATA, OPTIMISER, OTHER, TrainStep, Work
from nextvec.evaluate import brier
from nextvec.hardware import synchronize
from nextvec.model import autoencoder as autoencoder_module
from nextvec.model.calm import Calm
from nextvec.model.heads import energy
from nextvec.model.interface import DrawsWanted
from nextvec.model.token_lm import TokenLM
from nextvec.sampling import draw
from nextvec.train import objectives

BACKBONE, HEAD, ENERGY, AUTOENCODER, VOCABULARY = "backbone", "head", "energy loss", "autoencoder", "vocabulary"
TEMPERATURE, SCORES = "temperature", "scores"
MEANING = {
    BACKBONE: "input compressor and Transformer blocks",
    HEAD: "all draws of the generative head, its noise included; of other heads than the energy head their loss too",
    ENERGY: "energy score of the draws, teacher draws included where there are any",
    AUTOENCODER: "patch encoder and decoder without vocabulary products; the frozen one whole",
    VOCABULARY: "embedding of input ids, its gradient, and products with a vocabulary matrix with their cross-entropy",
    OPTIMISER: "gradient clipping, update and clearing of gradients",
    DATA: "reading a batch from the shards and moving it to the device",
    TEMPERATURE: "choice among candidates, or sampling of logits",
    SCORES: "scores of n-grams",
    OTHER: "the rest",
}
Place = tuple[Any, str, str]  # owner, name of its method or function, part


class Timeline:
    """Clock readings with the part that begins at each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stamps: list[tuple[str, bool, Any]] = [(OTHER, False, self._now())]

    def switch(self, part: str, backward: bool = False) -> None:
        """The time from now on belongs to `part`."""
        self._stamps.append((part, backward, self._now()))

    @property
    def part(self) -> str:
        return self._stamps[-1][0]

    def seconds(self) -> dict[tuple[str, bool], float]:
        """Seconds of each (part, in the backward pass) up to now."""
        end = self._now()
        synchronize(self._device)
        found: dict[tuple[str, bool], float] = {}
        stamps = [*self._stamps, (OTHER, False, end)]
        for (part, backward, begin), (_, _, following) in itertools.pairwise(stamps):
            key = part, backward
            found[key] = found.get(key, 0.0) + self._between(begin, following)
        return found

    def _now(self) -> Any:
        if self._device.type != "cuda":
            synchronize(self._device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self._device.type == "cuda" else float(end - begin)


class _Boundary(torch.autograd.Function):
    """Identity; when the gradient passes, the time from then on belongs to `part`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, timeline: Timeline, part: str) -> Tensor:
        ctx.timeline, ctx.part = timeline, part
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.timeline.switch(ctx.part, True)
        return gradient, None, None


def breakdown(work: Work, places: Iterable[Place], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Medians over `repeats` calls of the seconds in each part, with their share of the call.

    {part: {seconds, forward, backward, share}}, where forward and backward are of parts that have a backward pass.
    """
    runs: list[dict[tuple[str, bool], float]] = []
    places = list(places)
    for _ in range(repeats):
        synchronize(device)
        timeline = Timeline(device)
        work.mark = timeline.switch
        with boundaries(timeline, places):
            work()
        runs.append(timeline.seconds())
        work.mark = lambda part: None
    keys = dict.fromkeys(key for run in runs for key in run)
    middle = {key: sorted(run.get(key, 0.0) for run in runs)[len(runs) // 2] for key in keys}
    whole = sum(middle.values())
    table: dict[str, dict[str, float]] = {}
    for part in MEANING:
        if (part, False) not in middle and (part, True) not in middle:
            continue
        forward, backward = middle.get((part, False), 0.0), middle.get((part, True), 0.0)
        row = {"seconds": forward + backward}
        row |= {"forward": forward, "backward": backward} if (part, True) in middle else {}
        table[part] = row | {"share": (forward + backward) / whole}
    return table


def places_of(work: Work) -> list[Place]:
    """The parts of what the benchmarks measure."""
    if isinstance(work, TrainStep):
        return training_places(work.module)
    if isinstance(work, PlainGeneration):
        return plain_sampling_places(work)
    assert isinstance(work, Generation | Evaluation)
    return sampling_places(work.model)


def training_places(module: Any) -> list[Place]:
    """The parts of a training module of either arm."""
    model = module.model
    ours = type(module).__module__ != plain.__name__
    if isinstance(module, objectives.AutoencoderTraining | plain.AutoencoderTraining):
        loss = (autoencoder_module, "linear_cross_entropy") if ours else (plain, "vocabulary_loss")
        return [(module, "forward", AUTOENCODER), (model.embedding, "forward", VOCABULARY), (*loss, VOCABULARY)]
    if isinstance(module, objectives.TokenLMTraining | plain.TokenLMTraining):
        loss = (objectives, "linear_cross_entropy") if ours else (plain, "vocabulary_loss")
        return [(model, "states", BACKBONE), (model.embedding, "forward", VOCABULARY), (*loss, VOCABULARY)]
    places = [(model, "states", BACKBONE), (model, "teacher", AUTOENCODER)]
    if model.compressor.embedding is not None:
        places.append((model.compressor.embedding, "forward", VOCABULARY))
    if not ours:
        places += [(model, "draw_latents", HEAD), (plain, "energy_score", ENERGY)]
        places += [(plain, "head_noise", HEAD), (plain, "teacher_noise", ENERGY)]
    elif isinstance(model.head, energy.EnergyHead):
        places += [(model.head, "draw", HEAD), (energy, "energy_score_loss", ENERGY)]
    else:
        places += [(model.head, "loss", HEAD)]
    return places if module.auxiliary is None else [*places, (module.auxiliary, "forward", VOCABULARY)]


def sampling_places(model: Calm | TokenLM) -> list[Place]:
    """The parts of generation and of evaluation."""
    places: list[Place] = [(model, name, BACKBONE) for name in ("states", "trunk", "branch")]
    places += [(draw, name, TEMPERATURE) for name in ("batch_temperature", "choose_patch", "sample_by")]
    places += [(brier, "brier_scores", SCORES)]
    if isinstance(model, TokenLM):
        return [*places, (model, "draw_tokens", TEMPERATURE), (model, "logits", VOCABULARY)]
    decoder = model.autoencoder
    decoding = ("decode_tokens", "decode_stem", "decode_place", "decode_hidden")
    places += [(decoder, name, AUTOENCODER) for name in decoding]
    places.append((model, "teacher", AUTOENCODER))  # encodes what a model of latents reads
    drawing = ["draw", "draw_wanted"] if isinstance(model.head, DrawsWanted) else ["draw"]
    places += [(model.head, name, HEAD) for name in drawing]
    return [*places, (decoder.vocabulary(), "argmax", VOCABULARY)]


def plain_sampling_places(work: PlainGeneration) -> list[Place]:
    """The parts of generation by the authors' algorithm."""
    model = work.plain
    return [
        (model.compressor, "forward", BACKBONE),
        (plain_generation, "cached_states", BACKBONE),
        (model, "draw_latents", HEAD),
        (plain_generation, "decode_all", VOCABULARY),
        (model.autoencoder, "decode_hidden", AUTOENCODER),
        (plain_generation, "choose", TEMPERATURE),
    ]


@contextmanager
def boundaries(timeline: Timeline, places: Iterable[Place]) -> Iterator[None]:
    """Boundaries around the methods and functions named, for as long as the block lasts."""
    undo: list[Callable[[], None]] = []
    try:
        for owner, name, part in places:
            original, own = getattr(owner, name), name in vars(owner)
            setattr(owner, name, _between_boundaries(original, timeline, part))
            undo.append(_restore(owner, name, original if own else None))
        yield
    finally:
        for step in reversed(undo):
            step()


def _restore(owner: Any, name: str, original: Any) -> Callable[[], None]:
    return lambda: delattr(owner, name) if original is None else setattr(owner, name, original)


def _between_boundaries(original: Callable[..., Any], timeline: Timeline, part: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        outer = timeline.part
        arguments = tuple(_mark(argument, timeline, outer) for argument in arguments)
        timeline.switch(part)
        result = original(*arguments, **named)
        if isinstance(result, tuple):
            marked = (_mark(item, timeline, part) for item in result)
            result = type(result)(*marked) if hasattr(result, "_fields") else tuple(marked)
        else:
            result = _mark(result, timeline, part)
        timeline.switch(outer)
        return result

    return call


def _mark(value: Any, timeline: Timeline, part: str) -> Any:
    """A boundary behind a tensor that a gradient will flow back through; parameters stay as they are."""
    if isinstance(value, Tensor) and value.grad_fn is not None and torch.is_grad_enabled():
        return _Boundary.apply(value, timeline, part)
    return value
