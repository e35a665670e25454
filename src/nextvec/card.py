"""The model card: README.md of a run directory, written from its configuration and measured figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nextvec.config import (
    AutoregressiveHeadConfig,
    CalmRun,
    CategoricalHeadConfig,
    DataSettings,
    DiffusionHeadConfig,
    FlowHeadConfig,
    ImportedRun,
    MixtureHeadConfig,
    ModelRun,
    RunConfig,
    TokenLMRun,
)

if TYPE_CHECKING:
    from torch import nn

KINDS = {
    "autoencoder": "a patch autoencoder: K tokens to one latent vector and back",
    "calm": "a continuous autoregressive language model (CALM), which predicts the next vector of K tokens",
    "token_lm": "a token Transformer, the baseline that CALM is compared with",
}
INPUTS = {
    "tokens": "the tokens of a patch",
    "tables": "the tokens of a patch, by a table for each place",
    "latents": "the latent of a patch, the posterior's mean",
    "both": "the tokens of a patch and its latent, the posterior's mean",
}


def model_card(config: RunConfig, model: nn.Module, tokenizer_hash: str, trained: Mapping[str, Any]) -> str:
    """Markdown: what it is, how it was trained, what was measured on held-out text, how to use it.

    `trained`: step, tokens, seconds, and beside them the last held-out figures.
    """
    kind: str = config.kind
    data = config.data
    lines = [
        f"# {kind}: {KINDS[kind]}",
        "",
        "Made with nextvec (CALM, arXiv 2510.27688). `config.yaml` holds every setting.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |",
        f"| data | {_corpora(data)}, packing {data.packing or 'as its manifest says'} |",
        f"| tokenizer | hash {tokenizer_hash[:12]} |",
        f"| context length | {data.context_tokens:,} tokens |",
        f"| training | {trained['step']:,} steps, {trained['tokens']:,} tokens, {trained['seconds']:,.0f} s; "
        f"seed {config.train.seed} |",
        f"| optimiser | {_optimiser(config)} |",
    ]
    if isinstance(config, CalmRun):
        lines.append(f"| input | {INPUTS[config.model.input]} |")
        lines.append(f"| head | {_head(config)} |")
        lines.append(f"| recipe | {config.recipe.name}; {_loss(config)} |")
    elif isinstance(config, TokenLMRun) and config.model.recall:
        lines.append(f"| recall | {_recall(config.model.recall, config.model.grams)} |")
    known = ("kind", "step", "tokens", "seconds", "cpu_seconds")
    measured = {name: value for name, value in trained.items() if name not in known}
    lines += ["", "## Measured on held-out windows at the end of training", ""]
    lines += [f"- {name}: {_figure(value)}" for name, value in measured.items()] or ["- nothing: no held-out shards"]
    if measured:
        lines += ["", "A probe of few draws; `nextvec eval` measures under a protocol and stamps it."]
    return "\n".join([*lines, *_use(config)]) + "\n"


def imported_card(config: ImportedRun, parameters: int) -> str:
    """Markdown: what converted weights are and where they came from; nothing about them was measured here."""
    imported = config.imported
    source = imported.source + (f", revision {imported.revision}" if imported.revision else "")
    lines = [
        f"# {config.kind}: {KINDS[config.kind]}",
        "",
        "Weights of others, converted with `nextvec convert`; they and their tokenizer keep the licence of their source.",
        "",
        "| | |",
        "|---|---|",
        f"| source | {source} |",
        *([f"| autoencoder | {imported.autoencoder} |"] if imported.autoencoder else []),
        f"| parameters | {parameters:,} |",
    ]
    return "\n".join([*lines, *_use(config)]) + "\n"


def _use(config: ModelRun) -> list[str]:
    if config.kind == "autoencoder":
        return []
    name = "Calm" if config.kind == "calm" else "TokenLM"
    return [
        "",
        "## Use",
        "",
        "```python",
        f"from nextvec import {name}",
        "",
        f'model = {name}.from_pretrained(".")',
        'for text in model.stream("def ", temperature=0.5, seed=0):',
        '    print(text, end="", flush=True)',
        "```",
    ]


def _head(config: CalmRun) -> str:
    head = config.model.head
    if isinstance(head, FlowHeadConfig | DiffusionHeadConfig | CategoricalHeadConfig):
        return f"{head.kind}, {head.blocks} blocks; draws in {head.steps} steps of {head.solver}"
    recall, grams = (
        (head.recall, head.grams) if isinstance(head, MixtureHeadConfig | AutoregressiveHeadConfig) else (0, 0)
    )
    inner = head.inner if isinstance(head, MixtureHeadConfig) else None
    parts = [head.kind, f"{head.blocks} block{'s' * (head.blocks > 1)}" + (f" of inner width {inner}" if inner else "")]
    return ", ".join([*parts, *([f"recall: {_recall(recall, grams)}"] if recall else [])])


def _recall(heads: int, grams: int) -> str:
    tables = f"; n-grams of two and of three tokens in {grams:,} rows each" if grams else ""
    return f"{heads} head{'s' * (heads > 1)} over the tokens of the text{tables}"


def _loss(config: CalmRun) -> str:
    head, energy = config.model.head, config.energy
    if isinstance(head, FlowHeadConfig | DiffusionHeadConfig):
        name = "flow-matching loss" if head.kind == "flow" else "hybrid diffusion loss"
        return f"{name} of {head.teacher_draws} teacher draws"
    if isinstance(head, CategoricalHeadConfig):
        return f"cross-entropy of the next patch given its latent in noise, {head.teacher_draws} teacher draws"
    if isinstance(head, AutoregressiveHeadConfig | MixtureHeadConfig):
        return "cross-entropy of the next patch, token by token"
    teacher = "exact teacher" if energy.teacher == "exact" else f"M = {energy.teacher_draws} teacher draws"
    return f"energy loss of S = {energy.draws} draws, {teacher}"


def _optimiser(config: RunConfig) -> str:
    optim, holder = config.optim, config.model.head if isinstance(config, CalmRun) else config.model
    name = f"Muon, rate {optim.matrix_lr:g}, and AdamW" if optim.name == "muon" else "AdamW"
    rows = (
        ""
        if optim.rows_lr is None or not getattr(holder, "grams", 0)
        else f", row-wise Adagrad for n-grams, rate {optim.rows_lr:g}"
    )
    return f"{name}, rate {optim.lr:g}{rows}; {optim.schedule} after {optim.warmup} steps of warm-up"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(_figure(item) for item in value)
    return "not defined (an order is not positive)" if value is None else str(value)


def _corpora(data: DataSettings) -> str:
    if not data.mixture:
        return str(data.path)
    whole = sum(part.weight for part in data.mixture)
    return ", ".join(f"{part.path} ({100 * part.weight / whole:.3g} %)" for part in data.mixture)
