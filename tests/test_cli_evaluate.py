"""`nextvec eval` on run directories of every kind, from text files and from shards, and what it refuses."""

import json
import sys

import pytest
import torch

from nextvec.cli import main
from nextvec.config import (
    AutoencoderConfig,
    AutoencoderRun,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    EnergyHeadConfig,
    TokenLMConfig,
    TokenLMRun,
)
from nextvec.errors import DataError
from nextvec.evaluate.documents import read_documents
from nextvec.rundir import build_model, save_run
from nextvec.scoring.brier import BrierResult
from nextvec.text.shards import TokenShards
from nextvec.text.tokenizer import byte_tokenizer, train_tokenizer

TOKENIZER = byte_tokenizer()
BACKBONE = BackboneConfig(layers=1, width=16, inner=16, heads=2)
AUTOENCODER = AutoencoderConfig(vocab_size=TOKENIZER.vocab_size, patch_size=2, width=8, inner=8, latent=6)
DATA = DataSettings(path="data", context_tokens=16)
RUNS = {
    "autoencoder": AutoencoderRun(data=DATA, model=AUTOENCODER),
    "calm": CalmRun(
        data=DATA,
        model=CalmConfig(autoencoder=AUTOENCODER, backbone=BACKBONE, head=EnergyHeadConfig(noise=4, blocks=1)),
    ),
    "token_lm": TokenLMRun(data=DATA, model=TokenLMConfig(vocab_size=TOKENIZER.vocab_size, backbone=BACKBONE)),
}
TEXTS = [f"def f{i}(x):\n    return {'x + ' * i}{i}\n" for i in range(6)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, config in RUNS.items():
        save_run(folder / name, config, build_model(config, torch.Generator().manual_seed(0)), TOKENIZER)
    with open(folder / "held.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""])
    return folder


def run_cli(monkeypatch, *arguments):
    """Exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["nextvec", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def evaluate(monkeypatch, runs, name, *arguments):
    out = runs / f"{name}.json"
    out.unlink(missing_ok=True)
    code = run_cli(
        monkeypatch, "eval", runs / name, "--data", runs / "held.jsonl", "--json", out, "--device", "cpu", *arguments
    )
    return code, json.loads(out.read_text()) if out.exists() else None


def test_an_autoencoder_is_reconstructed(monkeypatch, runs, capsys):
    code, result = evaluate(monkeypatch, runs, "autoencoder")
    assert code == 0
    assert "brier" not in result
    assert list(result["reconstruction"]["accuracy"]) == [
        "mean",
        "draw",
        "doubled",
        *(f"noise-{c}" for c in (0.1, 0.3, 0.5, 1.0)),
    ]
    assert result["reconstruction"]["tokenizer_hash"] == TOKENIZER.hash
    assert "posterior draw" in capsys.readouterr().out


def test_calm_and_baseline_go_through_one_protocol(monkeypatch, runs, capsys):
    code, calm = evaluate(monkeypatch, runs, "calm", "--draws", "4", "--seed", "3", "--context-tokens", "8")
    assert code == 0
    shown = capsys.readouterr().out
    assert "Brier-4" in shown
    assert "BrierLM  none: " in shown  # untrained: an order is not positive, and it is said
    assert "posterior: mean std" in shown
    assert calm["kind"] == "calm"
    assert calm["brier"]["brier_lm"] is None
    code, baseline = evaluate(
        monkeypatch, runs, "token_lm", "--draws", "4", "--seed", "3", "--context-tokens", "8", "--stride", "2"
    )
    assert code == 0
    assert "reconstruction" not in baseline
    assert baseline["brier"]["protocol"] == calm["brier"]["protocol"]
    assert baseline["brier"]["positions"] == calm["brier"]["positions"]
    assert calm["brier"]["protocol"]["name"] == "documents-8"
    assert calm["brier"]["protocol"]["documents"] == 6
    assert json.loads(json.dumps(BrierResult.from_dict(calm["brier"]).to_dict())) == calm["brier"]


def test_protocols_and_positions_by_name(monkeypatch, runs, tmp_path):
    _, named = evaluate(monkeypatch, runs, "calm", "--protocol", "documents-8")
    _, short = evaluate(monkeypatch, runs, "calm", "--context-tokens", "8")
    assert named["brier"] == short["brier"]
    _, every = evaluate(monkeypatch, runs, "token_lm", "--positions", "every_offset", "--estimator", "exact_tail")
    _, starts = evaluate(monkeypatch, runs, "token_lm", "--estimator", "exact_tail", "--draws", "1")
    assert every["brier"]["protocol"]["positions"] == "every_offset"
    assert every["brier"]["positions"][0] > 3 * starts["brier"]["positions"][0]
    (tmp_path / "long.txt").write_text("def f(x): return x\n" * 120)
    arguments = ["--data", tmp_path / "long.txt", "--protocol", "wikitext103-1024", "--draws", "2"]
    for name in ("calm", "token_lm"):
        code, blocks = evaluate(monkeypatch, runs, name, *arguments, "--stride", "2", "--rows", "1")
        assert code == 0
        assert blocks["brier"]["protocol"]["name"] == "wikitext103-1024"
        assert blocks["brier"]["positions"] == [1022, 1022, 1020, 1020]  # two blocks of 1024 tokens
        assert blocks["brier"]["per_document"]["document"] == [0]


def test_defaults_seed_and_limit(monkeypatch, runs):
    _, first = evaluate(monkeypatch, runs, "token_lm")
    protocol = first["brier"]["protocol"]
    assert (protocol["stride"], protocol["context_tokens"], protocol["seed"]) == (4, 16, 0)
    assert evaluate(monkeypatch, runs, "token_lm")[1] == first
    assert evaluate(monkeypatch, runs, "token_lm", "--seed", "1")[1]["brier"]["brier"] != first["brier"]["brier"]
    limited = evaluate(monkeypatch, runs, "token_lm", "--max-documents", "2", "--estimator", "two_draws")[1]["brier"]
    assert limited["protocol"]["documents"] == 2
    assert limited["protocol"]["estimator"] == "two_draws"
    assert limited["protocol"]["documents_hash"] != protocol["documents_hash"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "3"], "stride must be a multiple of the model's patch size 2; got 3: use 4"),
        (["--context-tokens", "10"], "context-tokens must be a multiple of 4, twice the stride of 2"),
        (["--context-tokens", "0"], "context-tokens must be a multiple of 4"),
        (["--draws", "1"], "draws must be at least 2 per position; got 1"),
        (["--estimator", "exact"], "estimator must be one of all_pairs, two_draws, exact_tail; got 'exact'"),
        (["--estimator", "exact_tail"], "exact_tail needs the probability of each token, and Calm (patch size 2)"),
        (["--positions", "all"], "positions must be one of patch_starts, every_offset; got 'all'"),
        (["--protocol", "wikitext103"], "protocol must be documents-N with N tokens, or one of wikitext103-1024"),
        (["--protocol", "wikitext103-1000"], "wikitext103 has blocks of 1024, 2048, 8192 tokens; got 1000"),
        (["--protocol", "wikitext103-1024"], "blocks of 1024 tokens and the text is shorter than one: got "),
        (["--protocol", "documents-8", "--context-tokens", "8"], "says the context: leave --context-tokens 8 out"),
        (["--max-documents", "0"], "the number of documents must be at least 1; got 0"),
        (["--text-key", "body"], "no key 'body'"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda, mps; got 'tpu'"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(monkeypatch, runs, capsys, arguments, message):
    code, result = evaluate(monkeypatch, runs, "calm", *arguments)
    assert code == 2
    assert result is None
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_text_too_short_or_missing_is_one_sentence(monkeypatch, runs, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    for name, message in [
        ("short.txt", "nothing can be scored: no document is longer than the first patch of 2 tokens"),
        ("empty.txt", "holds no text: there is nothing to evaluate"),
        ("absent.txt", "does not exist"),
    ]:
        assert run_cli(monkeypatch, "eval", runs / "calm", "--data", tmp_path / name, "--device", "cpu") == 2
        assert message in capsys.readouterr().err
    assert run_cli(monkeypatch, "eval", tmp_path, "--data", runs / "held.jsonl") == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_documents_from_shards_equal_those_from_text(monkeypatch, runs, tmp_path, capsys):
    shards = tmp_path / "shards"
    code = run_cli(
        monkeypatch, "prepare", runs / "held.jsonl", "--tokenizer", "bytes", "--out", shards, "--valid-fraction", "0"
    )
    assert code == 0
    capsys.readouterr()
    text = read_documents(str(runs / "held.jsonl"), TOKENIZER)
    assert len(text) == len(TEXTS)
    assert all(ids[-1] == TOKENIZER.eos_id for ids in text)
    stored = read_documents(str(shards / "train"), TOKENIZER)
    assert [ids.tolist() for ids in stored] == [ids.tolist() for ids in text]
    assert TokenShards.open(shards / "train").documents == len(TEXTS)
    assert len(read_documents(str(shards / "train"), TOKENIZER, limit=2)) == 2
    with pytest.raises(DataError, match="holds several splits"):
        read_documents(str(shards), TOKENIZER)
    with pytest.raises(DataError, match="does not match the shards"):
        read_documents(str(shards / "train"), train_tokenizer(TEXTS, 270))
    code, result = (
        run_cli(
            monkeypatch,
            "eval",
            runs / "calm",
            "--data",
            shards / "train",
            "--json",
            tmp_path / "out.json",
            "--device",
            "cpu",
        ),
        json.loads((tmp_path / "out.json").read_text()),
    )
    assert code == 0
    assert result["brier"] == evaluate(monkeypatch, runs, "calm")[1]["brier"]


def test_a_bad_line_is_named(runs, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not valid JSON"):
        read_documents(str(path), TOKENIZER)
