"""The section on cost: what each model spends per token of text, counted as the paper counts."""

from __future__ import annotations

from nextvec.report.inputs import Cost, Inputs
from nextvec.report.markup import absent, fold, paragraph, table
from nextvec.report.words import count

PARTS = ("embedding", "compressor", "attention", "mlp", "head", "autoencoder", "vocabulary", "auxiliary")


def cost_section(inputs: Inputs) -> str:
    """Parameters and operations per model; part by part on request."""
    costs = inputs.details.cost
    if not costs:
        return absent("No cost table: the demo stopped before it counted.")
    tokens = {"calm": inputs.summary.calm.train_tokens, "baseline": inputs.summary.baseline.train_tokens}
    rows = [_row(cost, tokens.get(key)) for key, cost in costs.items()]
    head = [
        "model",
        "tokens per step",
        "context (steps)",
        "parameters",
        "autoencoder",
        "generation, FLOPs per token",
        "training, FLOPs per token",
        "training, FLOPs in all",
    ]
    intro = (
        "Multiply-adds count as two; norms, activations and the softmax are left out. In brackets: with the energy head "
        "as published, whose first layers see the state anew in every draw; here that half runs once per position."
    )
    parts = "".join(
        table(
            f"{cost.name}: parameters, and FLOPs per token of text", ["part", "parameters", *_COLUMNS.values()], lines
        )
        for cost in costs.values()
        if (lines := _parts(cost))
    )
    return paragraph(intro) + table("Cost per token of text", head, rows) + fold("Part by part", parts)


_COLUMNS = {"inference_split": "generation", "training_split": "training"}


def _row(cost: Cost, tokens: int | None) -> list[str]:
    training = cost.training_split.get("total")
    return [
        cost.name,
        str(cost.patch_size),
        f"{cost.context:,}",
        count(cost.params),
        count(cost.autoencoder_params) if cost.autoencoder_params else "none",
        _both(cost.inference_split, cost.inference),
        _both(cost.training_split, cost.training),
        "" if tokens is None or training is None else count(training * tokens),
    ]


def _both(split: dict[str, float], published: dict[str, float]) -> str:
    ours, theirs = count(split.get("total")), count(published.get("total"))
    return ours if ours == theirs else f"{ours} ({theirs})"


def _parts(cost: Cost) -> list[list[str]]:
    columns = [cost.parameters, *(getattr(cost, name) for name in _COLUMNS)]
    used = [part for part in (*PARTS, "total") if any(column.get(part) for column in columns)]
    return [[part, *(count(column.get(part, 0)) for column in columns)] for part in used]
