"""The benchmarks of sampling run whole on tiny models, and begin where they say in held-out documents."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nextvec.config import AutoencoderConfig, CalmRun, DataSettings, MixtureHeadConfig, TokenLMConfig, TokenLMRun
from nextvec.errors import DataError
from nextvec.evaluate.collision import contexts
from nextvec.model.calm import Calm
from nextvec.rundir import save_run
from nextvec.text.prepare import prepare
from nextvec.text.shards import TokenShards
from sampling_models import BACKBONE, TOKENIZER, VOCAB, calm, calm_config, spread, token_lm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a demo leaves behind, of models that were not trained."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").mkdir()
    for index in range(8):
        (folder / "text" / f"{index}.md").write_text(f"{index} and {index}. " * (5 + 8 * index))
    prepared = prepare([str(folder / "text")], TOKENIZER, folder / "data" / "shards", valid_fraction=0, workers=1)
    prepared.train.rename(folder / "data" / "shards" / "valid")
    data = DataSettings(path="unused")
    save_run(folder / "calm", CalmRun(data=data, model=calm_config(4)), calm(4, torch.float32), TOKENIZER)
    tokens = TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE)
    save_run(folder / "baseline", TokenLMRun(data=data, model=tokens), token_lm(torch.float32), TOKENIZER)
    return folder


def benchmark(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # as where it is run: benchmarks take parts of each other
        return runpy.run_path(str(BENCHMARKS / f"{name}.py"))["main"]


def shards(demo: Path) -> TokenShards:
    return TokenShards.open(demo / "data" / "shards" / "valid")


@pytest.mark.parametrize(("rest", "spare"), [(0, 0), (3, 2)])
def test_places_are_followed_by_their_targets(demo: Path, rest: int, spare: int) -> None:
    documents = [shards(demo).document(index) for index in range(8)]
    texts = [document.tolist() for document in documents]
    found = contexts(documents, 4, 40, 1, longest=100, after=4, rest=rest, spare=spare)
    assert len({place.document for place in found}) == sum(len(text) > 4 * (10 + spare) for text in texts) > 1
    assert len({len(place.ids) for place in found}) > 5
    for place in found:
        text, whole = texts[place.document], len(place.ids) - rest
        assert place.ids + list(place.target) == text[: whole + rest + 4]
        assert len(place.target) == 4
        assert whole % 4 == 0
        assert 32 <= whole < min(100, len(text) - 4 * spare)
    assert found == contexts(documents, 4, 40, 1, longest=100, after=4, rest=rest, spare=spare)
    with pytest.raises(DataError, match="no held-out document is longer than 800 tokens"):
        contexts(documents, 80, 1, 0, longest=2000, after=4)


def test_prompts_that_end_inside_a_patch(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = benchmark("prompt_remainder")
    for name, fewer in (("SAMPLES", 3), ("TIMED", 2), ("DRAWN", 20)):
        monkeypatch.setitem(main.__globals__, name, fewer)
    data = ["--data", str(demo / "data" / "shards" / "valid")]
    main([str(demo / "calm"), *data, "--prompts", "4", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["rest"], row["way"]) for row in found["rows"]] == [
        (rest, way) for rest in (1, 2, 3) for way in ("nextvec", "left", "middle", "whole")
    ]
    for row in found["rows"]:
        assert all(-100 <= value <= 100 for value in row["brier"])
        assert len(row["brier"]) == len(row["stderr"]) == 4
        assert (row["met"] is None) is (row["way"] != "nextvec")
    whole = [row["brier"] for row in found["rows"] if row["way"] == "whole"]
    assert whole[0] == whole[1] == whole[2]  # of the same prompts, whatever rest they were cut at
    assert found["milliseconds"].keys() == {"0", "1", "2", "3"}
    assert all(value > 0 for ways in found["milliseconds"].values() for value in ways.values())
    assert capsys.readouterr().out.count("Brier-1..4 x 100") == 12
    main([str(demo / "calm"), *data, "--prompts", "4", "--rests", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[2] for line in lines if line.startswith("r = ")} == {"3", "0"}
    with pytest.raises(SystemExit):
        main([str(demo / "calm"), *data, "--rests", "4"])
    assert "--rests are 1 to 3" in capsys.readouterr().err


def test_accuracy_against_collision(demo: Path, tmp_path: Path) -> None:
    main = benchmark("sampling_curves")
    out = tmp_path / "found.json"
    main([str(demo), "--contexts", "4", "--json", str(out), "--svg", str(tmp_path / "figure.svg")])
    found = json.loads(out.read_text())
    assert found["contexts"] == found["documents"] == 4
    points = {(point["method"], point["strength"]): point for point in found["points"]}
    methods = {"batch sampler", "medoid", "centre", "shrunk", "noise", "adaptive pool", "baseline"}
    assert methods <= {method for method, _ in points}
    for (method, _), point in points.items():
        if method in methods:
            for unit in ("token", "pair"):
                assert 0 <= point[f"{unit}_accuracy"] <= 1
                assert -1e-9 <= point[f"{unit}_collision"] <= 1 + 1e-9
            assert point["pair_collision"] <= point["token_collision"] + 1e-9 or method == "baseline"
    assert points["noise", 0.0]["pair_collision"] == 1  # without noise all draws are one
    assert all(value > 0 for value in found["milliseconds"].values())
    assert (tmp_path / "figure.svg").read_text().count("<svg") == 1


def test_the_speed_of_the_vocabulary(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("vocabulary_speed")([str(demo / "calm"), "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"V = {VOCAB}, width 16; by bounds: no"
    assert [line.split(" rows: bounds ")[0].strip() for line in lines[1:]] == ["4", "50", "200"]


def test_the_speed_of_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("matrix_layouts")(["--shapes", "16x8", "8x16", "--rows", "1", "3", "--rounds", "2", "--megabytes", "0"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        [precision, shape, count] for precision in ("fp32", "bf16") for shape in ("16 x 8", "8 x 16") for count in "13"
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[3:])


def mixture_demo(demo: Path, folder: Path) -> Path:
    """The same with a CALM whose head knows the law of each token."""
    shutil.copytree(demo, folder)
    config = calm_config(4).override(
        autoencoder=AutoencoderConfig(vocab_size=VOCAB, patch_size=4, width=16, inner=24, latent=8, factored=True),
        head=MixtureHeadConfig(blocks=1),
    )
    model = Calm(config)
    spread(model)
    shutil.rmtree(folder / "calm")
    save_run(folder / "calm", CalmRun(data=DataSettings(path="unused"), model=config), model, TOKENIZER)
    return folder


def test_a_head_with_laws_of_tokens_is_drawn_from_token_by_token_as_well(demo: Path, tmp_path: Path) -> None:
    folder = mixture_demo(demo, tmp_path / "demo")
    out = tmp_path / "found.json"
    benchmark("sampling_curves")([str(folder), "--contexts", "4", "--json", str(out), "--svg", str(tmp_path / "f.svg")])
    found = json.loads(out.read_text())
    methods = {point["method"] for point in found["points"]}
    assert "temperature" in methods
    assert "noise" not in methods
    assert "token by token" in found["milliseconds"]


def test_the_loss_by_place(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the head's own loss, of all places together."""
    folder = mixture_demo(demo, tmp_path / "demo")
    held_out = str(folder / "data" / "shards" / "valid")
    main = benchmark("loss_by_place")
    main(
        [
            str(folder / "calm"),
            "--beside",
            str(folder / "baseline"),
            "--data",
            held_out,
            "--tokens",
            "64",
            "--documents",
            "3",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 documents of 64 tokens; nats per token at places 1 to 4, and of all"
    rows = {line[:32].strip(): [float(value) for value in line[32:].split()] for line in lines[1:]}
    assert list(rows) == ["CALM, as it is", "CALM, mean state", "CALM, state of another document", "token Transformer"]
    for values in rows.values():
        assert values[4] == pytest.approx(sum(values[:4]) / 4, abs=2e-3)
    model = Calm.from_pretrained(folder / "calm")
    found = shards(folder)
    documents = [found.document(index)[:64] for index in range(found.documents)]
    ids = torch.stack([torch.as_tensor(each.astype("int64")) for each in documents if len(each) == 64][:3])
    ids_NPK = ids.unflatten(1, (-1, 4))
    with torch.inference_mode():
        loss, _ = model.loss(model.states(ids_NPK[:, :-1]), ids_NPK[:, 1:], None)
    assert rows["CALM, as it is"][4] == pytest.approx(float(loss), abs=2e-3)
    with pytest.raises(DataError, match="no held-out document has 4096 tokens"):
        main([str(folder / "calm"), "--data", held_out, "--tokens", "4096"])


def test_what_recall_costs(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark("recall_speed")(["--repeats", "1", "--context", "32", "--new", "8"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"{what}, {arm}" for what in ("s a step", "s a token of text") for arm in ("calm", "token")
    ]
    for line in lines:
        without, with_recall = (float(part.split()[0]) for part in line.partition("least ")[2].split(", ")[:2])
        assert without > 0
        assert with_recall > 0


def test_repetition_is_told_by_penalty(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(BENCHMARKS / "repetition.py"))
    assert found["repeated"]([1, 2, 3, 4, 5]) == 0
    assert found["repeated"]([7, 7, 7, 7, 7, 7]) == pytest.approx(2 / 3)
    found["main"]([str(demo / "baseline"), "--data", str(demo / "data" / "shards" / "valid"), "--texts", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("the documents themselves: ")
    assert len(lines) == 1 + len(found["SETTINGS"])
    assert "T = 0.5, presence 0.6, frequency 0.0: " in lines[7]


def test_several_texts_at_once_are_timed_in_turn(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(demo / "calm"), str(demo / "baseline"), "--data", str(demo / "data" / "shards" / "valid")]
    words += ["--json", str(tmp_path / "found.json")]
    benchmark("texts_at_once")(
        [*words, "--texts", "1", "3", "--prompt", "9", "--tokens", "6", "--repeats", "2", "--each", "8"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["1 texts", "3 texts"]
    for line in lines:
        calm, token = (float(part.replace(",", "")) for part in line.split(": ")[1].split(" tokens")[0].split(" and "))
        assert calm > 0
        assert token > 0
    kept = json.loads((tmp_path / "found.json").read_text())
    assert [(each["texts"], len(each["tokens_per_processor_second"])) for each in kept["found"]] == [(1, 2), (3, 2)]


def test_what_an_update_of_muon_costs(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("muon_speed")(["--arm", "token", "--repeats", "1"])
    head, torchs, ours, values = capsys.readouterr().out.splitlines()
    assert head.startswith("token, 1 layers: 9 matrices")
    assert float(torchs.split()[1]) > 0
    assert float(ours.split()[1]) > 0
    assert float(values.split()[-1]) < 1.35


def test_what_steps_with_other_settings_take(capsys: pytest.CaptureFixture[str]) -> None:
    small = "data.context_tokens=32 data.rows=1 model.{}grams=64"
    for arm, place in (("calm", "head."), ("token", "")):
        variants = [small.format(place), small.format(place) + " optim.rows_lr=null"]
        benchmark("step_variants")([arm, *variants, "--layers", "1", "--repeats", "1"])
        head, *lines = capsys.readouterr().out.splitlines()
        assert head.startswith(f"{arm}, ")
        assert [line.split(": ")[1] for line in lines] == variants
        assert " 1.000 times" in lines[0]


def test_what_attention_takes(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("attention_speed")(["--heads", "1", "--positions", "9", "130", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["causal", "by patch"] * 2
    assert all(float(line.split(": ")[1].split()[0]) > 0 for line in lines)
