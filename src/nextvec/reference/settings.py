"""The published config.json and our configuration, both ways.

What changes the function is checked or mapped; the rest (token ids, the authors' training settings, `ae_path`, which points
at a server of theirs) is kept aside, so that converting back gives the same file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from nextvec.config import (
    HEADS,
    AutoencoderConfig,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    EnergyHeadConfig,
    ImportedRun,
    ModelRun,
    RunConfig,
)
from nextvec.errors import ConfigError, DataError
from nextvec.reference.names import IN_LM, Shape
from nextvec.text.tokenizer import Tokenizer

Kind = Literal["autoencoder", "calm"]
LANGUAGE_MODELS = {"EnergyTransformer": "energy", "FlowTransformer": "flow", "DiffusionTransformer": "diffusion"}
ARCHITECTURES: dict[str, Kind] = {"Autoencoder": "autoencoder", **dict.fromkeys(LANGUAGE_MODELS, "calm")}

# published key -> our field
AUTOENCODER = {
    "vocab_size": "vocab_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "intermediate_size": "inner",
    "num_encoder_layers": "layers",
    "latent_size": "latent",
    "kl_weight": "kl_weight",
    "kl_clamp": "kl_clip",
    "ae_dropout": "latent_dropout",
    "rms_norm_eps": "norm_eps",
}
BACKBONE = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "intermediate_size": "inner",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "rope_theta": "rope_base",
    "rms_norm_eps": "norm_eps",
}
BLOCKS = {"num_mlp_layers": "blocks"}
HEAD = {"energy": {"noise_size": "noise", **BLOCKS}, "flow": BLOCKS, "diffusion": BLOCKS}
DRAWS = {
    "flow": {"solver": "midpoint", "steps": 10},
    "diffusion": {"solver": "ddpm", "steps": 100},
}  # in the authors' code
SHARED = ("vocab_size", "patch_size", "latent_size")  # what a language model and its autoencoder must agree on
MAPPED: dict[Kind, set[str]] = {
    "autoencoder": {"architectures", "num_decoder_layers", *AUTOENCODER},
    "calm": {"architectures", *BACKBONE, *SHARED},
}

# Settings of the format that our layers have only one way of; any other value would be another function.
ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_parameters": None,
}
WRITTEN = {"hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "initializer_range": 0.02}
WRITTEN_CALM = {"attention_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "use_cache": True}


def kind_of(settings: Any, source: str) -> Kind:
    """What `architectures` says. Raises ConfigError for another model altogether."""
    listed = settings.get("architectures") if isinstance(settings, dict) else None
    found = str(listed[0]) if isinstance(listed, list) and listed else None
    if found not in ARCHITECTURES:
        raise ConfigError(
            f"{source} has architecture {found!r}; nextvec converts {', '.join(ARCHITECTURES)}, the published CALM format"
        )
    return ARCHITECTURES[found]


def read_autoencoder(settings: Mapping[str, Any], source: str) -> AutoencoderConfig:
    """Configuration of a published autoencoder. Raises ConfigError."""
    _check_only(settings, source)
    fields = _take(settings, AUTOENCODER, source)
    fields["token_dropout"] = fields["latent_dropout"]  # one rate for both in the authors' code
    if settings.get("num_decoder_layers", fields["layers"]) != fields["layers"]:
        raise ConfigError(
            f"{source}: num_decoder_layers must equal num_encoder_layers {fields['layers']}; "
            f"got {settings['num_decoder_layers']}"
        )
    return AutoencoderConfig.parse(fields, source)


def autoencoder_inside(shapes: Mapping[str, Shape], settings: Mapping[str, Any], source: str) -> AutoencoderConfig:
    """Configuration of the autoencoder inside a language model's file: its config.json says K, L and V, the rest is in
    the shapes. Training settings, which are in neither, take the paper's values. Raises DataError when there is none."""
    embedding = shapes.get(f"{IN_LM}encoder.embed_tokens.weight") or shapes.get(f"{IN_LM}decoder.lm_head_weight")
    gate = shapes.get(f"{IN_LM}encoder.encoder_layers.0.mlp.gate_proj.weight")
    if embedding is None or gate is None or len(embedding) != 2:
        raise DataError(
            f"{source} does not hold its autoencoder: {IN_LM}encoder.embed_tokens.weight or "
            f"{IN_LM}encoder.encoder_layers.0.mlp.gate_proj.weight is missing; give one with --autoencoder"
        )
    layers = [
        int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(IN_LM)}encoder\.encoder_layers\.(\d+)\.", name))
    ]
    shared = _take(settings, {key: AUTOENCODER[key] for key in SHARED}, source)
    return AutoencoderConfig.parse(
        {**shared, "width": embedding[1], "inner": gate[0], "layers": max(layers) + 1}, f"{source}, its autoencoder"
    )


def read_calm(settings: Mapping[str, Any], autoencoder: AutoencoderConfig, source: str, beside: str) -> CalmConfig:
    """Configuration of a published language model, around the autoencoder of `beside`. Raises ConfigError."""
    _check_only(settings, source)
    wanted = _take(settings, {key: AUTOENCODER[key] for key in SHARED}, source)
    if any(getattr(autoencoder, field) != value for field, value in wanted.items()):
        raise ConfigError(
            f"{source} needs an autoencoder of K = {wanted['patch_size']}, L = {wanted['latent']}, V = "
            f"{wanted['vocab_size']}; {beside} has K = {autoencoder.patch_size}, L = {autoencoder.latent}, V = "
            f"{autoencoder.vocab_size}: give the one that it was trained with"
        )
    backbone = BackboneConfig.parse(_take(settings, BACKBONE, source), source)
    if settings.get("head_dim") not in (None, backbone.head_dim):
        raise ConfigError(
            f"{source}: head_dim must be hidden_size / heads = {backbone.head_dim}; got {settings['head_dim']}"
        )
    kind = LANGUAGE_MODELS[settings["architectures"][0]]
    head = HEADS[kind].parse({**_take(settings, HEAD[kind], source), **DRAWS.get(kind, {})}, source)
    return CalmConfig(autoencoder=autoencoder, backbone=backbone, head=head)


def kept_aside(settings: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The published keys that our configuration has no field for."""
    head = HEAD[LANGUAGE_MODELS[settings["architectures"][0]]] if kind == "calm" else {}
    return {key: value for key, value in settings.items() if key not in MAPPED[kind] and key not in head}


def published_settings(config: ModelRun, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The config.json of a run: what was kept aside when it was converted, or the authors' usual values."""
    model = config.model
    if isinstance(model, CalmConfig):
        mapped = {key: getattr(model.backbone, field) for key, field in BACKBONE.items()}
        mapped |= {key: getattr(model.head, field) for key, field in HEAD[model.head.kind].items()}
        mapped |= {key: getattr(model.autoencoder, AUTOENCODER[key]) for key in SHARED}
        mapped["num_key_value_heads"] = model.backbone.key_value_heads
        mapped["architectures"] = [name for name, head in LANGUAGE_MODELS.items() if head == model.head.kind]
    else:
        assert isinstance(model, AutoencoderConfig)
        mapped = {key: getattr(model, field) for key, field in AUTOENCODER.items()}
        mapped["num_decoder_layers"] = model.layers
        mapped["architectures"] = ["Autoencoder"]
    aside = config.imported.settings if isinstance(config, ImportedRun) else _usual(config, tokenizer)
    return dict(sorted({**aside, **mapped}.items()))


def generation_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The generation_config.json beside it, which repeats the special tokens."""
    repeated = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    return {"_from_model_config": True, **{key: settings[key] for key in repeated if key in settings}}


def _usual(config: ModelRun, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Keys of a run that was trained here, for which the authors' code expects a value."""
    assert isinstance(config, RunConfig)
    usual: dict[str, Any] = {**WRITTEN, "tie_word_embeddings": False, "torch_dtype": "float32"}
    usual["max_position_embeddings"] = config.data.context_tokens // config.model.patch_size
    if tokenizer is not None:  # our tokenizers have no begin-of-text token; a document begins after another's end
        usual |= {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if isinstance(config, CalmRun):
        usual |= {**WRITTEN_CALM, "ae_path": None, "beta": config.energy.alpha, "num_samples": config.draws}
        usual |= {"noise_size": EnergyHeadConfig().noise}  # also of the other heads, which draw other noise
    return usual


def _take(settings: Mapping[str, Any], names: Mapping[str, str], source: str) -> dict[str, Any]:
    missing = sorted(names.keys() - settings.keys())
    if missing:
        raise ConfigError(f"{source}: config.json lacks {', '.join(missing)}")
    return {field: settings[key] for key, field in names.items()}


def _check_only(settings: Mapping[str, Any], source: str) -> None:
    for key, value in ONLY.items():
        if settings.get(key, value) != value:
            raise ConfigError(f"{source}: {key} must be {value!r} for nextvec's layers; got {settings[key]!r}")
