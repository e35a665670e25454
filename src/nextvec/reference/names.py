"""Where each published tensor lies in our model: names and layouts, both ways (docs/parity.md).

A published tensor is a block of rows of one of ours (query, key and value share one matrix; so do gate and up), or several of
ours side by side (a head block's first layer, which we keep as its draw half and its state half). So one table serves both
directions, and each tensor can be copied alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nextvec.config import AutoencoderConfig, CalmConfig, DiffusionHeadConfig, EnergyHeadConfig, FlowHeadConfig

Shape = tuple[int, ...]
IN_LM = "ae_model."  # prefix of the autoencoder's tensors in a published language model
OF_OURS = "autoencoder."  # and in our CALM


@dataclass(frozen=True)
class Place:
    """Rows [start, stop) of our tensor `name`; stop None: all rows."""

    name: str
    start: int = 0
    stop: int | None = None

    def shape(self, ours: Mapping[str, Shape]) -> Shape:
        """Shape of these rows, given the shapes of our tensors."""
        rows, *columns = ours[self.name]
        return ((rows if self.stop is None else self.stop) - self.start, *columns)


@dataclass(frozen=True)
class Published:
    """One published tensor: its name, further names under which the same tensor is saved again, and where ours holds it.

    Several places stand side by side: the published tensor is their concatenation along dimension 1.
    """

    name: str
    places: tuple[Place, ...]
    again: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.again)

    def shape(self, ours: Mapping[str, Shape]) -> Shape:
        """Its shape, given the shapes of our tensors."""
        shapes = [place.shape(ours) for place in self.places]
        first = shapes[0]
        return first if len(shapes) == 1 else (first[0], sum(shape[1] for shape in shapes))


def autoencoder_names(config: AutoencoderConfig) -> list[Published]:
    """Every tensor of a published autoencoder."""
    half = config.layers // 2
    table = [
        Published("encoder.embed_tokens.weight", (Place("embedding.weight"),), ("decoder.lm_head_weight",)),
        *_linear("encoder.squeeze_layer", "squeeze"),
        _same("encoder.norm.weight", "encoder_norm.weight"),
        *_linear("encoder.hidden_to_latent", "to_latent"),
        *_linear("decoder.latent_to_hidden", "from_latent"),
        *_linear("decoder.expand_layer", "expand"),
        _same("decoder.norm.weight", "decoder_norm.weight"),
    ]
    for side, before, after in (("encoder", "token", "patch"), ("decoder", "patch", "token")):
        for layer in range(config.layers):
            theirs = f"{side}.{side}_layers.{layer}"
            ours = f"{before if layer < half else after}_{side}.{layer % half}"
            table.append(_same(f"{theirs}.layernorm.weight", f"{ours}.norm.weight"))
            table += _swiglu(f"{theirs}.mlp", f"{ours}.mlp", config.inner)
    return table


def calm_names(config: CalmConfig, autoencoder: bool = True) -> list[Published]:
    """Every tensor of a published language model, with or without the autoencoder in it."""
    table = [_same("transformer.embed_tokens.weight", "compressor.embedding.weight")]
    for layer in (0, 2, 3):
        table += _linear(f"embed_proj.{layer}", f"compressor.project.{layer}")
    table += _backbone(config)
    if isinstance(config.head, EnergyHeadConfig):
        table += [_again(tensor) for tensor in _energy_head(config.head)]
    elif isinstance(config.head, FlowHeadConfig | DiffusionHeadConfig):
        table += _adaln_head(config.head.blocks)
    if autoencoder:
        table += [_inside(tensor) for tensor in autoencoder_names(config.autoencoder)]
    return table


def inside_lm(table: list[Published]) -> list[Published]:
    """The autoencoder's tensors under their own published names, placed in our CALM."""
    return [replace(tensor, places=_moved(tensor)) for tensor in table]


def _backbone(config: CalmConfig) -> list[Published]:
    backbone = config.backbone
    query, key = backbone.heads * backbone.head_dim, backbone.key_value_heads * backbone.head_dim
    table = [_same("transformer.norm.weight", "backbone.norm.weight")]
    for layer in range(backbone.layers):
        theirs, ours = f"transformer.layers.{layer}", f"backbone.blocks.{layer}"
        rows = {"q_proj": query, "k_proj": key, "v_proj": key}
        table += [
            _same(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight"),
            *_stacked(f"{theirs}.self_attn", rows, f"{ours}.attention.qkv.weight"),
            _same(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight"),
            _same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight"),
            *_swiglu(f"{theirs}.mlp", f"{ours}.mlp", backbone.inner),
        ]
    return table


def _energy_head(config: EnergyHeadConfig) -> list[Published]:
    table = []
    for theirs, ours in (
        ("noise_embd", "noise_in"),
        ("norm_noise", "noise_norm"),
        ("hidden_embd", "state_in"),
        ("norm_hidden", "state_norm"),
        ("final_layer.in_ln", "norm"),
        ("final_layer.linears.0", "out_in"),
        ("final_layer.linears.2", "out"),
    ):
        table += _linear(f"mlp_generator.{theirs}", f"head.{ours}")
    for block in range(config.blocks):
        theirs, ours = f"mlp_generator.mlp_blocks.{block}", f"head.blocks.{block}"
        halves = (Place(f"{ours}.from_draw.weight"), Place(f"{ours}.from_state.weight"))
        table += [
            *_linear(f"{theirs}.in_ln", f"{ours}.norm"),
            Published(f"{theirs}.linears.0.weight", halves),
            _same(f"{theirs}.linears.0.bias", f"{ours}.from_draw.bias"),
            *_linear(f"{theirs}.linears.2", f"{ours}.middle"),
            *_linear(f"{theirs}.linears.4", f"{ours}.gate_up"),
            *_linear(f"{theirs}.down_proj", f"{ours}.down"),
        ]
    return table


def _adaln_head(blocks: int) -> list[Published]:
    """The network of the flow and diffusion heads."""
    theirs, ours = "generative_head.net", "head.net"
    parts = {
        "time_embed.mlp.0": "time_in",
        "time_embed.mlp.2": "time_out",
        "cond_embed": "state_in",
        "input_proj": "latent_in",
        "final_layer.linear": "out",
        "final_layer.adaLN_modulation.1": "modulation",
    }
    for block in range(blocks):
        for name, part in (
            ("in_ln", "norm"),
            ("mlp.0", "first"),
            ("mlp.2", "second"),
            ("adaLN_modulation.1", "modulation"),
        ):
            parts[f"res_blocks.{block}.{name}"] = f"blocks.{block}.{part}"
    return [tensor for name, part in parts.items() for tensor in _linear(f"{theirs}.{name}", f"{ours}.{part}")]


def _same(theirs: str, ours: str) -> Published:
    return Published(theirs, (Place(ours),))


def _linear(theirs: str, ours: str) -> list[Published]:
    """Weight and bias."""
    return [_same(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def _stacked(theirs: str, rows: Mapping[str, int], ours: str) -> list[Published]:
    """Published matrices that are one matrix here, one above the other."""
    table, start = [], 0
    for name, count in rows.items():
        table.append(Published(f"{theirs}.{name}.weight", (Place(ours, start, start + count),)))
        start += count
    return table


def _swiglu(theirs: str, ours: str, inner: int) -> list[Published]:
    fused = _stacked(theirs, {"gate_proj": inner, "up_proj": inner}, f"{ours}.gate_up.weight")
    return [*fused, _same(f"{theirs}.down_proj.weight", f"{ours}.down.weight")]


def _again(tensor: Published) -> Published:
    """The head is saved twice, under its own name and as the model's generative head."""
    return replace(tensor, again=(tensor.name.replace("mlp_generator.", "generative_head.", 1),))


def _inside(tensor: Published) -> Published:
    names = tuple(IN_LM + name for name in tensor.again)
    return Published(IN_LM + tensor.name, _moved(tensor), names)


def _moved(tensor: Published) -> tuple[Place, ...]:
    return tuple(replace(place, name=OF_OURS + place.name) for place in tensor.places)
