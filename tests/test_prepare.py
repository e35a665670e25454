"""Preparation: the same bytes whatever the workers and the interruptions, and nothing lost when something fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from nextvec import cli
from nextvec.errors import ConfigError, DataError
from nextvec.lock import RUN_LOCK, run_lock
from nextvec.text import encoding, writing
from nextvec.text.prepare import Prepared, prepare
from nextvec.text.reading import held_out
from nextvec.text.shards import TokenShards
from nextvec.text.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = [f"document {i}\n" + "lorem ipsum " * (i % 17) for i in range(120)]


def corpus(folder: Path, texts: list[str] = TEXTS, name: str = "corpus.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(source: str, out: Path, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {"valid_fraction": 0.2, "shard_tokens": 1500, "workers": 1, **changes}
    return prepare([source], TOKENIZER, out, **settings)


def digests(out: Path) -> dict[str, str]:
    files = sorted(file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def texts_of(folder: Path | None) -> list[str]:
    assert folder is not None
    shards = TokenShards.open(folder, verify=True)
    return [TOKENIZER.decode(shards.document(i)[:-1].tolist()) for i in range(shards.documents)]


def stop_after(count: int, error: BaseException) -> Callable[[float, int, int], None]:
    def show(fraction: float, documents: int, tokens: int) -> None:
        if documents == count:
            raise error

    return show


def die(texts: list[str]) -> None:
    os._exit(1)


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `nextvec WORDS`."""
    monkeypatch.setattr(sys, "argv", ["nextvec", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_documents_are_split_by_hash_and_kept_in_order(tmp_path: Path) -> None:
    done = run(corpus(tmp_path), tmp_path / "out")
    expected: dict[bool, list[str]] = {False: [], True: []}
    for text in TEXTS:
        expected[held_out(text.encode(), 0.2)].append(text)
    assert texts_of(done.train) == expected[False]
    assert texts_of(done.valid) == expected[True]
    assert 10 < len(expected[True]) < 40
    assert (done.documents, done.valid_documents) == (120, len(expected[True]))
    assert done.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert done.tokens == done.text_bytes + 120
    manifest = TokenShards.open(done.train).manifest
    assert len(manifest.shards) > 3
    assert (manifest.packing, manifest.split, manifest.python, manifest.skipped) == ("aligned", "train", None, 0)
    assert (
        manifest.tokenizer == TOKENIZER.hash == load_tokenizer(done.train).hash == load_tokenizer(tmp_path / "out").hash
    )


def test_share_held_out_is_the_share_asked_for() -> None:
    keys = [str(i).encode() for i in range(20_000)]
    for fraction in (0.01, 0.1, 0.5):
        share = sum(held_out(key, fraction) for key in keys) / len(keys)
        assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / len(keys)) ** 0.5  # |z| < 5
    assert not any(held_out(key, 0.0) for key in keys)


def test_workers_and_batches_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path)
    run(source, tmp_path / "here")
    monkeypatch.setattr(encoding, "SMALL", 0)  # processes from the first document on
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 7)
    run(source, tmp_path / "two", workers=2)
    assert digests(tmp_path / "here") == digests(tmp_path / "two")


@pytest.mark.parametrize("count", [1, 30, 119])
def test_interrupted_runs_end_in_the_same_bytes(tmp_path: Path, count: int) -> None:
    source = corpus(tmp_path)
    run(source, tmp_path / "whole")
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, show=stop_after(count, KeyboardInterrupt()))
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(DataError, match=r"does not exist|its preparation did not finish"):
        TokenShards.open(out / "train")
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*.bin")}
    assert bool(written) == (count >= 30)
    done = run(source, out)
    assert bool(done.resumed) == (count >= 30)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in written.items())  # kept, not written again
    assert digests(out) == digests(tmp_path / "whole")


def test_resuming_inside_a_folder_of_files(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "src").mkdir(exist_ok=True)
        corpus(tmp_path / "src", TEXTS[number * 30 : number * 30 + 30], f"{number}.jsonl")
    source = str(tmp_path / "src")
    run(source, tmp_path / "whole")
    for count in (45, 90):
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "broken", show=stop_after(count, KeyboardInterrupt()))
    run(source, tmp_path / "broken")
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_stops_the_processes_and_a_kill_leaves_none_behind(tmp_path: Path) -> None:
    source = corpus(tmp_path, [f"{i} " + "some words to encode, again and again. " * 50 for i in range(900)])
    script = tmp_path / "work.py"
    script.write_text(
        "import os, signal, sys\n"
        "from nextvec.text.prepare import prepare\n"
        "from nextvec.text.tokenizer import byte_tokenizer\n"
        "def show(fraction, documents, tokens):\n"
        "    if documents == int(sys.argv[4]):\n"
        "        os.kill(os.getpid(), int(sys.argv[3]))\n"
        "if __name__ == '__main__':\n"
        "    prepare([sys.argv[1]], byte_tokenizer(), sys.argv[2], workers=2, shard_tokens=500_000, show=show)\n"
    )
    out = tmp_path / "out"
    for number, count in ((signal.SIGINT, 400), (signal.SIGKILL, 750)):
        words = [sys.executable, str(script), source, str(out), str(int(number)), str(count)]
        before = time.monotonic()
        # The pipe closes only when the last process that inherited it has ended, the workers included.
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0, done.stderr
        assert time.monotonic() - before < 60
        assert ("KeyboardInterrupt" in done.stderr) == (number == signal.SIGINT)
        assert "nextvec/text/encoding.py" not in done.stderr.partition("Traceback")[0]
    kept = len(list(out.rglob("*.bin")))
    assert kept >= 2
    done = prepare([source], TOKENIZER, out, workers=2, shard_tokens=500_000)
    assert done.resumed > 0
    assert done.documents == 900
    assert not list(out.rglob("*.tmp"))
    prepare([source], TOKENIZER, tmp_path / "whole", workers=1, shard_tokens=500_000)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_rerun_of_finished_work_changes_nothing(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    first = run(source, tmp_path / "out")
    before = digests(tmp_path / "out")
    again = run(source, tmp_path / "out", workers=2)
    assert digests(tmp_path / "out") == before
    assert again.resumed == first.documents


def test_a_damaged_finished_shard_is_written_again(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    run(source, tmp_path / "out")
    before = digests(tmp_path / "out")
    file = tmp_path / "out" / "train" / "tokens-00002.bin"
    file.write_bytes(b"\0" * file.stat().st_size)
    done = run(source, tmp_path / "out")
    assert 0 < done.resumed < done.documents
    assert digests(tmp_path / "out") == before


def test_other_arguments_or_sources_are_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    out = tmp_path / "out"
    run(source, out)
    before = digests(out)
    for change, message in (
        (
            {"packing": "packed"},
            "was prepared with packing 'aligned', not 'packed'; choose another --out, or delete it",
        ),
        ({"valid_fraction": 0.1}, "was prepared with valid_fraction 0.2, not 0.1"),
        ({"dtype": "uint32"}, "was prepared with dtype 'uint16', not 'uint32'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(source, out, **change)
    with pytest.raises(ConfigError, match="was prepared with tokenizer"):
        prepare([source], train_tokenizer(iter(TEXTS), 270), out, valid_fraction=0.2, shard_tokens=1500)
    with pytest.raises(ConfigError, match="was prepared from other sources, or they have changed since"):
        run(corpus(tmp_path, TEXTS[:-1]), out)
    assert digests(out) == before


def test_an_out_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    (tmp_path / "out" / "train").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds files that nextvec prepare did not write; choose another --out"):
        run(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--out must be a folder; .*corpus\.jsonl is a file"):
        run(source, Path(source))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "prepare.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="was written by another version of nextvec"):
        run(source, tmp_path / "new")


def test_arguments_out_of_range(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    for change, message in (
        ({"valid_fraction": 1.0}, r"valid_fraction must be in \[0, 1\); got 1.0"),
        ({"workers": 0}, "workers must be at least 1; got 0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1; got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(source, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_empty_corpus_and_empty_documents(tmp_path: Path) -> None:
    done = run(corpus(tmp_path, ["", "text", ""]), tmp_path / "out", valid_fraction=0)
    assert (done.documents, done.empty, done.valid) == (1, 2, None)
    with pytest.raises(DataError, match=r"the corpus is empty: no text in .* \(2 empty documents, 0 skipped\)"):
        run(corpus(tmp_path, ["", ""], "b.jsonl"), tmp_path / "b")
    run(corpus(tmp_path, ["now some"], "b.jsonl"), tmp_path / "b", valid_fraction=0)  # no delete needed
    with pytest.raises(DataError, match="all 1 documents fell to the held-out split; use a smaller --valid-fraction"):
        run(corpus(tmp_path, ["z"], "c.jsonl"), tmp_path / "c", valid_fraction=0.999999)
    run(corpus(tmp_path, ["z"], "c.jsonl"), tmp_path / "c", valid_fraction=0)
    assert not list((tmp_path / "c" / "valid").iterdir())


def test_link_to_nothing_stops_or_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    corpus(folder)
    link = folder / "a.txt"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"^{link}: cannot be read \(.+\) \(--skip-bad leaves such documents out\)$"):
        run(str(folder), tmp_path / "out")
    done = run(str(folder), tmp_path / "out", skip_bad=True)
    assert (done.documents, done.skipped) == (len(TEXTS), 1)


def test_bad_documents_stop_or_are_counted(tmp_path: Path) -> None:
    source = Path(corpus(tmp_path))
    lines = source.read_text().splitlines()
    for number in (3, 77, 119):
        lines[number] = '{"text": broken'
    source.write_text("\n".join(lines) + "\n{\n")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=rf"^{source}:4: not valid JSON .*\(--skip-bad leaves such documents out\)$"):
        run(str(source), out)
    done = run(str(source), out, skip_bad=True)
    assert (done.documents, done.skipped) == (117, 4)
    assert done.messages[0].startswith(f"{source}:4: ")
    assert TokenShards.open(done.train).manifest.skipped == 4
    assert "skipped 4 bad documents" in str(done)
    assert run(str(source), out, skip_bad=True).skipped == 4
    with pytest.raises(ConfigError, match=r"was begun with --skip-bad \(4 documents left out\); give it again"):
        run(str(source), out)
    with pytest.raises(KeyboardInterrupt):
        run(str(source), tmp_path / "broken", skip_bad=True, show=stop_after(60, KeyboardInterrupt()))
    run(str(source), tmp_path / "broken", skip_bad=True)
    assert digests(tmp_path / "broken") == digests(out)


def test_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path)
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    real = writing.atomic_open
    room = 9_000

    class FullDisk:
        def __init__(self, handle: IO[bytes]):
            self.handle = handle

        def write(self, data: Any) -> None:
            nonlocal room
            room -= memoryview(data).nbytes
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.handle.write(data)

    @contextmanager
    def full(path: Path, mode: str = "w") -> Iterator[FullDisk]:
        with real(path, mode) as handle:
            yield FullDisk(handle)

    monkeypatch.setattr(writing, "atomic_open", full)
    with pytest.raises(DataError, match=r"the disk is full: .* free some space and try again"):
        run(source, out)
    monkeypatch.undo()
    assert not list(out.rglob("*.tmp"))
    assert len(list(out.rglob("*.bin"))) >= 2
    assert run(source, out).resumed > 0
    assert digests(out) == digests(tmp_path / "whole")


def test_a_killed_worker_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SMALL", 0)
    monkeypatch.setattr(encoding, "_work", die)
    with pytest.raises(DataError, match="a tokenizing process died, most likely for lack of memory"):
        run(corpus(tmp_path), tmp_path / "out")


def test_builtin_corpus_names_the_python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    (library / "json").mkdir(parents=True)
    names = [f"json/m{i}.py" for i in range(30)]
    for name in names:
        (library / name).write_text(f"# {name}\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    done = prepare(["python-stdlib"], TOKENIZER, tmp_path / "out", valid_fraction=0.3)
    assert TokenShards.open(done.train).manifest.python == platform.python_version()
    # Held out by name: what the files hold does not matter.
    assert texts_of(done.valid) == [f"# {name}\n" for name in sorted(names) if held_out(name.encode(), 0.3)]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = corpus(tmp_path)
    out = str(tmp_path / "shards")
    code, said, _ = command(
        monkeypatch, capsys, "tokenizer", "train", source, "--vocab-size", "300", "--out", str(tmp_path / "tok")
    )
    assert code == 0
    assert "300 ids, hash" in said
    words = ("prepare", source, "--tokenizer", str(tmp_path / "tok"), "--out", out, "--valid-fraction", "0.2")
    code, said, _ = command(monkeypatch, capsys, *words)
    assert code == 0
    assert "120 documents" in said
    assert TokenShards.open(tmp_path / "shards" / "valid", verify=True).manifest.vocab_size == 300

    code, _, error = command(monkeypatch, capsys, *words, "--packing", "packed")
    assert code == 2
    assert error.strip().splitlines()[-1].startswith(f"nextvec: {out} was prepared with packing 'aligned'")
    code, _, error = command(monkeypatch, capsys, "prepare", "nowhere.txt", "--tokenizer", "bytes", "--out", out)
    assert code == 2
    assert error.strip().startswith("nextvec: source nowhere.txt does not exist")
    Path(source).write_text("{\n" + Path(source).read_text())
    code, _, error = command(
        monkeypatch, capsys, "tokenizer", "train", source, "--vocab-size", "300", "--out", str(tmp_path / "tok")
    )
    assert code == 2
    assert f"{source}:1: not valid JSON" in error
    code, said, _ = command(
        monkeypatch, capsys, *("tokenizer", "train", source, "--vocab-size", "900000", "--out", out, "--skip-bad")
    )
    assert code == 0
    assert "1 bad documents skipped" in said
    assert "of 900000 ids were made" in said


def test_ctrl_c_on_the_command_line_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nextvec.text.prepare.prepare", interrupted)
    out = str(tmp_path / "out")
    code, _, said = command(monkeypatch, capsys, "prepare", corpus(tmp_path), "--tokenizer", "bytes", "--out", out)
    assert code == 130
    assert "finished shards are kept, the same command goes on from there" in said


def test_worker_processes_start_without_torch() -> None:
    code = "import sys, nextvec.text.prepare; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_second_preparation_of_one_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    out = tmp_path / "out"
    with run_lock(out):
        with pytest.raises(ConfigError, match=rf"{out} is being written by process {os.getpid()} on"):
            prepare([str(tmp_path / "a.txt")], TOKENIZER, out, valid_fraction=0, workers=1)
        assert [path.name for path in out.iterdir()] == [RUN_LOCK]
    assert prepare([str(tmp_path / "a.txt")], TOKENIZER, out, valid_fraction=0, workers=1).documents == 1
    assert not (out / RUN_LOCK).exists()
