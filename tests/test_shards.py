"""Shards and streams against plain Python lists; damage of every kind is one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from nextvec.errors import ConfigError, DataError
from nextvec.text.batches import Batches, permute
from nextvec.text.layout import Stream
from nextvec.text.prepare import prepare
from nextvec.text.shards import Packing, TokenShards, shard_dtype
from nextvec.text.tokenizer import byte_tokenizer, train_tokenizer

TOKENIZER = byte_tokenizer()
EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id


def make(folder: Path, texts: list[str], shard_tokens: int = 100) -> TokenShards:
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TokenShards.open(
        prepare([str(source)], TOKENIZER, folder / "out", valid_fraction=0, shard_tokens=shard_tokens).train
    )


def random_texts(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abc def\n", k=rng.choice([1, 2, 3, 4, 7, 8, 30, 150]))) for _ in range(count)]


def slow_stream(texts: list[str], patch_size: int, packing: Packing) -> list[int]:
    """The definition: each document with its end-of-text, padded to whole patches; or everything, cut to whole patches."""
    ids: list[int] = []
    for text in texts:
        ids += [*TOKENIZER.encode(text), EOS]
        while packing == "aligned" and len(ids) % patch_size:
            ids.append(PAD)
    return ids[: len(ids) // patch_size * patch_size]


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return make(tmp_path, random_texts(random.Random(0), 40))


@pytest.mark.parametrize("seed", range(4))
def test_stream_is_the_plain_construction(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    texts = random_texts(rng, rng.choice([1, 5, 60]))
    shards = make(tmp_path, texts, shard_tokens=rng.choice([1, 40, 10**6]))
    assert shards.documents == len(texts)
    assert sum(len(text) + 1 for text in texts) == shards.tokens
    for index, text in enumerate(texts):
        assert shards.document(index).tolist() == [*TOKENIZER.encode(text), EOS]
    packings: tuple[Packing, ...] = ("aligned", "packed")
    for packing in packings:
        for patch_size in (1, 2, 4, 8):
            stream = Stream(shards, patch_size, packing)
            expected = slow_stream(texts, patch_size, packing)
            assert stream.length == len(expected)
            assert stream.read(0, stream.length).tolist() == expected
            for _ in range(60):
                start = rng.randrange(stream.length + 1)
                length = min(rng.choice([0, 1, 3, 16, 400]), stream.length - start)
                read = stream.read(start, length)
                assert read.dtype == np.int64
                assert read.tolist() == expected[start : start + length]


def test_many_shards_are_one_stream(tmp_path: Path) -> None:
    texts = random_texts(random.Random(1), 50)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one, many = make(tmp_path / "one", texts, 10**6), make(tmp_path / "many", texts, 1)
    assert len(one.manifest.shards) == 1
    assert len(many.manifest.shards) == 50
    assert one.read(0, one.tokens).tolist() == many.read(0, many.tokens).tolist()
    assert [one.document(n).tolist() for n in range(50)] == [many.document(n).tolist() for n in (*range(50),)]
    assert many.document(7).tolist() == one.document(7).tolist()  # out of order


def test_a_stream_over_many_shards_is_that_over_one_whatever_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_texts(random.Random(2), 60)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one, many = make(tmp_path / "one", texts, 10**6), make(tmp_path / "many", texts, 40)
    assert len(many.manifest.shards) > 10
    whole = Stream(one, 4)
    expected = whole.read(0, whole.length)
    monkeypatch.setattr("nextvec.text.layout.CACHE", 0)
    stream = Stream(many, 4)
    assert stream.length == whole.length
    for start, length in ((0, stream.length), (stream.length - 9, 9), (33, 100), (5, 1), (7, 0)):
        assert stream.read(start, length).tolist() == expected[start : start + length].tolist()
    assert len(stream._cached) == 1


def test_ids_above_16_bits_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("hello")
    out = prepare([str(source)], TOKENIZER, tmp_path / "out", valid_fraction=0, dtype="uint32")
    shards = TokenShards.open(out.train, verify=True)
    assert (out.train / "tokens-00000.bin").stat().st_size == 4 * 6
    assert shards.document(0).tolist() == [*TOKENIZER.encode("hello"), EOS]


def test_reads_outside_are_refused(shards: TokenShards) -> None:
    stream = Stream(shards, 4)
    for start, length in ((-1, 4), (0, stream.length + 1), (stream.length, 1)):
        with pytest.raises(IndexError, match="leaves the stream"):
            stream.read(start, length)
    with pytest.raises(IndexError, match="document index must be in"):
        shards.document(shards.documents)


def test_dtype_holds_the_vocabulary() -> None:
    assert shard_dtype(1 << 16) == "uint16"
    assert shard_dtype((1 << 16) + 1) == "uint32"
    with pytest.raises(ConfigError, match=r"vocabulary of 128256 ids does not fit shards of uint16 \(at most 65536\)"):
        shard_dtype(128256, "uint16")


def test_damage_is_one_sentence(shards: TokenShards) -> None:
    file = shards.path / "tokens-00001.bin"
    whole = file.read_bytes()

    file.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"tokens-00001\.bin is cut short or damaged: {len(whole) - 2} bytes instead"):
        TokenShards.open(shards.path)

    flipped = bytearray(whole)
    flipped[5] ^= 1
    file.write_bytes(flipped)
    TokenShards.open(shards.path)  # the size fits; only a checksum can tell
    with pytest.raises(DataError, match=r"tokens-00001\.bin has changed since it was written"):
        TokenShards.open(shards.path, verify=True)

    file.unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.bin is missing; prepare the corpus again"):
        TokenShards.open(shards.path)
    file.write_bytes(whole)
    TokenShards.open(shards.path, verify=True)

    offsets = shards.path / "documents-00000.npy"
    whole = offsets.read_bytes()
    for damaged, message in ((whole[:40], "is damaged"), (b"", "is damaged"), (None, "is missing")):
        offsets.unlink(missing_ok=True)
        if damaged is not None:
            offsets.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"documents-00000\.npy {message}"):
            TokenShards.open(shards.path)
    np.save(offsets, np.arange(3))
    with pytest.raises(DataError, match="does not fit its manifest"):
        TokenShards.open(shards.path)


def test_id_beyond_the_vocabulary_is_refused_when_read(shards: TokenShards) -> None:
    file = shards.path / "tokens-00001.bin"
    damaged = np.fromfile(file, dtype="<u2")
    damaged[2] = 60_000
    damaged.tofile(file)
    shards = TokenShards.open(shards.path)
    place = shards.manifest.shards[0].tokens + 2
    message = rf"^{shards.path} is damaged: it holds the id 60000, its vocabulary has 259; run the same nextvec prepare"
    with pytest.raises(DataError, match=message):
        shards.read(place - 9, 10)
    for packing in get_args(Packing):
        with pytest.raises(DataError, match=message):
            Stream(shards, 4, packing).read(0, Stream(shards, 4, packing).length)
    assert shards.read(place + 1, 5).max() < 259
    assert shards.read(place, 0).size == 0
    out = shards.path.parent
    prepare(
        [str(out.parent / "corpus.jsonl")], TOKENIZER, out, valid_fraction=0, shard_tokens=100
    )  # the advice mends it
    assert TokenShards.open(shards.path, verify=True).read(0, shards.tokens).max() < 259


def test_manifest_mistakes_are_one_sentence(shards: TokenShards) -> None:
    path = shards.path / "manifest.json"
    manifest = json.loads(path.read_text())
    cases: list[tuple[object, str]] = [
        ({**manifest, "format": 2}, "has format 2, this nextvec reads 1; upgrade nextvec"),
        ([], "has format None"),
        ({**manifest, "vocab_size": 70000}, "does not fit shards of uint16"),
        ({**manifest, "tokns": 3}, "unknown key 'tokns'; did you mean 'tokens'"),
    ]
    for value, message in cases:
        path.write_text(json.dumps(value))
        with pytest.raises(DataError, match=message):
            TokenShards.open(shards.path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        TokenShards.open(shards.path)
    path.unlink()
    with pytest.raises(DataError, match="its preparation did not finish; run the same nextvec prepare command again"):
        TokenShards.open(shards.path)
    with pytest.raises(DataError, match="does not exist; write one with: nextvec prepare"):
        TokenShards.open(shards.path / "nowhere")


def test_opening_the_parent_names_the_splits(shards: TokenShards) -> None:
    with pytest.raises(DataError, match=r"holds several splits; open .*train or .*valid"):
        TokenShards.open(shards.path.parent)


def test_a_tokenizer_that_does_not_match_is_refused(shards: TokenShards) -> None:
    assert shards.tokenizer.hash == TOKENIZER.hash
    other = train_tokenizer(iter(["abc abc"]), 260)
    with pytest.raises(DataError, match=r"does not match the shards in .* prepare the corpus again"):
        shards.check_tokenizer(other)
    other.save(shards.path)
    with pytest.raises(DataError, match="does not match the shards"):
        _ = TokenShards.open(shards.path).tokenizer
    with pytest.raises(DataError, match="does not match the shards"):
        TokenShards.open(shards.path, verify=True)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4099])
def test_order_is_a_permutation(size: int) -> None:
    orders = [[permute(i, size, key) for i in range(size)] for key in range(4)]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size > 100:
        assert len({tuple(order) for order in orders}) == 4
        # A random permutation has about one fixed point (Poisson), and neighbours land far apart.
        assert max(sum(i == p for i, p in enumerate(order)) for order in orders) < 10
        assert np.abs(np.diff(orders[0])).mean() == pytest.approx(size / 3, rel=0.1)


@pytest.mark.parametrize("patch_size", [1, 4])
def test_batches_are_stateless_and_cover_each_epoch(shards: TokenShards, patch_size: int) -> None:
    stream = Stream(shards, patch_size)
    context = 32
    batches = Batches(stream, rows=3, context_tokens=context, seed=7)
    assert batches.windows == (stream.length - context + patch_size) // context
    for epoch in range(5):
        starts = sorted(batches.start(epoch * batches.windows + i) for i in range(batches.windows))
        assert starts[0] < context
        assert starts[0] % patch_size == 0
        assert np.diff(starts).tolist() == [context] * (batches.windows - 1)
        assert starts[-1] + context <= stream.length
    first = {batches.start(epoch * batches.windows) % context for epoch in range(40)}
    assert len(first) > 4  # the grid moves from epoch to epoch

    forward = [batches.batch(i) for i in range(30)]
    again = Batches(Stream(TokenShards.open(shards.path), patch_size), 3, context, seed=7)
    for index in random.Random(0).sample(range(30), 30):
        assert torch.equal(again.batch(index), forward[index])
    assert forward[0].dtype == torch.int64
    assert forward[0].shape == (3, context)
    assert not torch.equal(Batches(stream, 3, context, seed=8).batch(0), forward[0])
    wider = Batches(stream, rows=6, context_tokens=context, seed=7)  # the same samples in the same order
    assert torch.equal(wider.batch(0), torch.cat(forward[:2]))
    starts = [batches.start(i) for i in range(3)]
    assert forward[0].tolist() == [stream.read(start, context).tolist() for start in starts]


def test_a_corpus_of_exactly_one_window(tmp_path: Path) -> None:
    shards = make(tmp_path, ["x" * 31])
    batches = Batches(Stream(shards, 4), rows=2, context_tokens=32, seed=0)
    assert batches.windows == 1
    assert batches.batch(5).tolist() == [[*TOKENIZER.encode("x" * 31), EOS]] * 2


def test_batches_refuse_what_cannot_be(shards: TokenShards) -> None:
    stream = Stream(shards, 4)
    with pytest.raises(ConfigError, match="multiple of the patch size 4; got 30, nearest 32"):
        Batches(stream, 1, 30, 0)
    with pytest.raises(ConfigError, match=rf"has {stream.length} tokens, less than one window of 8192"):
        Batches(stream, 1, 8192, 0)
    with pytest.raises(ConfigError, match="rows must be at least 1; got 0"):
        Batches(stream, 0, 32, 0)
    with pytest.raises(ConfigError, match="patch_size must be at least 1 token; got 0"):
        Stream(shards, 0)
