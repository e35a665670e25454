"""Every file format to documents, and every mistake with its file and line."""

from __future__ import annotations

import errno
import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nextvec.errors import DataError
from nextvec.text import formats
from nextvec.text.builtin import stdlib_files
from nextvec.text.formats import Bad, Document
from nextvec.text.readers import documents, expand, fingerprint

TEXTS = ["first\nline", "zweite Zeile: äöü", "third ☕", ""]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read(source: Path | str, text_key: str = "text") -> list[str]:
    return list(documents(expand([str(source)]), text_key, lambda message: pytest.fail(message)))


def mistakes(source: Path | str, text_key: str = "text") -> tuple[list[str], list[str]]:
    bad: list[str] = []
    good = list(documents(expand([str(source)]), text_key, bad.append))
    return good, bad


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.RST"])
def test_a_text_file_is_a_document(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, "\ufeffline\r\nnext ☕\n")) == ["line\r\nnext ☕\n"]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", b"\n" + LINES.rstrip().replace(b"\n", b"\r\n\n")),
        ("a.json", LINES),
        ("a.jsonl.gz", gzip.compress(LINES[:50]) + gzip.compress(LINES[50:])),
        ("a.JSONL.ZST", zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:])),
    ],
)
def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, chunk: int) -> None:
    path = write(tmp_path / name, data)
    if name != "a.json":
        monkeypatch.setattr(formats, "CHUNK", chunk if not name.endswith("ZST") else 8 * chunk)
    assert read(path) == TEXTS


def test_json_object_array_and_strings(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", json.dumps({"body": "x"}, indent=2)), "body") == ["x"]
    assert read(write(tmp_path / "b.json", json.dumps([{"text": t} for t in TEXTS], indent=1))) == TEXTS
    assert read(write(tmp_path / "c.json", json.dumps(TEXTS))) == TEXTS
    assert read(write(tmp_path / "d.json", '{"text": "alone"}')) == ["alone"]


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [*TEXTS * 200, None], "n": list(range(801))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    good, bad = mistakes(tmp_path / "a.parquet")
    assert good == TEXTS * 200
    assert bad == [f"{tmp_path}/a.parquet: row 801: 'text' must be text, got NoneType"]
    with pytest.raises(DataError, match=r"no column 'body'; it has text, n: choose one with --text-key"):
        read(tmp_path / "a.parquet", "body")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read(write(tmp_path / "b.parquet", b"PAR1 nothing"))


@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet_strings_that_are_not_utf8(tmp_path: Path, dictionary: bool) -> None:
    raw = pyarrow.array([b"good", b"caf\xe9", None, "☕".encode()], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())  # Arrow does not look inside
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column.dictionary_encode() if dictionary else column}), path)
    assert mistakes(path) == (
        ["good", "☕"],
        [f"{path}: row 2: not valid UTF-8 (byte 0xe9)", f"{path}: row 3: 'text' must be text, got NoneType"],
    )


def test_damaged_parquet_page_names_the_row_reached(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"some text {i}" for i in range(3000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1000, use_dictionary=False)
    group = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    data[middle : middle + 400] = bytes(byte ^ 0xFF for byte in data[middle : middle + 400])
    path.write_bytes(data)
    good: list[str] = []
    with pytest.raises(DataError, match=rf"^{path}: not a readable parquet file from row \d+ on \(.+\)$") as caught:
        good.extend(documents(expand([str(path)]), "text", lambda message: pytest.fail(message)))
    assert f"from row {len(good) + 1} on" in str(caught.value)
    assert 700 < len(good) <= 1000  # all rows of the batches before the damaged page


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:owner/name")])
def test_missing_extra_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"needs .* pip install 'nextvec\[corpora\]'"):
        read(source)


def test_folders_and_globs_are_read_by_name(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "a.py", "c.jsonl", "b/image.png", ".git/x.txt", "b/.hidden.txt"):
        write(tmp_path / "root" / name, '{"text": "c.jsonl"}' if name.endswith("jsonl") else name)
    assert read(tmp_path / "root") == ["a.py", "b/1.md", "b/2.txt", "c.jsonl"]
    assert read(f"{tmp_path}/root/b/*.[tm]*") == ["b/1.md", "b/2.txt"]
    assert read(f"{tmp_path}/root/**/*.md") == ["b/1.md"]


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    file = write(tmp_path / "one" / "a.txt", "x")
    before = fingerprint(expand([str(tmp_path / "one")]))
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint(expand([str(tmp_path / "two")])) == before
    write(tmp_path / "two" / file.name, "changed")
    assert fingerprint(expand([str(tmp_path / "two")])) != before


def test_bad_documents_name_file_and_line(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"body": "no text"}',
        b'{"text": 3}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "fine"}',
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    good, bad = mistakes(path)
    assert good == ["good", "fine"]
    assert bad == [
        f"{path}:2: not valid JSON (Unterminated string starting at)",
        f"{path}:3: no key 'text'; its keys are body: choose one with --text-key",
        f"{path}:4: 'text' must be text, got int",
        f"{path}:5: expected an object with the key 'text', got list",
        f"{path}:6: not valid UTF-8 (byte 0xff)",
        f"{path}:7: holds the lone surrogate U+D800, which is not text",
    ]


def test_bad_files_name_file_and_line(tmp_path: Path) -> None:
    latin = write(tmp_path / "latin.txt", b"one\ntwo caf\xe9\n")
    assert mistakes(latin) == ([], [f"{latin}:2: not valid UTF-8 (byte 0xe9); save the file as UTF-8"])
    broken = write(tmp_path / "broken.json", '[{"text": "a"},\n {"text" "b"}]')
    assert mistakes(broken) == ([], [f"{broken}:2: not valid JSON (Expecting ':' delimiter)"])
    latin_json = write(tmp_path / "latin.json", b'[\n"\xe9"]')
    assert mistakes(latin_json)[1] == [f"{latin_json}:2: not valid UTF-8 (byte 0xe9); save the file as UTF-8"]
    item = write(tmp_path / "item.json", '[{"text": "a"}, 7]')
    assert mistakes(item) == (["a"], [f"{item}: item 2: expected an object with the key 'text', got int"])


DEEP = "[" * 200_000


def test_json_nested_too_deeply_is_a_bad_document(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{{"text": {DEEP}\n{{"text": "fine"}}\n')
    assert mistakes(lines) == (["good", "fine"], [f"{lines}:2: not valid JSON (nested too deeply)"])
    for text in (DEEP, f'{{"text": {DEEP}', f'{{"text": {DEEP}\n{{"text": "fine"}}\n'):
        whole = write(tmp_path / "a.json", text)
        assert mistakes(whole) == ([], [f"{whole}:1: not valid JSON (nested too deeply)"])


def test_file_that_cannot_be_read_does_not_end_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for name in ("a.txt", "locked.txt", "z.txt"):
        write(root / name, name)
    dangling = [root / name for name in ("b.txt", "c.json", "d.jsonl", "e.parquet")]
    for path in dangling:
        path.symlink_to(tmp_path / "nowhere")
    opened = Path.read_bytes

    def refuse(path: Path) -> bytes:  # file modes do not stop a test that runs as root
        if path.name == "locked.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    good, bad = mistakes(root)
    assert good == ["a.txt", "z.txt"]
    missing, denied = os.strerror(errno.ENOENT), os.strerror(errno.EACCES)
    assert bad == [
        *(f"{path}: cannot be read ({missing})" for path in dangling),
        f"{root}/locked.txt: cannot be read ({denied})",
    ]
    before = fingerprint(expand([str(root)]))
    write(tmp_path / "nowhere", "")  # the links now lead somewhere: other content
    assert fingerprint(expand([str(root)])) != before


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_file_cut_short_is_noticed(tmp_path: Path, suffix: str) -> None:
    many = LINES * 2000
    data = gzip.compress(many) if suffix == ".gz" else zstandard.compress(many)
    path = write(tmp_path / f"a.jsonl{suffix}", data[: len(data) // 2])
    good, bad = mistakes(path)
    assert len(good) < 8000
    assert "the compressed file is damaged or cut short" in bad[-1]
    assert bad[-1].startswith(f"{path}:{len(good) + len(bad)}")
    noise = write(tmp_path / f"b.jsonl{suffix}", b"not compressed at all")
    assert "damaged or cut short" in mistakes(noise)[1][0]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name at least one source"):
        expand([])
    with pytest.raises(DataError, match=r"source nowhere\.txt does not exist; give a file"):
        expand(["nowhere.txt"])
    with pytest.raises(DataError, match=r"no file matches '.*\*\.txt'"):
        expand([f"{tmp_path}/*.txt"])
    with pytest.raises(DataError, match=r"holds no file that can be read; known suffixes are \.txt"):
        expand([str(tmp_path)])
    with pytest.raises(DataError, match=r"a\.exe: unknown suffix '\.exe'; known suffixes are \.txt, "):
        expand([str(write(tmp_path / "a.exe", b"MZ"))])
    with pytest.raises(DataError, match=r"written hf:owner/name\[:config\]\[:split\]; got 'hf:a:b:c:d'"):
        expand(["hf:a:b:c:d"])


def test_stdlib_leaves_tests_and_packages_out(tmp_path: Path) -> None:
    kept = ["abc.py", "json/decoder.py", "unittest/mock.py", "doctest.py", "latest.py"]
    left = ["test/a.py", "json/tests/b.py", "testing.py", "lib2to3/test_x.py", "site-packages/numpy/c.py", "x.pyc"]
    for name in kept + left:
        write(tmp_path / name, "x = 1\n")
    assert [name for _, name in stdlib_files(tmp_path)] == sorted(kept)


def test_stdlib_of_this_interpreter() -> None:
    items = expand(["python-stdlib"])
    assert len(items) > 300
    assert sum(item.weight for item in items) > 5_000_000
    found = {item.identity[0]: item for item in items}
    (entry,) = found["json/decoder.py"].read("text")
    assert isinstance(entry, Document)
    assert entry.key == "json/decoder.py"
    assert "class JSONDecoder" in entry.text


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "corpus"
    write(folder / "train.jsonl", LINES)
    write(folder / "test.jsonl", b'{"text": "held out", "id": 9}\n')
    return folder


def test_dataset_folder(dataset: Path) -> None:
    assert read(f"hf:{dataset}") == TEXTS
    assert read(f"hf:{dataset}:test") == ["held out"]
    assert read(f"hf:{dataset}:default:test") == ["held out"]
    assert mistakes(f"hf:{dataset}", "id")[1][1] == f"hf:{dataset}: row 2: 'id' must be text, got int"
    before = fingerprint(expand([f"hf:{dataset}"]))
    assert fingerprint(expand([f"hf:{dataset}"])) == before
    assert fingerprint(expand([f"hf:{dataset}:test"])) != before
    with pytest.raises(DataError, match=r"cannot be loaded: .*nosplit"):
        read(f"hf:{dataset}:nosplit")
    with pytest.raises(DataError, match="hf:nowhere/at-all cannot be loaded"):
        read("hf:nowhere/at-all")


def test_reader_yields_fractions_that_grow_to_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    (item,) = expand([str(path)])
    entries = [entry for entry in item.read("text") if not isinstance(entry, Bad)]
    assert [entry.fraction for entry in entries] == sorted(entry.fraction for entry in entries)
    assert entries[-1].fraction == 1.0
