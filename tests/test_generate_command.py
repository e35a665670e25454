"""`nextvec generate` and `nextvec show`: what is printed and written, and mistakes in one sentence."""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path

import pytest
import torch

from nextvec import cli
from nextvec.cli.generate import generate as verb
from nextvec.config import AutoencoderRun, CalmRun, DataSettings, TokenLMConfig, TokenLMRun
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import save_run
from nextvec.sampling.engine import Engine
from nextvec.sampling.explain import latent_patches, next_patch
from nextvec.sampling.generate import generate_texts
from nextvec.sampling.settings import Sampling
from sampling_models import BACKBONE, EOS, PAD, TOKENIZER, VOCAB, calm, calm_config, spread, token_lm


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = DataSettings(path="unused")
    config = calm_config(3)
    autoencoder = Autoencoder(config.autoencoder)
    spread(autoencoder)
    save_run(folder / "ae", AutoencoderRun(data=data, model=config.autoencoder), autoencoder, TOKENIZER)
    save_run(folder / "calm", CalmRun(data=data, model=config), calm(3, torch.float32), TOKENIZER)
    token_config = TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE)
    save_run(folder / "tokens", TokenLMRun(data=data, model=token_config), token_lm(torch.float32), TOKENIZER)
    (folder / "empty.txt").write_text("\n \n", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n', encoding="utf-8")
    (folder / "other.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object, verb: str = "generate") -> int:
    monkeypatch.setattr("sys.argv", ["nextvec", verb, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("kind", ["calm", "tokens"])
def test_the_command_prints_the_prompt_and_its_continuation(
    kind: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (Calm if kind == "calm" else TokenLM).from_pretrained(runs / kind)
    options = ["--prompt", "né", "--candidates", 8, "--max-tokens", 12, "--seed", 4, "--device", "cpu"]
    assert command(monkeypatch, runs / kind, *options) == 0
    pieces = list(model.stream("né", candidates=8, max_tokens=12, seed=4))  # the same default temperature
    assert capsys.readouterr().out == "né" + "".join(pieces) + "\n"

    assert command(monkeypatch, runs / kind, *options, "--show-patches") == 0
    prompt = ["né"] if kind == "calm" else ["n", "", "é"]  # n and the two bytes of é fill one patch of three
    assert capsys.readouterr().out == "│".join([*prompt, *pieces]) + "\n"


def test_a_rest_of_the_prompt_is_shown_in_the_patch_that_it_begins(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "abcde", "--candidates", 8, "--max-tokens", 7, "--device", "cpu", "--show-patches"]
    assert command(monkeypatch, runs / "calm", *options) == 0
    pieces = list(Calm.from_pretrained(runs / "calm").stream("abcde", candidates=8, max_tokens=7))
    assert capsys.readouterr().out == "│".join(["abc", "de" + pieces[0], *pieces[1:]]) + "\n"


def test_a_terminal_without_unicode_gets_question_marks(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert command(monkeypatch, runs / "calm", "--prompt", "é", "--candidates", 4, "--max-tokens", 3) == 0
    assert written.getvalue().startswith(b"?")
    assert written.getvalue().endswith(b"\n")


def test_the_commands_defaults_are_those_of_the_api(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = inspect.signature(verb).parameters
    for name in ("temperature", "max_tokens", "seed"):
        assert options[name].default == getattr(Sampling(), name)
    for method, candidates in (("pool", 200), ("centre", 8)):
        asked = ["--prompt", "go", "--max-tokens", 9, "--method", method]
        told = []
        for more in ([], ["--candidates", candidates]):
            assert command(monkeypatch, runs / "calm", *asked, *more) == 0
            told.append(capsys.readouterr().out)
        assert told[0] == told[1]


def test_text_beyond_the_context_of_training_is_told(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, runs / "tokens", "--prompt", "abc", "--max-tokens", 2) == 0
    assert capsys.readouterr().err == ""
    assert command(monkeypatch, runs / "tokens", "--prompt", "abc", "--max-tokens", 1022, "--temperature", 1) == 0
    assert "make 1,025 tokens; the model was trained on 1,024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["calm", "--temperature", 0], "temperature must be in (0, 1]; got 0: "),
        (["calm", "--temperature", 1.5], "temperature must be in (0, 1]; got 1.5: "),
        (["calm", "--temperature", 0.1, "--candidates", 9], "temperature 0.1 needs at least 10 candidates"),
        (["calm", "--max-tokens", 0], "max_tokens must be at least 1; got 0"),
        (["calm", "--max-tokens", 10**8], "max_tokens must be at most 1,000,000; got 100,000,000: memory holds"),
        (["calm", "--candidates", 10**11], "candidates must be at most 100,000; got 100,000,000,000: memory holds"),
        (["calm", "--device", "tpu"], "device must be one of auto, cpu, cuda, mps; got 'tpu'"),
        (["calm", "--top-k", 5], "top_k changes the law of the next token, which method pool does not look at"),
        (["calm", "--top-p", 0.5], "top_p changes the law of the next token, which method pool does not look at"),
        (["tokens", "--top-p", 0], "top_p must be in (0, 1]; got 0"),
        (["tokens", "--top-k", 0], "top_k must be at least 1; got 0"),
        (["calm", "--method", "mean"], "method must be one of auto, pool, centre, token; got 'mean'"),
        (["tokens", "--method", "centre"], "method centre averages latents, which this model does not draw"),
        (["calm", "--stop", ""], "stop must be a list of texts, none of them empty"),
        (["calm", "-n", 0], "samples must be between 1 and 100,000; got 0"),
        (["calm", "-n", 10**9], "samples must be between 1 and 100,000; got 1,000,000,000"),
        (
            ["calm", "--prompt", "x" * 1025],
            "a prompt has 1,025 tokens, and the model was trained to read 1,024: shorten",
        ),
        (["calm", "--precision", "fp8"], "precision must be fp32 or bf16; got 'fp8'"),
        (["calm", "--show-patches", "-n", 2], "--show-patches is for one text"),
        (["calm", "--prompts", "x", "--prompt", "y"], "give --prompt or --prompts, not both"),
        (["calm", "--prompts", "{}/none.txt"], "none.txt does not exist"),
        (["calm", "--prompts", "{}/empty.txt"], "empty.txt holds no prompts: write one on each line"),
        (["calm", "--prompts", "{}/latin.txt"], "latin.txt cannot be read: 'utf-8' codec can't decode"),
        (["calm", "--prompts", "{}/broken.jsonl"], "broken.jsonl line 2 is not JSON"),
        (["calm", "--prompts", "{}/other.jsonl"], 'other.jsonl line 1 must be an object with a text "prompt"'),
        (["calm", "--jsonl", "{}/no/such.jsonl"], "such.jsonl cannot be written: there is no folder"),
        (["ae"], "is an autoencoder, which has no next patch to draw: give the run of a calm or token_lm"),
        (["missing"], "is not a run directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_two(
    arguments: list[object],
    sentence: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(word).replace("{}", str(runs)) for word in arguments[1:]]
    assert command(monkeypatch, runs / str(arguments[0]), *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nextvec: ")
    assert sentence in printed.err
    assert printed.err.count("\n") == 1


def test_prompts_of_a_file_come_back_as_json_lines_in_their_order(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["go on", "", "naïve — 東", "x" * 40]
    lines = "\n".join(json.dumps({"prompt": prompt, "id": 3}) for prompt in prompts)
    (tmp_path / "in.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    options = ["--candidates", 8, "--max-tokens", 20, "--seed", 4, "-n", 2, "--stop", "e", "--stop", "zz"]
    arguments = ["--prompts", tmp_path / "in.jsonl", "--jsonl", tmp_path / "out.jsonl", *options]
    assert command(monkeypatch, runs / "calm", *arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = Sampling(candidates=8, max_tokens=20, seed=4)
    texts = generate_texts(Calm.from_pretrained(runs / "calm"), prompts, settings, samples=2, stop=["e", "zz"])
    assert [row["text"] for row in rows] == texts
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(4) for s in range(2)]
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(2)]
    assert {row["finish"] for row in rows} <= {"stop", "length", "eos"}
    assert all((row["tokens"] == 20) == (row["finish"] == "length") or row["finish"] == "stop" for row in rows)
    assert capsys.readouterr().out == ""

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"go on\r\n\nand on")))
    assert command(monkeypatch, runs / "calm", "--prompts", "-", "--jsonl", "-", *options[:6]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in printed] == ["go on", "and on"]


def test_many_texts_are_printed_as_they_end(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "go", "--candidates", 8, "--max-tokens", 6]
    assert command(monkeypatch, runs / "calm", *options, "-n", 2) == 0
    texts = generate_texts(Calm.from_pretrained(runs / "calm"), ["go"], Sampling(candidates=8, max_tokens=6), samples=2)
    assert capsys.readouterr().out == f"[1.1, length] go{texts[0]}\n[1.2, length] go{texts[1]}\n"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "calm",
            ["first text after ", " tokens in ", " tokens/s; 24 draws for 3 patches; ", " of 3 pools unanimous, "],
        ),
        ("tokens", ["7 tokens in ", "; 7 draws for 7 patches"]),
    ],
)
def test_stats_tell_speed_draws_and_agreement(
    kind: str, words: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "abc", "--candidates", 8, "--max-tokens", 7, "--stats", "--seed", 1]
    assert command(monkeypatch, runs / kind, *options) == 0
    told = capsys.readouterr().err
    for word in words:
        assert word in told
    assert ("pools" in told) == (kind == "calm")


def test_options_of_the_engine_and_of_the_baseline_reach_them(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []

    class Watched(Engine):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            self.options = options
            made.append(self)

    monkeypatch.setattr("nextvec.sampling.generate.Engine", Watched)
    options = ["--max-tokens", 4, "--slide", "--deterministic", "--prompt", "x" * 1200, "--precision", "bf16"]
    assert command(monkeypatch, runs / "tokens", *options, "--top-k", 3, "--top-p", 0.9) == 0
    assert made[0].options["slide"] is made[0].options["deterministic"] is True
    assert made[0].options["capacity"] == 1024
    assert made[0]._model.output.weight.dtype == torch.bfloat16


# --- show


def test_show_prints_patches_latents_and_the_vote(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--text", "abcdef\ng", "--candidates", 30, "--top", 2]
    assert command(monkeypatch, runs / "calm", *options, verb="show") == 0
    lines = capsys.readouterr().out.splitlines()
    model = Calm.from_pretrained(runs / "calm")
    ids = TOKENIZER.encode("abcdef\ng")
    patches = latent_patches(model.autoencoder, ids)
    assert [patch.ids for patch in patches] == [tuple(ids[:3]), tuple(ids[3:6])]
    assert "│abc│" in lines[1]
    assert f"{patches[1].sigma:.3f}" in lines[2]
    right = sum(a == b for patch in patches for a, b in zip(patch.ids, patch.decoded, strict=True))
    assert lines[3] == f"{right} of 6 tokens come back from the mean of their latent"
    assert lines[4].endswith("│\\ng│: 2 of the 3 tokens of the next patch")
    assert lines[5].startswith(
        "next patch: 30 draws after the text with pads on its left, since no draw begins with the rest, "
    )
    assert lines[6].split() == ["votes", "chosen", "at", "T", "=", "0.5"]
    assert len(lines) <= 10


def test_the_vote_is_that_of_generation() -> None:
    model = calm(3)
    for length in (6, 7, 8):
        ids = TOKENIZER.encode("abcdefgh")[:length]
        vote = next_patch(model, ids, 0.5, 40, 7, eos_id=EOS, pad_id=PAD)
        one = Engine(model, eos_id=EOS, pad_id=PAD, slots=1, capacity=9)
        one.add(ids, Sampling(0.5, 40, 3, seed=7))
        event = one.step()[0]
        assert event.pool.copies is not None
        assert vote.kept == int((event.pool.copies > 0).sum())
        assert len(vote.candidates) == event.pool.unique
        assert sum(candidate.votes for candidate in vote.candidates) == vote.kept
        assert sum(candidate.probability for candidate in vote.candidates) == pytest.approx(1)
        assert [c.probability for c in vote.candidates] == sorted(
            (c.probability for c in vote.candidates), reverse=True
        )
        assert event.pool.patch[event.pool.given :] in {candidate.ids for candidate in vote.candidates}
        assert 0 <= vote.matched <= length % 3


def test_show_of_an_autoencoder_and_of_a_short_text(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, runs / "ae", "--text", "abcdef", verb="show") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # no vote
    assert command(monkeypatch, runs / "calm", "--text", "", verb="show") == 0
    assert capsys.readouterr().out.startswith("next patch: 200 draws, ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tokens"], "is a token baseline, which has no latents: give the run of a calm or an autoencoder"),
        (["missing"], "is not a run directory"),
        (["calm", "--temperature", 2], "temperature must be in (0, 1]; got 2"),
        (["calm", "--candidates", 1], "temperature 0.5 needs at least 2 candidates"),
        (["calm", "--top", 0], "top must be at least 1; got 0"),
        (["calm", "--text", "a\udcff"], "the text must be valid Unicode"),
    ],
)
def test_mistakes_of_show_are_one_sentence(
    arguments: list[object],
    sentence: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, runs / str(arguments[0]), "--text", "abc", *arguments[1:], verb="show") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
