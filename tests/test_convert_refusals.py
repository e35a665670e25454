"""nextvec convert: what is missing, foreign, damaged or hostile is refused in one sentence, and no model is left behind."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nextvec.config import (
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    FlowHeadConfig,
)
from nextvec.errors import ConfigError, DataError
from nextvec.reference.convert import convert, convert_back
from nextvec.rundir import build_model, save_run
from nextvec.text.tokenizer import byte_tokenizer
from published import AUTOENCODER, BIN, ENERGY, FIXTURES, SAFE, checkpoint, command, published

# what is not what it should be


def test_missing_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["transformer.layers.1.self_attn.k_proj.weight"]
        del state["ae_model.decoder.norm.weight"]
        state["transformer.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
        state["extra"] = torch.zeros(1)

    with pytest.raises(DataError) as told:
        convert(checkpoint(tmp_path / "source", change), tmp_path / "run")
    assert str(told.value).endswith(
        "missing transformer.layers.1.self_attn.k_proj.weight, ae_model.decoder.norm.weight; "
        "unknown extra, transformer.layers.2.mlp.up_proj.weight"
    )
    assert not (tmp_path / "run").exists()
    fewer = checkpoint(tmp_path / "fewer", num_hidden_layers=1, num_mlp_layers=1)
    with pytest.raises(
        DataError, match=r"missing nothing; unknown generative_head.mlp_blocks.1.down_proj.bias, .* and 9 more"
    ):
        convert(fewer, tmp_path / "run")
    with pytest.raises(DataError, match=r"embed_proj.2.bias has shape \(31,\), its config needs \(32,\)"):
        convert(
            checkpoint(tmp_path / "shape", lambda s: s.update({"embed_proj.2.bias": torch.zeros(31)})), tmp_path / "run"
        )


def test_a_tensor_saved_twice_must_be_the_same_both_times(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["generative_head.mlp_blocks.1.linears.0.weight"] = changed = state[
            "generative_head.mlp_blocks.1.linears.0.weight"
        ].clone()
        changed[3, 60] += 1e-3

    with pytest.raises(
        DataError, match=r"generative_head.mlp_blocks.1.linears.0.weight is not the same as mlp_generator"
    ):
        convert(checkpoint(tmp_path / "source", change), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_parts_of_one_matrix_must_have_one_dtype(tmp_path: Path) -> None:
    name = "transformer.layers.0.self_attn.q_proj.weight"
    source = checkpoint(tmp_path / "source", lambda state: state.update({name: state[name].half()}))
    with pytest.raises(DataError, match=r"is torch.float(16|32), unlike what is joined with it"):
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "has architecture 'LlamaForCausalLM'; nextvec converts Autoencoder, EnergyTransformer, FlowTransformer, Diff",
        ),
        ({"architectures": None}, "has architecture None; nextvec converts Autoencoder, EnergyTransformer"),
        ({"hidden_size": None, "noise_size": None}, "config.json lacks hidden_size"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling must be None for nextvec's layers; got {'type': 'linear'}",
        ),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' for nextvec's layers; got 'gelu'"),
        ({"head_dim": 16}, "head_dim must be hidden_size / heads = 8; got 16"),
        ({"num_attention_heads": 5}, "heads must divide width 32; got 5, nearest 4"),
        ({"noise_size": "many"}, "noise: Input should be a valid integer"),
    ],
)
def test_settings_of_something_else(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as told:
        convert(checkpoint(tmp_path / "source", **changed), tmp_path / "run")
    assert sentence in str(told.value)
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_whose_sides_differ(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", None, AUTOENCODER, num_decoder_layers=4)
    with pytest.raises(ConfigError, match="num_decoder_layers must equal num_encoder_layers 2; got 4"):
        convert(source, tmp_path / "run")


@pytest.mark.parametrize(("said", "held"), [("flow", "energy"), ("energy", "flow"), ("diffusion", "flow")])
def test_a_config_of_another_head_than_the_file_holds(tmp_path: Path, said: str, held: str) -> None:
    """Flow and diffusion files have the same names; the last layer's shape tells them apart."""
    source = checkpoint(tmp_path / "source", None, FIXTURES / "k4" / held)
    shutil.copy(FIXTURES / "k4" / said / "config.json", source)
    with pytest.raises(DataError, match=r"does not hold the tensors of its config|its config needs"):
        convert(source, tmp_path / "run")


@pytest.mark.parametrize(
    ("own", "what"),
    [
        ({"head": AutoregressiveHeadConfig()}, "the autoregressive head"),
        ({"head": FlowHeadConfig(predicts="latent")}, "a flow head that predicts the latent"),
        ({"input": "both"}, "the input both"),
    ],
)
def test_what_was_never_published_has_no_published_format(tmp_path: Path, own: dict[str, Any], what: str) -> None:
    model = CalmConfig(
        autoencoder=AutoencoderConfig(vocab_size=259, width=8, inner=12, latent=6),
        backbone=BackboneConfig(layers=1, width=8, inner=12, heads=2),
        **own,
    )
    config = CalmRun(data=DataSettings(path="shards"), model=model)
    save_run(tmp_path / "run", config, build_model(config, torch.Generator().manual_seed(0)), byte_tokenizer())
    with pytest.raises(ConfigError, match=f"has {what}, which the published format does not know"):
        convert_back(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# damaged and hostile files


class Evil:
    """Unpickled without care, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "ran")


@pytest.mark.parametrize("zipped", [True, False], ids=["torch's zip", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "source", tmp_path / "harm"
    checkpoint(source)
    state = {**published(ENERGY), "norm": Evil(target)}
    if zipped:
        torch.save(state, source / BIN)
    else:
        (source / BIN).write_bytes(pickle.dumps({"norm": Evil(target)}))
    assert command(monkeypatch, "convert", str(source), str(tmp_path / "run")) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert ("holds more than tensors" if zipped else "or a bare pickle, which could run code") in told
    assert not target.exists()
    assert not (tmp_path / "run").exists()
    if zipped:  # the test's own pickle does what it says
        torch.load(source / BIN, weights_only=False)
        assert target.read_text() == "ran"


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", [BIN, SAFE])
def test_a_truncated_file(tmp_path: Path, name: str, kept: float) -> None:
    source = tmp_path / "source"
    checkpoint(source)
    if name == SAFE:
        save_file({n: t.clone() for n, t in published(source).items()}, source / SAFE)
    whole = (source / name).read_bytes()
    (source / name).write_bytes(whole[: int(kept * len(whole))])
    cut = rf"{name} is damaged or cut off, and cannot be read \([^.]*\); get it again$"
    with pytest.raises(DataError, match="it may be empty" if name == BIN and not kept else cut):
        convert(str(source), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "holds a list, not the named tensors of a checkpoint"),
        ({"state_dict": {"a": torch.zeros(1)}}, "not dense floating-point tensors: state_dict"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "not dense floating-point tensors: a"),
        ({"a": torch.eye(2).to_sparse()}, "not dense floating-point tensors: a"),
    ],
)
def test_a_pickle_of_something_else(tmp_path: Path, content: object, sentence: str) -> None:
    source = tmp_path / "source"
    checkpoint(source)
    torch.save(content, source / BIN)
    with pytest.raises(DataError, match=sentence):
        convert(str(source), tmp_path / "run")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    checkpoint(source)
    (source / BIN).unlink()
    with pytest.raises(DataError, match=r"holds no weights: neither model.safetensors nor pytorch_model.bin"):
        convert(str(source), tmp_path / "run")
    listed = source / f"{BIN}.index.json"
    for content, sentence in (
        ({"weight_map": {"a": "pytorch_model-1.bin"}}, "names shards that are not there: pytorch_model-1.bin"),
        ({"weight_map": {"a": "../other.bin"}}, r"names shards outside its own directory: \.\./other.bin"),
        ({"weights": {}}, "has no weight_map of tensors to shards"),
        ([], "has no weight_map of tensors to shards"),
    ):
        listed.write_text(json.dumps(content))
        with pytest.raises(DataError, match=sentence):
            convert(str(source), tmp_path / "run")
    listed.write_text("{")
    with pytest.raises(DataError, match=r"list of shards .* cannot be read"):
        convert(str(source), tmp_path / "run")
    (source / "config.json").unlink()
    with pytest.raises(DataError, match=r"config .*config.json does not exist"):
        convert(str(source), tmp_path / "run")
    with pytest.raises(DataError, match="is a file: give the directory that holds it"):
        convert(str(ENERGY / BIN), tmp_path / "run")
    with pytest.raises(DataError, match="is no directory here, and no hub id, which is written owner/name"):
        convert(str(tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_exists_is_not_overwritten_and_a_run_is_not_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    convert(str(ENERGY), run)
    before = (run / SAFE).read_bytes()
    with pytest.raises(DataError, match=r"model.safetensors exists already; give a new directory"):
        convert(str(AUTOENCODER), run)
    assert (run / SAFE).read_bytes() == before
    for below in (run / SAFE, run / SAFE / "new"):
        with pytest.raises(DataError, match=r"model.safetensors is a file; give a new directory"):
            convert(str(AUTOENCODER), below)
    with pytest.raises(ConfigError, match="is a run directory already; add --to reference to get the published format"):
        convert(str(run), tmp_path / "other")
    words = ["convert", str(run), str(tmp_path / "back"), "--to", "reference", "--tokenizer", "bytes"]
    assert command(monkeypatch, *words) == 2
    assert "--autoencoder and --tokenizer do not go with --to reference" in capsys.readouterr().err


def test_a_full_disk_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(str(ENERGY), tmp_path / "whole")

    class Full:
        """A file on a disk that fills up."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 50_000

        def write(self, data: Any) -> int:
            self.left -= len(data) if isinstance(data, str) else memoryview(data).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = open
    monkeypatch.setattr("nextvec.files.open", lambda *words, **more: Full(real(*words, **more)), raising=False)
    with pytest.raises(DataError, match=r"the disk is full: .*model.safetensors was not written"):
        convert(str(ENERGY), tmp_path / "run")
    with pytest.raises(DataError, match=r"the disk is full: .*pytorch_model.bin was not written"):
        convert_back(tmp_path / "whole", tmp_path / "back")
    assert not (tmp_path / "run" / SAFE).exists()
    assert not (tmp_path / "back" / BIN).exists()
    assert not list(tmp_path.rglob("*.tmp"))
