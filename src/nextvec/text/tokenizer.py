"""Tokenizers: any Hugging Face tokenizer.json, a byte-level BPE trained here, and bytes (the same BPE without merges).

One class serves all three. A tokenizer is known everywhere by `hash`, the SHA-256 of its canonical tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nextvec.errors import ConfigError, DataError
from nextvec.files import atomic_open, read_json, write_json

PAD, MASK, EOS = "<|pad|>", "<|mask|>", "<|endoftext|>"  # ids 0, 1, 2 of the tokenizers made here
SPECIALS = [PAD, MASK, EOS]
SMALLEST = 256 + len(SPECIALS)  # a byte-level vocabulary holds every byte

# How published tokenizers name their special tokens, tried in this order when no tokenizer_config.json says it.
USUAL_NAMES = {
    "eos_token": [EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]"],
    "pad_token": [PAD, "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"],
    "mask_token": [MASK, "<mask>", "[MASK]"],
}
SPLIT_ABOVE = 1 << 20  # characters: a longer text can be encoded in pieces, so that memory stays flat


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer. Ids are ints in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def hash(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str: ...
    def save(self, folder: Path) -> None: ...


class TextTokenizer:
    """A `tokenizers.Tokenizer` with its end-of-text, pad and mask ids settled.

    eos_id ends a document; pad_id fills its last patch (the eos id where the file names no pad); mask_id replaces
    dropped input tokens (id 0, as the authors' code, where the file names no mask).
    Raises DataError when no end-of-text token can be found.
    """

    def __init__(self, core: tokenizers.Tokenizer, names: dict[str, str] | None = None, source: str = "tokenizer"):
        core.no_truncation()  # a published file may carry both, and would silently cut or pad documents
        core.no_padding()
        core.encode_special_tokens = True  # the characters "<|endoftext|>" in a text are text, not an end
        self._core = core
        self._names = names or {}
        vocab = core.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1  # ids may have holes; the largest decides
        eos = _special(vocab, self._names, "eos_token")
        if eos is None:
            raise DataError(
                f"{source} has no end-of-text token: none of {', '.join(USUAL_NAMES['eos_token'])} is in its vocabulary; "
                'name it as "eos_token" in a tokenizer_config.json beside it'
            )
        pad, mask = _special(vocab, self._names, "pad_token"), _special(vocab, self._names, "mask_token")
        self.eos_id: int = eos
        self.pad_id: int = eos if pad is None else pad
        self.mask_id: int = 0 if mask is None else mask
        self._special_ids = {i for i in (eos, pad, mask) if i is not None}
        state = json.loads(core.to_str())
        self._splittable = state["normalizer"] is None and _is_byte_level(state["pre_tokenizer"] or {})
        self._canonical = json.dumps(state, sort_keys=True, ensure_ascii=False)
        self.hash: str = hashlib.sha256(self._canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special token is added."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """Ids of each text, as `encode`; on all cores unless TOKENIZERS_PARALLELISM=false.

        specials: with the special tokens that the tokenizer itself puts around a text, as its file says (Llama 3: its
        begin-of-text token in front; the tokenizers made here: none).
        """
        return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=specials)]

    @property
    def special_texts(self) -> list[str]:
        """How the special tokens are written, as a chat template writes them."""
        return [token.content for token in self._core.get_added_tokens_decoder().values() if token.special]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which special tokens, written out, mean themselves; for text that no user wrote."""
        return list(self._marked.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """A second one, made at the first text that needs it: of a large vocabulary that takes a tenth of a second."""
        marked = tokenizers.Tokenizer.from_str(self._core.to_str())
        marked.encode_special_tokens = False
        return marked

    def split(self, text: str) -> list[str]:
        """Cut a very long text into pieces whose ids, one after the other, are the ids of the whole.

        A text below 1 MiB of characters, or any text of a tokenizer that is not byte-level, stays whole.
        """
        return _pieces(text) if self._splittable else [text]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`. Every id is shown; with skip_special the end-of-text, pad and mask tokens are left out.

        Bytes that are not UTF-8 become U+FFFD. Raises DataError for an id outside the vocabulary.
        """
        chosen = [int(i) for i in ids]
        if chosen and not 0 <= min(chosen) <= max(chosen) < self.vocab_size:
            raise DataError(f"token ids must be in [0, {self.vocab_size}); got {min(chosen)} to {max(chosen)}")
        if skip_special:
            chosen = [i for i in chosen if i not in self._special_ids]
        return str(self._core.decode(chosen, skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json (and tokenizer_config.json where only that tells the special tokens) into `folder`."""
        with atomic_open(Path(folder) / "tokenizer.json") as handle:
            handle.write(self._canonical)
        if self._names:
            write_json(Path(folder) / "tokenizer_config.json", self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self._canonical, "names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TextTokenizer.__init__(self, tokenizers.Tokenizer.from_str(state["text"]), state["names"])


def load_tokenizer(source: str | Path) -> TextTokenizer:
    """Load "bytes", a tokenizer.json, or a directory that holds one (a run, shards, a Hugging Face snapshot).

    Raises DataError when it is missing, damaged, or names no end-of-text token.
    """
    if str(source) == "bytes":
        return byte_tokenizer()
    path = Path(source)
    if path.is_dir():
        inside = [p for p in (path / "tokenizer.json", path / "train" / "tokenizer.json") if p.is_file()]
        if not inside:
            raise DataError(f"tokenizer directory {path} holds no tokenizer.json")
        path = inside[0]
    if not path.is_file():
        raise DataError(f'tokenizer {path} does not exist; give a tokenizer.json, a directory holding one, or "bytes"')
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for every kind of damage
        raise DataError(f"tokenizer {path} cannot be read: {' '.join(str(error).split())}") from None
    return TextTokenizer(core, _names_beside(path, core), source=f"tokenizer {path}")


def byte_tokenizer() -> TextTokenizer:
    """256 bytes (id = 3 + byte) and the three special tokens: a BPE without merges."""
    vocab = {name: index for index, name in enumerate(SPECIALS)}
    for character in _byte_characters():
        vocab[character] = len(vocab)
    core = _byte_level(models.BPE(vocab=vocab, merges=[]))
    core.add_special_tokens(SPECIALS)
    return TextTokenizer(core)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids (fewer when the text holds no more pairs to merge).

    texts: documents, streamed. <|pad|>, <|mask|> and <|endoftext|> get ids 0, 1 and 2, the 256 bytes come next.
    Raises ConfigError for a vocabulary below 259 ids, DataError when there is no text.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(f"vocab_size must be at least {SMALLEST} (256 bytes and 3 special tokens); got {vocab_size}")
    core = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _Seen()
    core.train_from_iterator(seen.watch(texts), trainer=trainer)
    if not seen.characters:
        raise DataError("the tokenizer cannot be trained: the corpus holds no text")
    return TextTokenizer(core)


class _Seen:
    """Counts what passes, so that an empty corpus is noticed without reading it twice."""

    characters = 0

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.characters += len(text)
            yield from _pieces(text)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next character from U+0100."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) if b in kept else chr(256 + others.index(b)) for b in range(256)]


def _pieces(text: str) -> list[str]:
    """Cut a very long text after newlines that stand between two non-spaces, where no byte-level token can cross."""
    pieces, start = [], 0
    while len(text) - start > SPLIT_ABOVE:
        at = text.find("\n", start + SPLIT_ABOVE)
        while 0 <= at < len(text) - 1 and (text[at - 1].isspace() or text[at + 1].isspace()):
            at = text.find("\n", at + 1)
        if not 0 <= at < len(text) - 1:
            break
        pieces.append(text[start : at + 1])
        start = at + 1
    return [*pieces, text[start:]]


def _is_byte_level(state: dict[str, Any]) -> bool:
    """True for ByteLevel alone or after regex splits (GPT-2, Llama 3), without an added prefix space."""
    if state.get("type") == "Sequence":
        parts = state["pretokenizers"]
        return all(p["type"] == "Split" or _is_byte_level(p) for p in parts) and any(_is_byte_level(p) for p in parts)
    return state.get("type") == "ByteLevel" and not state.get("add_prefix_space")


def _special(vocab: dict[str, int], names: dict[str, str], kind: str) -> int | None:
    tried = [names[kind]] if kind in names else USUAL_NAMES[kind]
    return next((vocab[name] for name in tried if name in vocab), None)


def _names_beside(path: Path, core: tokenizers.Tokenizer) -> dict[str, str]:
    """Special-token names of a Hugging Face folder, kept only where they differ from what the usual names give."""
    vocab = core.get_vocab(with_added_tokens=True)
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = path.with_name(file)
        settings = read_json(beside, "tokenizer settings") if beside.is_file() else {}
        for kind in USUAL_NAMES:
            value = settings.get(kind)
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str) and name in vocab:
                names[kind] = name
    return {kind: name for kind, name in names.items() if vocab[name] != _special(vocab, {}, kind)}
