"""Cost accounting: floating-point operations per token of text, part by part, and parameters as the paper counts them.

Multiply-adds count as 2, per token of text (docs/cost.md): dense weights 2 per weight used, attention scores and mixing
4 * layers * D * context, everything of a step divided by K, training = 3 x forward for what is trained. Norms, biases,
activations, softmax and the loss are not counted. Two columns: `published`, the head as the paper's cost has it (the
first linear of a block sees the draw and the state, in every draw), and `split`, ours: the state's half of it runs
once per position. The functions are the same; only the cost differs. Other heads: `evaluate.head_cost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from nextvec.config import (
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    CategoricalHeadConfig,
    MixtureHeadConfig,
    ModelConfig,
    TokenLMConfig,
)
from nextvec.evaluate.head_cost import (
    backbone_operations,
    gram_operations,
    head_cost,
    head_parameters,
    recall_operations,
    text_parameters,
)

PAPER_CONTEXT = 2048  # positions attended: patches for CALM, tokens for the Transformer [P]
PAPER_DRAWS = 8  # S [P]
TRAINED = 3  # forward, and twice that backward: towards the inputs and towards the weights


@dataclass(frozen=True)
class Parts:
    """One figure per part of a model."""

    embedding: float = 0  # a lookup: parameters, no operations
    compressor: float = 0  # K token embeddings, the latent or both -> backbone input
    attention: float = 0  # projections, scores, mixing
    mlp: float = 0
    head: float = 0  # S draws in training; of a token model, recall and n-grams
    autoencoder: float = 0  # without its vocabulary product: decoder at inference, frozen encoder in training
    vocabulary: float = 0  # the product with the (output) embedding
    auxiliary: float = 0  # training only, recipe `fast`

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def scaled(self, factor: float) -> Self:
        return type(self)(**{name: factor * value for name, value in asdict(self).items()})

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Cost:
    """What a model costs. Operations are per token of text; `params` leaves the autoencoder out, as the paper does."""

    name: str
    patch_size: int
    context: int  # positions attended; 0 for a model without attention
    draws: int  # S in training; 0 for a model without a head
    params: int  # with the input embedding, without the autoencoder (unless that is all there is)
    autoencoder_params: int
    parameters: Parts  # per part, the autoencoder's embedding among the autoencoder's
    inference: Parts  # published: unsplit head
    inference_split: Parts
    training: Parts
    training_split: Parts

    def columns(self) -> Mapping[str, Parts]:
        return {
            "inference": self.inference,
            "inference_split": self.inference_split,
            "training": self.training,
            "training_split": self.training_split,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = ("name", "patch_size", "context", "draws", "params", "autoencoder_params")
        return {
            **{name: getattr(self, name) for name in plain},
            "parameters": self.parameters.to_dict(),
            **{name: parts.to_dict() for name, parts in self.columns().items()},
        }

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.params:,} parameters"
            + (f", and {self.autoencoder_params:,} in the autoencoder" if self.autoencoder_params else "")
            + "; operations per token of text"
            + (f", context {self.context:,} positions of {_tokens(self.patch_size)}" if self.context else "")
            + (f", {self.draws} draws in training" if self.draws else ""),
            f"{'part':<12}" + "".join(f"{name:>17}" for name in self.columns()),
        ]
        rows = {name: parts.to_dict() for name, parts in self.columns().items()}
        for part in next(iter(rows.values())):
            if part == "total" or any(row[part] for row in rows.values()):
                lines.append(f"{part:<12}" + "".join(f"{row[part]:>17.4g}" for row in rows.values()))
        return "\n".join(lines)


def cost(config: ModelConfig, name: str | None = None, **settings: Any) -> Cost:
    """`calm_cost`, `token_lm_cost` or `autoencoder_cost`, by the kind of the configuration; settings as theirs."""
    if isinstance(config, CalmConfig):
        return calm_cost(config, name or "CALM", **settings)
    if isinstance(config, TokenLMConfig):
        return token_lm_cost(config, name or "Transformer", **settings)
    return autoencoder_cost(config, name or "autoencoder", **settings)


def token_lm_cost(config: TokenLMConfig, name: str = "Transformer", *, context: int = PAPER_CONTEXT) -> Cost:
    """The token baseline: backbone and the vocabulary product, the input embedding counted in the parameters only.

    `context`: tokens attended. Both columns of the table are equal: there is no head to split. `recall` and `grams` count as one.
    """
    table = config.vocab_size * config.backbone.width
    attention, mlp = backbone_operations(config.backbone, context)
    asked, told = recall_operations(config.recall, config.backbone.width, context)
    read, learnt = gram_operations(config.grams, config.backbone.width)
    forward = Parts(attention=attention, mlp=mlp, head=asked + read, vocabulary=2 * table)
    learning = Parts(attention=attention, mlp=mlp, head=asked + told + read + learnt, vocabulary=2 * table)
    training = learning.scaled(TRAINED)
    parameters = _backbone_parameters(
        config.backbone,
        embedding=table,
        vocabulary=table,
        head=text_parameters(config.recall, config.grams, config.backbone.width),
    )
    return Cost(
        name=name,
        patch_size=1,
        context=context,
        draws=0,
        params=int(parameters.total),
        autoencoder_params=0,
        parameters=parameters,
        inference=forward,
        inference_split=forward,
        training=training,
        training_split=training,
    )


def calm_cost(
    config: CalmConfig,
    name: str = "CALM",
    *,
    context: int = PAPER_CONTEXT,
    draws: int = PAPER_DRAWS,
    candidates: int = 1,
    decoded: int | None = None,
    auxiliary: bool = False,
) -> Cost:
    """CALM: one draw and one decoding per step at inference, S draws and one encoding in training.

    A draw of the flow and diffusion heads takes as many network passes as their solver. The autoregressive head takes
    neither encoding nor decoding, and S does not matter.

    `context`: patches attended; `draws`: S, the model's or, of heads with a solver, the teacher's; `candidates`: draws taken and
    decoded per step at inference (1: plain sampling; N of the batch temperature sampler); `decoded`: of these, where fewer
    are decoded (1 for the mean of their latents, 0 for the means of known Gaussians); `auxiliary`: count the cross-entropy of
    the `fast` recipe in training. A model that reads latents encodes each patch at inference, too.
    """
    K, D, V = config.patch_size, config.backbone.width, config.vocab_size
    attention, mlp = backbone_operations(config.backbone, context)
    tokens, latents = config.input != "latents", config.reads_latents
    read = tokens * K * D + latents * config.autoencoder.latent  # numbers that the compressor reads of a patch
    tables = config.input == "tables"  # their first layer is looked up
    compressor = 2 * (D * D if tables else read * 2 * D + 2 * D * D)
    encoder, decoder = _autoencoder(config.autoencoder)
    reading = encoder if latents else 0
    written = candidates if decoded is None else decoded
    logits = 2 * K * V * config.autoencoder.width
    if isinstance(
        config.head, AutoregressiveHeadConfig | CategoricalHeadConfig | MixtureHeadConfig
    ):  # learns from tokens
        encoder = reading
    if isinstance(config.head, AutoregressiveHeadConfig):  # and draws them
        decoder = logits = draws = 0

    def inference(split: bool) -> Parts:
        head = head_cost(config, split, context)
        return Parts(
            compressor=compressor,
            attention=attention,
            mlp=mlp,
            head=head.once + candidates * head.per_draw,
            autoencoder=reading + written * decoder,
            vocabulary=written * logits + head.vocabulary_once + candidates * head.vocabulary_per_draw,
        ).scaled(1 / K)

    def training(split: bool) -> Parts:
        head = head_cost(config, split, context)
        return Parts(
            compressor=TRAINED * compressor,
            attention=TRAINED * attention,
            mlp=TRAINED * mlp,
            head=TRAINED * (head.trained_once + draws * head.trained_per_draw),
            autoencoder=encoder,  # frozen: forward only; a patch that is input and target is encoded once
            vocabulary=TRAINED * (head.trained_vocabulary + draws * head.trained_vocabulary_per_draw),
            auxiliary=TRAINED * 2 * (D * K * D + K * D * V) if auxiliary else 0,
        ).scaled(1 / K)

    parameters = _backbone_parameters(
        config.backbone,
        embedding=tokens * V * D * (K if tables else 1),
        compressor=(0 if tables else read * 2 * D + 2 * D) + (1 if tables else 2) * D * D + 3 * D,  # biases, LayerNorm
        head=head_parameters(config),
        autoencoder=_autoencoder_parameters(config.autoencoder),
    )
    return Cost(
        name=name,
        patch_size=K,
        context=context,
        draws=draws,
        params=int(parameters.total - parameters.autoencoder),
        autoencoder_params=int(parameters.autoencoder),
        parameters=parameters,
        inference=inference(split=False),
        inference_split=inference(split=True),
        training=training(split=False),
        training_split=training(split=True),
    )


def autoencoder_cost(config: AutoencoderConfig, name: str = "autoencoder") -> Cost:
    """The autoencoder alone: patches read and written back, in training as at inference. It attends to nothing."""
    K = config.patch_size
    encoder, decoder = _autoencoder(config)
    forward = Parts(autoencoder=encoder + decoder, vocabulary=2 * K * config.vocab_size * config.width).scaled(1 / K)
    training = forward.scaled(TRAINED)
    embedding = config.vocab_size * config.width
    parameters = Parts(embedding=embedding, autoencoder=_autoencoder_parameters(config) - embedding)
    return Cost(
        name=name,
        patch_size=K,
        context=0,
        draws=0,
        params=int(parameters.total),
        autoencoder_params=0,
        parameters=parameters,
        inference=forward,
        inference_split=forward,
        training=training,
        training_split=training,
    )


def _backbone_parameters(config: BackboneConfig, **other: float) -> Parts:
    """Each norm counts with the part that it feeds, the final one with the MLP."""
    D, kv = config.width, config.key_value_heads * config.head_dim
    return Parts(
        attention=config.layers * (2 * D * D + 2 * D * kv + D),
        mlp=config.layers * (3 * D * config.inner + D) + D,
        **other,
    )


def _autoencoder(config: AutoencoderConfig) -> tuple[float, float]:
    """Operations of one patch: (encoder, decoder without its vocabulary product)."""
    K, d, parts = config.patch_size, config.width, config.patch_size // config.span
    blocks = config.layers // 2 * (K + parts) * 3 * d * config.inner
    if config.attention:
        blocks += config.layers // 2 * K * (4 * d * d + 2 * d * K)
    outputs = (2 if config.variational else 1) * config.latent
    return 2 * (blocks + K * d * d + d * outputs), 2 * (blocks + config.latent * d + d * K * d)


def _autoencoder_parameters(config: AutoencoderConfig) -> int:
    span, d, L = config.span, config.width, config.span_latent
    blocks = 2 * config.layers * (3 * d * config.inner + d) + config.attention * config.layers * (4 * d * d + d)
    outputs = (2 if config.variational else 1) * L
    encoder = span * d * d + d + d + d * outputs + outputs
    decoder = L * d + d + d * span * d + span * d + d
    return config.vocab_size * d + blocks + encoder + decoder


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count > 1)}"
