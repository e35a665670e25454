"""nextvec convert: published checkpoints to run directories and back, bit for bit, in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextvec.config import (
    AutoencoderConfig,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    DiffusionHeadConfig,
    EnergyHeadConfig,
    FlowHeadConfig,
    HeadKind,
    ImportedCalm,
    TokenLMConfig,
    TokenLMRun,
)
from nextvec.errors import ConfigError, DataError, UserError
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.reference.convert import convert, convert_back
from nextvec.reference.names import autoencoder_names, calm_names
from nextvec.rundir import build_model, load_autoencoder, load_run, read_config, save_run
from nextvec.text.tokenizer import byte_tokenizer, load_tokenizer
from published import (
    AUTOENCODER,
    BIN,
    ENERGY,
    FIXTURES,
    SAFE,
    checkpoint,
    command,
    published,
    same_bits,
    settings,
    words_tokenizer,
)

# there and back


@pytest.mark.parametrize(
    ("size", "part"),
    [
        *((size, part) for size in ("k4", "k2") for part in ("energy", "autoencoder")),
        ("k4", "flow"),
        ("k4", "diffusion"),
    ],
)
def test_back_to_the_published_format_every_key_is_bit_for_bit_what_it_was(
    tmp_path: Path, size: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / size / part
    assert command(monkeypatch, "convert", str(source), str(tmp_path / "run")) == 0
    assert f"K = {size[1]}, V = 128, from {source}" in capsys.readouterr().out
    assert command(monkeypatch, "convert", str(tmp_path / "run"), str(tmp_path / "back"), "--to", "reference") == 0
    before, after = published(source), published(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    for file in ("config.json", "generation_config.json"):
        assert (source / file).is_file() == (tmp_path / "back" / file).is_file()
        if (source / file).is_file():
            assert json.loads((source / file).read_text()) == json.loads((tmp_path / "back" / file).read_text())
    pointers = {name: tensor.data_ptr() for name, tensor in after.items()}
    for name, tensor in before.items():  # what was one storage is one storage again
        for other in ("generative_head.noise_embd.weight", "decoder.lm_head_weight", "ae_model.decoder.lm_head_weight"):
            if other in before and name != other and before[other].data_ptr() == tensor.data_ptr():
                assert pointers[name] == pointers[other]


def test_every_dtype_is_kept(tmp_path: Path) -> None:
    """A half-precision backbone around a float32 autoencoder; our file is aligned whatever the mixture."""

    def halve(state: dict[str, Tensor]) -> None:
        for name in state:
            if name.startswith("transformer."):
                state[name] = state[name].bfloat16()
            elif "embed_proj" in name:
                state[name] = state[name].half()
            elif "linears.2" in name:
                state[name] = state[name].double()

    source = checkpoint(tmp_path / "source", halve)
    convert(source, tmp_path / "run")
    convert_back(tmp_path / "run", tmp_path / "back")
    before, after = published(Path(source)), published(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    assert {t.dtype for t in load_file(tmp_path / "run" / SAFE).values()} >= {torch.bfloat16, torch.float16}
    assert load_run(tmp_path / "run").model.state_dict()["backbone.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["safetensors", "sharded safetensors", "sharded pickles"])
def test_every_kind_of_file_gives_the_same_run(tmp_path: Path, kind: str) -> None:
    """Shards are cut between query and key and between gate and up; safetensors hold a shared tensor once."""
    state = published(ENERGY)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ENERGY / "config.json", source)
    if kind != "sharded pickles":
        again = [n for n in state if n.startswith("generative_head.")] + ["ae_model.encoder.embed_tokens.weight"]
        for name in again:
            del state[name]
    if kind == "safetensors":
        save_file(state, source / SAFE)
    else:
        base = SAFE if "safe" in kind else BIN
        stem, ending = base.rsplit(".", 1)
        weight_map = {name: f"{stem}-{i % 3}.{ending}" for i, name in enumerate(state)}
        weight_map["generative_head.noise_embd.bias"] = f"{stem}-0.{ending}"
        for file in set(weight_map.values()):
            shard = {name: tensor.clone() for name, tensor in state.items() if weight_map[name] == file}
            save_file(shard, source / file) if ending == "safetensors" else torch.save(shard, source / file)
        (source / f"{base}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(str(source), tmp_path / "run")
    convert(str(ENERGY), tmp_path / "whole")
    ours, whole = load_file(tmp_path / "run" / SAFE), load_file(tmp_path / "whole" / SAFE)
    assert ours.keys() == whole.keys()
    assert all(same_bits(ours[name], whole[name]) for name in whole)
    convert_back(tmp_path / "run", tmp_path / "back")
    assert published(tmp_path / "back").keys() == published(ENERGY).keys()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("layers", "head"),
    [
        (2, EnergyHeadConfig(noise=7, blocks=2)),
        (4, EnergyHeadConfig(noise=7, blocks=1)),
        (2, FlowHeadConfig(blocks=2)),
        (2, DiffusionHeadConfig(blocks=3)),
    ],
)
def test_the_table_covers_our_model_exactly_once(kv_heads: int, layers: int, head: HeadKind) -> None:
    config = CalmConfig(
        autoencoder=AutoencoderConfig(vocab_size=11, width=6, inner=10, latent=5, layers=layers, patch_size=3),
        backbone=BackboneConfig(layers=2, width=16, inner=9, heads=4, kv_heads=kv_heads),
        head=head,
    )
    for model, table in (
        (Calm(config), calm_names(config)),
        (Autoencoder(config.autoencoder), autoencoder_names(config.autoencoder)),
    ):
        ours = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        covered = {name: torch.zeros(shape[0]) for name, shape in ours.items()}
        for tensor in table:
            for place in tensor.places:
                covered[place.name][place.start : place.stop] += 1
        assert all(bool((rows == 1).all()) for rows in covered.values())
        assert sum(torch.Size(t.shape(ours)).numel() for t in table) == sum(p.numel() for p in model.parameters())
        names = [name for tensor in table for name in tensor.names]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "head",
    [EnergyHeadConfig(noise=4, blocks=1), FlowHeadConfig(blocks=1), DiffusionHeadConfig(blocks=1)],
    ids=lambda head: head.kind,
)
def test_a_run_trained_here_goes_to_the_published_format_and_back(tmp_path: Path, head: HeadKind) -> None:
    tokenizer = byte_tokenizer()
    config = CalmRun(
        data=DataSettings(path="shards", context_tokens=64),
        model=CalmConfig(
            autoencoder=AutoencoderConfig(vocab_size=259, width=8, inner=12, latent=6),
            backbone=BackboneConfig(layers=1, width=8, inner=12, heads=2),
            head=head,
        ),
    )
    model = build_model(config, torch.Generator().manual_seed(0))
    save_run(tmp_path / "trained", config, model, tokenizer)
    convert_back(tmp_path / "trained", tmp_path / "reference")
    written = settings(tmp_path / "reference")
    assert set(settings(ENERGY)) - set(written) == {"transformers_version"}
    assert written["max_position_embeddings"] == 16
    assert written["num_key_value_heads"] == 2
    assert (written["eos_token_id"], written["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    convert(str(tmp_path / "reference"), tmp_path / "again")
    run = load_run(tmp_path / "again")
    assert run.text_tokenizer.hash == tokenizer.hash
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(DataError, match="exists already; give a new directory"):
        convert_back(tmp_path / "trained", tmp_path / "reference")
    (tmp_path / "trained" / SAFE).unlink()
    with pytest.raises(DataError, match="the run was not finished"):
        convert_back(tmp_path / "trained", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is not a run directory"):
        convert_back(ENERGY, tmp_path / "elsewhere")


def test_a_baseline_has_no_published_format(tmp_path: Path) -> None:
    model = TokenLMConfig(vocab_size=259, backbone=BackboneConfig(layers=1, width=8, inner=12, heads=2))
    config = TokenLMRun(data=DataSettings(path="shards"), model=model)
    save_run(tmp_path / "run", config, build_model(config, torch.Generator().manual_seed(0)), byte_tokenizer())
    with pytest.raises(ConfigError, match="is a token_lm; the published format is for an autoencoder and CALM"):
        convert_back(tmp_path / "run", tmp_path / "back")


# tokenizer


def test_without_a_tokenizer_all_but_text_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert command(monkeypatch, "convert", str(ENERGY), str(run)) == 0
    assert (
        f"{ENERGY} has no tokenizer.json: to read or write text, convert again with --tokenizer"
        in capsys.readouterr().out
    )
    model = Calm.from_pretrained(run)
    assert model.tokenizer is None
    assert model.draw_tokens(model.states(torch.zeros(1, 2, 4, dtype=torch.int64)), 3).shape == (3, 1, 2, 4)
    with pytest.raises(UserError, match="this model has no tokenizer"):
        next(iter(model.stream("a")))
    (tmp_path / "text.txt").write_text("some text")
    for words in (["generate", str(run), "--prompt", "a"], ["eval", str(run), "--data", str(tmp_path / "text.txt")]):
        assert command(monkeypatch, *words) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(f"nextvec: {run} has no tokenizer.json, which text needs: convert it again with")
        assert len(told.err.splitlines()) == 1
    with pytest.raises(DataError, match=r"has no tokenizer.json, which text needs"):
        load_autoencoder(run)


def test_the_tokenizer_is_taken_along_or_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source")
    file = words_tokenizer(tmp_path / "source")
    given = words_tokenizer(tmp_path / "other")
    for name, done in (
        ("along", convert(source, tmp_path / "along")),
        ("given", convert(str(ENERGY), tmp_path / "given", tokenizer=given)),
    ):
        assert done.has_tokenizer
        assert load_run(tmp_path / name).text_tokenizer.hash == load_tokenizer(file).hash
    with pytest.raises(
        DataError, match=r"has 259 tokens and the model 128: give the one that the model was trained with"
    ):
        convert(str(ENERGY), tmp_path / "wrong", tokenizer="bytes")
    assert not (tmp_path / "wrong" / SAFE).exists()
    (tmp_path / "text.txt").write_text("w5 w6")
    assert command(monkeypatch, "eval", str(tmp_path / "along"), "--data", str(tmp_path / "text.txt")) == 2
    assert "without the context length of their training: give --context-tokens N" in capsys.readouterr().err
    convert_back(tmp_path / "along", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").hash == load_tokenizer(file).hash


# the autoencoder


def test_another_autoencoder_replaces_the_one_inside(tmp_path: Path) -> None:
    def other(state: dict[str, Tensor]) -> None:
        state["encoder.norm.weight"] = torch.full_like(state["encoder.norm.weight"], 3.0)

    def without(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("ae_model.")]:
            del state[name]

    beside = checkpoint(tmp_path / "beside", other, AUTOENCODER, kl_weight=0.002)
    alone = checkpoint(tmp_path / "alone", without)
    for name, source in (("both", str(ENERGY)), ("one", alone)):
        done = convert(source, tmp_path / name, autoencoder=beside)
        model = Calm.from_pretrained(tmp_path / name)
        assert bool((model.autoencoder.encoder_norm.weight == 3.0).all())
        assert model.config.autoencoder.kl_weight == 0.002  # known only from its own config.json
        assert done.config.imported.autoencoder == beside
    with pytest.raises(DataError, match=r"does not hold its autoencoder: .* give one with --autoencoder"):
        convert(alone, tmp_path / "none")


def test_autoencoders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        convert(str(ENERGY), tmp_path / "run", autoencoder=str(FIXTURES / "k2" / "autoencoder"))
    assert "needs an autoencoder of K = 4, L = 32, V = 128; " in str(told.value)
    assert "has K = 2, L = 12, V = 128: give the one that it was trained with" in str(told.value)
    longer = checkpoint(tmp_path / "longer", None, AUTOENCODER, latent_size=16)
    with pytest.raises(ConfigError, match="has K = 4, L = 16, V = 128"):
        convert(str(ENERGY), tmp_path / "run", autoencoder=longer)
    with pytest.raises(ConfigError, match="is a language model; give a published Autoencoder"):
        convert(str(ENERGY), tmp_path / "run", autoencoder=str(ENERGY))
    with pytest.raises(ConfigError, match=r"--autoencoder is for a language model, and .* is an autoencoder itself"):
        convert(str(AUTOENCODER), tmp_path / "run", autoencoder=str(AUTOENCODER))
    other_k = checkpoint(tmp_path / "other_k", patch_size=2)
    with pytest.raises(DataError, match=r"has shape \(.*\), its config needs \("):
        convert(other_k, tmp_path / "run")
    assert not (tmp_path / "run" / SAFE).exists()


# where it comes from


def test_provenance_is_kept_and_ae_path_ignored(tmp_path: Path) -> None:
    convert(str(ENERGY), tmp_path / "run")
    config = read_config(tmp_path / "run")
    assert isinstance(config, ImportedCalm)
    assert config.imported.source == str(ENERGY)
    assert config.imported.settings["ae_path"] == "/path/on/a/training/server/autoencoder"
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"| source | {ENERGY} |" in card
    assert "keep the licence of their source" in card
    with safe_open(tmp_path / "run" / SAFE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


class Hub:
    """Stands for huggingface_hub.snapshot_download: copies what the patterns match out of a folder."""

    def __init__(self, cache: Path, source: Path) -> None:
        self.folder, self.source = cache / "0123abc", source
        self.calls: list[tuple[str, list[str], str | None]] = []

    def __call__(self, repo_id: str, *, allow_patterns: list[str], revision: str | None) -> str:
        self.calls.append((repo_id, allow_patterns, revision))
        self.folder.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in self.source.glob(pattern):
                shutil.copy(file, self.folder)
        return str(self.folder)


def test_a_hub_id_is_fetched_settings_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, ENERGY)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    done = convert("owner/CALM-M", tmp_path / "run")
    assert done.config.imported.source == "owner/CALM-M"
    assert done.config.imported.revision == "0123abc"
    assert hub.calls == [
        ("owner/CALM-M", ["*.json"], None),
        ("owner/CALM-M", ["model*.safetensors"], "0123abc"),
        ("owner/CALM-M", ["pytorch_model*.bin"], "0123abc"),
    ]
    assert "| source | owner/CALM-M, revision 0123abc |" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    other = Path(checkpoint(tmp_path / "other", architectures=["LlamaForCausalLM"]))
    strange = Hub(tmp_path / "run", other)
    monkeypatch.setattr("huggingface_hub.snapshot_download", strange)
    with pytest.raises(ConfigError, match="owner/other has architecture 'LlamaForCausalLM'"):
        convert("owner/other", tmp_path / "strange")
    assert [patterns for _, patterns, _ in strange.calls] == [["*.json"]]  # gigabytes were not fetched for nothing


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(DataError) as told:
        convert("owner/name", tmp_path / "run")
    assert str(told.value) == (
        "owner/name is no directory here and could not be fetched from the Hugging Face hub: no route to host"
    )


# memory

MEASURE = """
import resource, sys
from pathlib import Path
import psutil
from nextvec.reference.convert import convert, convert_back

def peak():
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss begins with what the parent process held when this one was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

direction, source, destination, tiny = sys.argv[1:]
convert(tiny, Path(destination) / "tiny")  # imports what a conversion imports
convert_back(Path(destination) / "tiny", Path(destination) / "tiny-back")
before = psutil.Process().memory_info().rss
(convert if direction == "there" else convert_back)(source, Path(destination))
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_stays_below_the_largest_file_and_a_third(tmp_path: Path) -> None:
    """About 200 MB, whole and in four shards, and back. Mapped pages of the files count."""
    config = CalmConfig(
        autoencoder=AutoencoderConfig(vocab_size=4096, width=512, inner=1280, latent=128),
        backbone=BackboneConfig(layers=8, width=640, inner=1664, heads=10),
        head=EnergyHeadConfig(blocks=2),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in Calm(config).state_dict().items()}
    state: dict[str, Tensor] = {}
    for tensor in calm_names(config):
        value = torch.rand(tensor.shape(ours), generator=generator)
        state |= dict.fromkeys(tensor.names, value)
    values = {
        "hidden_size": 640, "intermediate_size": 1664, "num_hidden_layers": 8, "num_attention_heads": 10,
        "num_key_value_heads": 10, "num_mlp_layers": 2, "noise_size": 64, "latent_size": 128, "vocab_size": 4096,
    }  # fmt: skip
    for folder in ("whole", "shards"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({**settings(ENERGY), **values}))
    torch.save(state, tmp_path / "whole" / BIN)
    names = list(state)
    weight_map = {name: f"pytorch_model-{i * 4 // len(names)}.bin" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        part = {name: state[name].clone() for name in names if weight_map[name] == shard}
        torch.save(part, tmp_path / "shards" / shard)
    (tmp_path / "shards" / f"{BIN}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def measured(direction: str, source: str, destination: str) -> float:
        paths = (tmp_path / source, tmp_path / destination, ENERGY)
        words = [sys.executable, "-c", MEASURE, direction, *map(str, paths)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    size = (tmp_path / "whole" / BIN).stat().st_size
    shard = max(file.stat().st_size for file in (tmp_path / "shards").glob("*.bin"))
    assert size > 180e6
    for direction, source, destination, largest in (
        ("there", "whole", "run", size),
        ("there", "shards", "run-of-shards", shard),
        ("back", "run", "back", size),
    ):
        used = measured(direction, source, destination)
        print(f"{source} to {destination}: {used / largest:.2f} of the largest file")
        assert used < 1.3 * largest
    assert (tmp_path / "run" / SAFE).read_bytes() == (tmp_path / "run-of-shards" / SAFE).read_bytes()
