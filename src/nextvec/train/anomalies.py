"""What goes wrong in a run, read off the rows of its metrics: the same reading in training, `nextvec watch` and the report.

Thresholds, held against the metrics of 50 healthy runs and of four that stayed on the plateau (docs/log.md):

| anomaly | holds when | why there |
|---|---|---|
| not finite | a step was skipped, since its loss or gradient was not finite | a strange batch, or a rate too high |
| plateau | see `Detector._plateau` | |
| collapsed | a dimension carries < 0.01 nats in 3 rows, after a fifth of training | healthy ones carry over 1 nat |
| throughput | 3 rows in a row below half of the run's median, after 10 | one slow row is a neighbour, three are a state |
| gradient | a row's norm is over 4 times the median of the 20 before, after 10 | healthy rows stayed below 2.4 times |
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal, TypeAlias

from nextvec.config import CalmRun, RunConfig

Kind: TypeAlias = Literal["not finite", "plateau", "collapsed", "throughput", "gradient"]
IN_A_ROW = 3  # rows that a state must last
BEFORE = 10  # rows before which there is nothing to compare with
SLOW = 0.5  # of the median tokens/s
SPIKE, WINDOW = 4.0, 20  # times the median gradient norm of so many rows before
SETTLED = 0.2  # share of training after which an autoencoder has chosen what its dimensions carry
WIDE = 0.7  # mean posterior std from which on most dimensions must be the prior's, where they were not counted
FLAT_ENERGY, FLAT_FIDELITY, FLAT_DIVERSITY = 0.008, 0.01, 0.02  # relative change between two quarters of the steps
CALIBRATED = (0.45, 0.55)  # diversity / fidelity where draws have the spread of the law they follow
RISEN = 0.45  # the same ratio at the end of the rise from the start
PATIENCE, RISES = 0.5, 8  # share of training, or multiples of the time of the rise, before a plateau is called one
GAP = 0.005  # conditioning gap / energy below which the head ignores its state
MARGINAL = 0.995  # energy / energy of the law of all latents, above which the head has learnt no more than that
FRESH = 0.25  # diversity / fidelity of a first row from which that law's energy can be read


@dataclass(frozen=True)
class Anomaly:
    """One thing that went wrong in a run; a run has at most one of a kind."""

    kind: Kind
    first: int  # step of the row at which it was noticed
    last: int  # step of the last row in which it was seen
    text: str  # one line

    def now(self, step: int) -> bool:
        """Whether it holds at `step`, the run's newest row."""
        return self.last == step


@dataclass
class _Curve:
    """A metric over steps, with running sums, so that a mean over any stretch costs nothing."""

    steps: list[int] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0])

    def append(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.sums.append(self.sums[-1] + value)

    def mean(self, after: float, until: float) -> float | None:
        """Over the rows of steps in (after, until]; None where these are too few."""
        first, end = bisect_right(self.steps, after), bisect_right(self.steps, until)
        return (self.sums[end] - self.sums[first]) / (end - first) if end - first >= IN_A_ROW else None


class Detector:
    """Takes the rows of a run in order, and says what arises. No thread, no clock, no file: rows in, sentences out."""

    def __init__(self, steps: int | None = None, alpha: float = 1.0) -> None:
        """steps: of the whole training, for rows that do not say their `progress`. alpha: exponent of the energy score."""
        self._steps, self._alpha = steps, alpha
        self._found: dict[Kind, Anomaly] = {}
        self._skipped = 0
        self._speeds: list[float] = []  # sorted
        self._work: list[float] = []  # processor seconds per second, sorted
        self._slow: deque[tuple[float, float | None]] = deque(maxlen=IN_A_ROW)  # tokens/s, processor seconds per second
        self._times: tuple[float, float] | None = None
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._spikes = 0
        self._collapsed = 0  # rows in a row
        self._fidelity, self._diversity = _Curve(), _Curve()
        self._rise: int | None = None
        self._gap: tuple[int, float] | None = None  # step and conditioning gap of the newest held-out row

    @classmethod
    def of(cls, config: RunConfig) -> Detector:
        """For a run of these settings."""
        return cls(config.train.steps, config.energy.alpha if isinstance(config, CalmRun) else 1.0)

    @property
    def found(self) -> list[Anomaly]:
        """All so far, in the order in which they arose."""
        return sorted(self._found.values(), key=lambda anomaly: anomaly.first)

    def add(self, row: Mapping[str, Any]) -> list[Anomaly]:
        """Read one row of metrics.jsonl; returns the anomalies of a kind that the run did not have before."""
        before = set(self._found)
        step = int(_number(row.get("step")) or 0)
        if row.get("kind") == "eval":
            gap = _number(row.get("conditioning_gap"))
            if gap is not None:
                self._gap = step, gap
        elif row.get("kind") == "train":
            done = _number(row.get("progress"))
            if done is None and self._steps is not None:
                done = step / self._steps
            self._not_finite(step, row)
            self._gradient(step, row)
            self._throughput(step, row)
            self._collapse(step, row, done)
            self._plateau(step, row, done)
        return [anomaly for kind, anomaly in self._found.items() if kind not in before]

    def _see(self, kind: Kind, step: int, text: str) -> None:
        known = self._found.get(kind)
        self._found[kind] = Anomaly(kind, step, step, text) if known is None else replace(known, last=step, text=text)

    def _not_finite(self, step: int, row: Mapping[str, Any]) -> None:
        skipped = int(_number(row.get("skipped")) or 0)
        if skipped > self._skipped:
            self._skipped = skipped
            steps = "step was" if skipped == 1 else "steps were"
            self._see(
                "not finite",
                step,
                f"{skipped:,} {steps} skipped, the last before step {step:,}: loss or gradient not finite; lower optim.lr or "
                "lengthen optim.warmup",
            )

    def _gradient(self, step: int, row: Mapping[str, Any]) -> None:
        norm = _number(row.get("grad_norm"))
        if norm is None:
            return
        if len(self._norms) >= BEFORE and norm > SPIKE * (usual := median(self._norms)):
            self._spikes += 1
            many = "" if self._spikes == 1 else f"; {self._spikes} such rows so far"
            self._see(
                "gradient",
                step,
                f"the gradient's norm was {norm:.3g} on average up to step {step:,}, {norm / usual:.0f} times the usual "
                f"{usual:.3g}{many}",
            )
        self._norms.append(norm)

    def _throughput(self, step: int, row: Mapping[str, Any]) -> None:
        speed = _number(row.get("tokens_per_s"))
        if speed is None:
            return
        work = self._processor_share(row)
        self._slow.append((speed, work))
        if len(self._speeds) >= BEFORE and len(self._slow) == IN_A_ROW:
            usual = _middle(self._speeds)
            if max(speed for speed, _ in self._slow) < SLOW * usual:
                text = f"{speed:,.0f} tokens/s at step {step:,}, {speed / usual:.0%} of this run's median {usual:,.0f}"
                shares = [share for _, share in self._slow if share is not None]
                if self._work and len(shares) == IN_A_ROW and max(shares) < SLOW * _middle(self._work):
                    text += "; it gets so much less of the processor: other work runs on this machine"
                self._see("throughput", step, text)
        insort(self._speeds, speed)
        if work is not None:
            insort(self._work, work)

    def _processor_share(self, row: Mapping[str, Any]) -> float | None:
        """Processor seconds per second of training since the row before."""
        seconds, cpu = _number(row.get("seconds")), _number(row.get("cpu_seconds"))
        if seconds is None or cpu is None:
            return None
        before, self._times = self._times, (seconds, cpu)
        if before is None or seconds <= before[0]:
            return None
        return (cpu - before[1]) / (seconds - before[0])

    def _collapse(self, step: int, row: Mapping[str, Any], done: float | None) -> None:
        """Dimensions counted by the autoencoder; in older metrics, which lack the count, a mean std near the prior's 1."""
        dimensions, sigma = _number(row.get("collapsed")), _number(row.get("sigma"))
        if dimensions is not None:
            bad, what = dimensions >= 1, f"{dimensions:.0f} latent dimensions carry less than 0.01 nats"
        else:
            bad, what = (
                sigma is not None and sigma > WIDE,
                f"the posterior's mean std is {sigma or 0:.2f}, near the prior's 1",
            )
        self._collapsed = self._collapsed + 1 if bad else 0
        if done is not None and done >= SETTLED and len(self._norms) >= BEFORE and self._collapsed >= IN_A_ROW:
            self._see(
                "collapsed",
                step,
                f"{what} at step {step:,}: collapsed; keep model.kl_clip at 0.5, or lower model.kl_weight",
            )

    def _plateau(self, step: int, row: Mapping[str, Any], done: float | None) -> None:
        """The head draws from the law of all latents and ignores its state (docs/footguns.md). All of this holds:

        - fidelity and diversity are flat: their means over the last two quarters of the steps differ by less than 1 and 2 %,
          and their difference, which batches move less, falls by less than 0.8 %;
        - diversity is half of fidelity, as of draws with the spread of the law that they follow;
        - nothing is gained on that law. Known from held-out rows where they are at hand: the conditioning gap is below 0.5 %
          of the energy. Else the energy is not 0.5 % below that of independent draws of the law itself, E|z - z'|. Draws
          coincide at the start, and for draws that do not depend on the truth and have its mean E|x - z|^2 = s_x^2 + s_z^2,
          so with norms as concentrated as in many dimensions E|z - z'| = sqrt(fidelity^2 / 2 - diversity^2) for alpha = 1,
          read off the first row. Not known for a run that began with trained weights;
        - half of the training is over, or 8 times the steps in which diversity rose: every run passes through here.
        """
        fidelity, diversity = _number(row.get("fidelity")), _number(row.get("diversity"))
        if fidelity is None or diversity is None or fidelity <= 0:
            return
        self._fidelity.append(step, fidelity)
        self._diversity.append(step, diversity)
        if self._rise is None and diversity >= RISEN * fidelity:
            self._rise = step
        patient = (done is not None and done >= PATIENCE) or (self._rise is not None and step >= RISES * self._rise)
        f3, f4 = (self._fidelity.mean(step * part, step * (part + 0.25)) for part in (0.5, 0.75))
        d3, d4 = (self._diversity.mean(step * part, step * (part + 0.25)) for part in (0.5, 0.75))
        if not patient or f3 is None or f4 is None or d3 is None or d4 is None:
            return
        e3, e4 = f3 - d3, f4 - d4
        if abs(f4 / f3 - 1) >= FLAT_FIDELITY or abs(d4 / d3 - 1) >= FLAT_DIVERSITY or e4 <= (1 - FLAT_ENERGY) * e3:
            return
        if not CALIBRATED[0] < d4 / f4 < CALIBRATED[1]:
            return
        if self._gap is not None and self._gap[0] > step / 2:
            learnt, seen = self._gap[1] >= GAP * e4, f"conditioning gap {self._gap[1]:.2g}"
        else:
            learnt, seen = min(e3, e4) < MARGINAL * self._independent(), "no held-out row says the conditioning gap"
        if not learnt:
            self._see(
                "plateau",
                step,
                f"energy loss on its plateau at step {step:,}: fidelity {f4:.4g} and diversity {d4:.4g} have been flat since "
                f"step {step // 2:,}, and draws follow text in general, not this one ({seen}); see docs/footguns.md",
            )

    def _independent(self) -> float:
        """Energy of independent draws of the law of all latents, from the first row; infinite where that is not fresh."""
        fidelity, diversity = self._fidelity.sums[1], self._diversity.sums[1]
        if diversity > FRESH * fidelity:
            return float("inf")
        power = 2 / self._alpha
        return float((2 * (fidelity / 2) ** power - diversity**power) ** (self._alpha / 2))


def _middle(ordered: list[float]) -> float:
    """The median of a sorted list."""
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        return None
    return float(value)
