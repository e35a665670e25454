"""evaluate.compare and `nextvec compare`: what compares, the paired bootstrap, and one sentence for what does not."""

import dataclasses
import json
import sys

import pytest
import torch

from nextvec.cli import main
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.compare import check_same, compare
from nextvec.files import write_json
from nextvec.scoring.brier import BrierResult, Protocol, summarise
from nextvec.scoring.clusters import cluster_ratio

PROTOCOL = Protocol(
    name="documents-64",
    tokenizer_hash="a" * 64,
    context_tokens=64,
    positions="patch_starts",
    stride=4,
    draws=8,
    estimator="all_pairs",
    decode="argmax",
    documents=40,
    documents_hash="b" * 64,
    seed=0,
)
DOCUMENTS = torch.arange(40).repeat_interleave(torch.arange(40) % 7 + 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(scale, seed, documents=DOCUMENTS):
    return scale * torch.randn(len(documents), 4, generator=generator(seed))


BASE = torch.tensor([0.5, 0.3, 0.2, 0.1]) + 0.1 * torch.randn(40, 1, generator=generator(9))[DOCUMENTS]
VALID = torch.rand(BASE.shape, generator=generator(8)) < 0.9


def result(values, protocol=PROTOCOL, documents=DOCUMENTS, valid=VALID):
    return summarise(values, valid, documents, protocol)


def changed(value, **fields):
    return dataclasses.replace(value, protocol=dataclasses.replace(value.protocol, **fields))


def run_cli(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["nextvec", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_the_bootstrap_agrees_with_the_clustered_error_of_the_paired_difference():
    a, b = BASE + noise(0.05, 1), BASE + 0.02 + noise(0.05, 2)
    found = compare(result(a), result(b), generator=generator())
    ratio = cluster_ratio(b - a, VALID, DOCUMENTS)
    assert [d.value for d in found.differences[:4]] == pytest.approx(ratio.mean.tolist(), abs=1e-6)
    for difference, error in zip(found.differences, ratio.covariance.diagonal().sqrt().tolist(), strict=False):
        assert difference.stderr == pytest.approx(error, rel=0.1)
        assert difference.low < difference.value < difference.high
        assert difference.stderr < 0.5 * result(a).brier_stderr[0]  # pairs share their documents
    assert found.differences[4].name == "BrierLM"
    assert found.differences[4].value == pytest.approx(result(b).brier_lm - result(a).brier_lm)
    assert (found.documents, found.resamples, found.notes) == (40, 10_000, ())
    assert compare(result(a), result(b), generator=generator()) == found


def test_the_bootstrap_equals_the_slow_twin():
    """The same resamples, summed document by document."""
    a, b = result(BASE + noise(0.05, 1)), result(BASE + noise(0.05, 2))
    found = compare(a, b, generator=generator(5), resamples=50)
    picks = torch.randint(40, (50, 40), generator=generator(5)).tolist()
    gaps = []
    for pick in picks:
        means = []
        for each in (a.per_document, b.per_document):
            rows = zip(each.sums, each.positions, strict=True)
            means.append([sum(s[c] for c in pick) / sum(n[c] for c in pick) for s, n in rows])
        lm = [100 * torch.tensor(mean, dtype=torch.float64).prod().item() ** 0.25 for mean in means]
        gaps.append([*(y - x for x, y in zip(*means, strict=True)), lm[1] - lm[0]])
    errors = torch.tensor(gaps, dtype=torch.float64).std(0).tolist()
    assert [d.stderr for d in found.differences] == pytest.approx(errors)


def test_intervals_cover():
    """300 pairs of equal models: 95 % intervals of Brier-1 hold 0 in 95 %, 5 standard errors allowed and 2 % of bias."""
    held = 0
    for seed in range(300):
        a, b = result(BASE + noise(0.3, 2 * seed + 100)), result(BASE + noise(0.3, 2 * seed + 101))
        (first, *_) = compare(a, b, generator=generator(seed), resamples=400).differences
        held += first.low <= 0 <= first.high
    assert abs(held / 300 - 0.95) < 5 * (0.95 * 0.05 / 300) ** 0.5 + 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "wikitext103-1024", "context_tokens": 1024},
            r"differ in protocol \(documents-64 and wikitext103-1024\)",
        ),
        ({"documents_hash": "c" * 64}, r"differ in documents \(b{12} and c{12}\)$"),
        ({"tokenizer_hash": "c" * 64}, r"differ in tokenizer \(a{12} and c{12}\)$"),
        ({"positions": "every_offset"}, r"differ in positions \(patch_starts and every_offset\)$"),
        ({"stride": 2, "decode": "sample"}, r"stride \(4 and 2\), decode rule \(argmax and sample\)$"),
    ],
)
def test_what_does_not_measure_the_same_is_refused_by_name(monkeypatch, tmp_path, capsys, fields, message):
    a, b = result(BASE), changed(result(BASE), **fields)
    with pytest.raises(ConfigError, match=message):
        check_same(a, b)
    for name, each in (("a", a), ("b", b)):
        write_json(tmp_path / f"{name}.json", {"brier": each.to_dict()})
    assert run_cli(monkeypatch, tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "out.json") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert f"{tmp_path / 'a.json'} and {tmp_path / 'b.json'} do not compare" in shown.err
    assert not (tmp_path / "out.json").exists()


def test_draws_estimator_and_seed_may_differ():
    other = changed(result(BASE), draws=2, estimator="exact_tail", seed=7)
    found = compare(result(BASE), other, generator=generator())
    assert all(d.value == d.stderr == 0 for d in found.differences)


def test_the_command_prints_both_and_the_difference(monkeypatch, tmp_path, capsys):
    a, b = result(BASE), result(BASE + 0.05 + noise(0.02, 3))
    for name, each in (("a", a), ("b", b)):
        write_json(tmp_path / f"{name}.json", {"kind": "calm", "brier": each.to_dict()})
    assert run_cli(monkeypatch, tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "out.json") == 0
    shown = capsys.readouterr().out
    assert f"A: {tmp_path / 'a.json'}\n{a}" in shown
    assert f"B: {tmp_path / 'b.json'}\n{b}" in shown
    assert "B - A:\nBrier-1  +0.0" in shown
    assert "paired bootstrap: 10,000 resamples of 40 documents" in shown
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["differences"][4]["name"] == "BrierLM"
    assert written["differences"][4]["low"] > 0


def test_without_a_bootstrap_it_says_why():
    old = dataclasses.replace(result(BASE), per_document=None)
    found = compare(old, result(BASE), generator=generator())
    assert found.resamples == 0
    assert "no paired bootstrap: a result was written without per-document sums" in str(found)
    one = result(BASE, documents=torch.zeros(len(DOCUMENTS)))
    assert "no paired bootstrap: there is one document" in str(compare(one, one, generator=generator()))


def test_brier_lm_is_left_out_where_it_does_not_exist():
    low = BASE - torch.tensor([0.0, 0.0, 0.0, 0.3])
    found = compare(result(BASE), result(low), generator=generator())
    assert [d.name for d in found.differences] == [f"Brier-{k}" for k in range(1, 5)]
    assert "no BrierLM of B: Brier-4 is -0." in str(found)
    edge = BASE - torch.tensor([0.0, 0.0, 0.0, 0.1]) + 0.2 * torch.randn(40, 4, generator=generator(4))[DOCUMENTS]
    scored = result(edge - edge.mean(0).clamp_max(0) + 1e-3)
    assert scored.brier_lm is not None
    found = compare(result(BASE), scored, generator=generator())
    assert found.differences[4].stderr is None
    assert "no error of BrierLM: it does not exist in " in str(found)


def test_files_that_are_no_results_are_one_sentence(monkeypatch, tmp_path, capsys):
    good = tmp_path / "good.json"
    write_json(good, {"brier": result(BASE).to_dict()})
    cases = {
        "autoencoder.json": ('{"kind": "autoencoder", "reconstruction": {}}', "it is of kind autoencoder"),
        "other.json": ('{"x": 1}', "'brier' is missing"),
        "list.json": ("[1]", "is not a result of"),
        "stamp.json": ('{"brier": {"brier": [1], "brier_stderr": null}}', "holds no Brier figures"),
        "broken.json": ("{", "cannot be read"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        assert run_cli(monkeypatch, good, tmp_path / name) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.count("\n") == 1
    assert run_cli(monkeypatch, good, tmp_path / "absent.json") == 2
    assert "does not exist" in capsys.readouterr().err
    damaged = result(BASE)
    rows = damaged.per_document
    damaged = dataclasses.replace(damaged, per_document=dataclasses.replace(rows, document=rows.document[::-1]))
    with pytest.raises(DataError, match="one stamp and other positions"):
        compare(result(BASE), damaged, generator=generator())


def test_results_stay_compact(tmp_path):
    """A list of numbers is one line, so a result has tens of lines, however many documents it has."""
    many = summarise(BASE.repeat(50, 1), VALID.repeat(50, 1), torch.arange(50 * len(BASE)) // 3, PROTOCOL)
    write_json(tmp_path / "out.json", {"brier": many.to_dict()})
    text = (tmp_path / "out.json").read_text()
    assert len(text.splitlines()) < 60
    assert BrierResult.from_dict(json.loads(text)["brier"]) == many
