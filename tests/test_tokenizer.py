"""Tokenizers: bytes, trained BPE, and published files with their special tokens in unusual places."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors

from nextvec.errors import ConfigError, DataError
from nextvec.text import encoding
from nextvec.text import tokenizer as module
from nextvec.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20, "naïve café ☕ 漢字\r\n\t\x00"]


def foreign(folder: Path, words: list[str], config: dict[str, object] | None = None) -> Path:
    """A word-level tokenizer.json as others publish them, with truncation, padding and an automatic first token."""
    core = Core(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(f"{words[1]} $A", special_tokens=[(words[1], 1)])
    core.enable_truncation(3)
    core.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_bytes_are_ids_after_the_specials() -> None:
    made = byte_tokenizer()
    text = "".join(TEXTS)
    assert made.vocab_size == 259
    assert (made.pad_id, made.mask_id, made.eos_id) == (0, 1, 2)
    assert made.encode(text) == [3 + byte for byte in text.encode()]
    assert made.decode(range(3, 259)) == bytes(range(256)).decode(errors="replace")


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_bytes_round_trip(text: str) -> None:
    made = byte_tokenizer()
    assert made.decode(made.encode(text)) == text


def test_trained_tokenizer_round_trips_and_is_reproducible(tmp_path: Path) -> None:
    made = train_tokenizer(iter(TEXTS), 300)
    again = train_tokenizer(iter(TEXTS), 300)
    assert made.hash == again.hash != byte_tokenizer().hash
    assert 259 < made.vocab_size <= 300
    assert len(made.encode(TEXTS[0])) < len(TEXTS[0].encode())
    made.save(tmp_path)
    for loaded in (
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(made)),
    ):
        assert loaded.hash == made.hash
        assert (loaded.pad_id, loaded.mask_id, loaded.eos_id) == (0, 1, 2)
        for text in TEXTS:
            assert loaded.decode(loaded.encode(text)) == text
        assert loaded.encode_batch(TEXTS) == [made.encode(text) for text in TEXTS]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json"]
    protocol: Tokenizer = made  # the class satisfies the protocol the rest of the package uses
    assert protocol.vocab_size == made.vocab_size


def test_special_names_inside_a_text_stay_text() -> None:
    made = train_tokenizer(iter(TEXTS), 280)
    ids = made.encode("a<|endoftext|>b<|pad|>")
    assert not {0, 1, 2} & set(ids)
    assert made.decode(ids) == "a<|endoftext|>b<|pad|>"


def test_specials_are_shown_unless_asked_otherwise() -> None:
    made = byte_tokenizer()
    ids = [*made.encode("ab"), made.eos_id, made.pad_id, made.mask_id]
    assert made.decode(ids) == "ab<|endoftext|><|pad|><|mask|>"
    assert made.decode(ids, skip_special=True) == "ab"
    with pytest.raises(DataError, match=r"token ids must be in \[0, 259\); got 65 to 259"):
        made.decode([65, 259])


def test_long_texts_are_cut_where_no_token_crosses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = train_tokenizer(iter(TEXTS), 300)
    text = "".join(TEXTS) + "a\n\n  b\n c \nd\ne  \n\n" * 30 + "(x)\ny"
    monkeypatch.setattr(module, "SPLIT_ABOVE", 7)
    pieces = made.split(text)
    assert len(pieces) > 20
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in made.encode(piece)] == made.encode(text)
    monkeypatch.setattr(encoding, "SMALL", 50)
    texts = [text, "", "short", text]
    ids, lengths = encoding.encode(texts, made, "uint16")
    assert ids.dtype == "<u2"
    assert ids.tolist() == [i for text in texts for i in (*made.encode(text), made.eos_id)]
    assert lengths.tolist() == [len(made.encode(text)) + 1 for text in texts]
    words = load_tokenizer(foreign(tmp_path / "t", ["<unk>", "<s>", "</s>"]))
    assert words.split(text) == [text]  # a cut could change the ids of other kinds of tokenizer


def test_foreign_tokenizer_is_never_cut_padded_or_prefixed(tmp_path: Path) -> None:
    made = load_tokenizer(foreign(tmp_path / "t", ["<unk>", "<s>", "</s>", "a", "b"]))
    assert made.encode("a b a b a") == [3, 4, 3, 4, 3]
    assert made.eos_id == made.pad_id == 2  # no pad in the file: the end-of-text id
    assert made.mask_id == 0  # no mask in the file: what the authors' code writes
    assert made.decode([0, 3], skip_special=True) == "<unk> a"  # id 0 stands in for a mask but is an ordinary token


def test_special_tokens_come_from_the_config_beside_it(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "fin", "vide", "a"]
    folder = foreign(tmp_path / "t", words, {"eos_token": {"content": "fin"}, "pad_token": "vide", "mask_token": None})
    made = load_tokenizer(folder)
    assert (made.eos_id, made.pad_id) == (3, 4)
    made.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.eos_id, copy.pad_id, copy.hash) == (3, 4, made.hash)
    copied = pickle.loads(pickle.dumps(copy))
    assert (copied.eos_id, copied.pad_id) == (3, 4)


def test_ids_with_holes_count_to_the_largest(tmp_path: Path) -> None:
    core = Core(models.WordLevel({"</s>": 0, "a": 9}, unk_token="</s>"))
    core.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 10


def test_user_errors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no end-of-text token: none of <\|endoftext\|>, .* name it as"):
        load_tokenizer(foreign(tmp_path / "t", ["<unk>", "<s>", "a"]))
    with pytest.raises(DataError, match="tokenizer nowhere does not exist"):
        load_tokenizer("nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"vocab_size must be at least 259 .* got 100"):
        train_tokenizer(iter(TEXTS), 100)
    with pytest.raises(DataError, match="the corpus holds no text"):
        train_tokenizer(iter([""]), 300)
