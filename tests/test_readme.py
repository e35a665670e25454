"""README, CONTRIBUTING and docs/: what they name exists, and the marked blocks run.

A line `<!-- tested -->` right before a bash, sh or console block marks it. The marked blocks of a document run in order
in one temporary folder that holds texts/ with a few small files. The command `nextvec` is a stand-in there that shrinks
settings (SMALL) and reads texts/ where the document says python-stdlib. docs/log.md is history and is left out.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

from nextvec.bench.settings import KINDS
from nextvec.cli import app, commands  # noqa: F401  (registers the verbs)
from nextvec.cli.train import VERBS
from nextvec.config import RUN_KINDS, Config

ROOT = Path(__file__).parents[1]
SHELLS = ("bash", "sh", "console")
MARK = "<!-- tested -->"
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)
PLACES = (
    ROOT / "src" / "nextvec",
    ROOT / "tests",
    ROOT,
)  # what a path in a document is relative to; bare names: the first two
WRITTEN = ("model.safetensors", "model.sha256", "report.html", "rows.html")  # files that a command writes

TRAIN = ["train.steps=3", "train.log_every=1", "data.context_tokens=64", "data.rows=2", "optim.warmup=1"]
BACKBONE = [f"model.backbone.{name}" for name in ("layers=1", "width=16", "inner=16", "heads=2", "kv_heads=2")]
SMALL = {  # appended to the command: the last value of an option or setting counts
    "tokenizer train": ["--vocab-size", "300"],
    "prepare": ["--workers", "1", "--valid-fraction", "0.3"],
    "train autoencoder": [*TRAIN, "model.width=16", "model.inner=16", "model.latent=8"],
    "train lm": [*TRAIN, *BACKBONE, "model.head.noise=4", "model.head.blocks=1"],
    "train baseline": [*TRAIN, *BACKBONE],
    "eval": ["--context-tokens", "64", "--draws", "2", "--max-documents", "2"],
    "generate": ["--candidates", "8", "--max-tokens", "8"],
    "demo": ["--minutes", "0.5"],
}
STAND_IN = """#!{python}
import sys
from nextvec.cli import main

if __name__ == "__main__":
    words = ["texts" if word == "python-stdlib" else word for word in sys.argv[1:]]
    small = next((more for verb, more in {small}.items() if words[: len(verb.split())] == verb.split()), [])
    sys.argv[1:] = words if "--help" in words else words + small
    main()
"""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    marked: bool
    place: str  # document:line

    def shell(self) -> str:
        """The commands, without a console's prompts and output."""
        if self.language != "console":
            return self.text
        kept, goes_on = [], False
        for line in self.text.splitlines():
            if goes_on or line.startswith("$ "):
                kept.append(line if goes_on else line[2:])
                goes_on = line.endswith("\\")
        return "\n".join(kept)


def documents() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in found if path != ROOT / "docs" / "log.md"]


def blocks(text: str, name: str) -> list[Block]:
    return [
        Block(
            match[2],
            re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE),
            text[: match.start()].rstrip(" ").endswith(f"{MARK}\n"),
            f"{name}:{text.count(chr(10), 0, match.start()) + 1}",
        )
        for match in FENCE.finditer(text)
    ]


def spans(text: str) -> list[str]:
    """Inline code, outside of blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def command_lines(shell: str) -> Iterator[list[str]]:
    """The words after each `nextvec` of a shell text; pipes, redirections and `&&` end a command."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|()<>"):
                while command and (re.fullmatch(r"\w+=.*", command[0]) or command[0] in ("time", "nohup")):
                    del command[0]
                if command and Path(command[0]).name == "nextvec":
                    yield command[1:]
                command = []
            else:
                command.append(word)


def problem(words: list[str], strict: bool) -> str | None:
    """What is wrong with a command line, None if nothing is. Not strict (prose): options may lack, words be placeholders."""
    command: Any = get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        names = rest.pop(0).split("|")
        if not strict and not all(re.fullmatch("[a-z-]+", name) for name in names):
            return None
        for name in names:
            if name not in command.commands:
                return f"there is no verb {name!r}"
        command, verb = command.commands[names[0]], names[0]
    options = {name: option for option in command.params for name in option.opts}
    for word in rest:
        name = word.strip("[]").partition("=")[0]
        if re.fullmatch("--?[a-z][a-z-]*", name) and name not in options and name != "--help":
            return f"{verb if rest != words else 'nextvec'} has no option {name}"
    if not strict or hasattr(command, "commands") or "--help" in rest:
        return None
    try:
        parsed = command.make_context(command.name, rest).params
    except Exception as error:  # the library's usage errors: a value, a missing option, too many words
        return str(error)
    for setting in parsed.get("overrides") or []:
        kind = KINDS[parsed["what"]] if verb == "bench" else VERBS[verb]
        if not has_setting(RUN_KINDS[kind], setting.partition("=")[0]):
            return f"train {verb} has no setting {setting!r}"
    return None


def has_setting(kind: Any, dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    if not (isinstance(kind, type) and issubclass(kind, Config) and first in kind.model_fields):
        return False
    kinds = [kind.model_fields[first].annotation]
    for annotation in kinds:  # grows while it is read: a section may be one kind among several
        kinds += get_args(annotation)
    return not rest or any(has_setting(inner, rest) for inner in kinds)


def missing(span: str) -> str | None:
    """What a piece of inline code names that does not exist: a file, a test, a setting, a command."""
    if re.fullmatch(r"[\w./-]+\.(py|css|html)(::\w+)?", span) and span not in WRITTEN:
        path, _, test = span.partition("::")
        places = [(place, path) for place in PLACES] if "/" in path else [(place, f"**/{path}") for place in PLACES[:2]]
        found = next((file for place, pattern in places for file in place.glob(pattern)), None)
        if found is None:
            return f"there is no file {path}"
        if test and f"def {test}(" not in found.read_text(encoding="utf-8"):
            return f"{path} has no {test}"
    elif re.fullmatch(r"(data|optim|train|energy|recipe|model)\.[a-z]\w*[\w.]*(=.*)?", span) and span not in WRITTEN:
        name = span.partition("=")[0]
        if not any(has_setting(kind, name) for kind in RUN_KINDS.values()):
            return f"there is no setting {name}"
    elif span.startswith("nextvec "):
        wrong = problem(span.split()[1:], strict=False)
        return wrong and f"`{span}`: {wrong}"
    return None


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_commands_parse_and_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    wrong = [found for span in spans(text) if (found := missing(span))]
    for block in blocks(text, path.name):
        if block.language in SHELLS:
            found = [(words, problem(words, strict=True)) for words in command_lines(block.shell())]
            wrong += [f"{block.place}: nextvec {shlex.join(words)}: {what}" for words, what in found if what]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_no_placeholder_is_left(path: Path) -> None:
    assert not re.findall(r"@[A-Z_]{3,}@", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_and_python_blocks_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", text)):
        assert re.match(r"[a-z]+:", target) or (path.parent / target).exists(), f"{path.name}: no file {target}"
    for block in blocks(text, path.name):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text, block.place)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nextvec":
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{block.place}: {node.module} has no {alias.name}"


def test_the_checks_see_mistakes() -> None:
    text = (
        f"{MARK}\n```bash\nA=1 nextvec tokenizr train x # --no\nnextvec eval RUN --dtaa x | tail\n```\n"
        "- in a list:\n\n  ```console\n  $ nextvec train lm \\\n      --out a model.hed.noise=1 --autoencoder b && nextvec env\n"
        "  nextvec output\n  ```\n\n`nextvec demo [--minuts 8]`, `nextvec train autoencoder|lm|bseline`, `nextvec VERB`\n"
        "`optim.lrr=1`, `train.steps`, `model.head.blocks`, `calmm.py`, `optim.py`, `tests/test_readme.py::test_x`\n"
    )
    first, second = blocks(text, "x.md")
    assert (first.marked, first.place, second.marked, second.place) == (True, "x.md:2", False, "x.md:8")
    lines = [*command_lines(first.shell()), *command_lines(second.shell())]
    assert [words[:2] for words in lines] == [["tokenizr", "train"], ["eval", "RUN"], ["train", "lm"], ["env"]]
    assert [problem(words, strict=True) for words in lines] == [
        "there is no verb 'tokenizr'",
        "eval has no option --dtaa",
        "train lm has no setting 'model.hed.noise=1'",
        None,
    ]
    assert problem(["demo", "--minutes", "many"], strict=True)
    assert problem(["prepare", "texts"], strict=True)
    assert problem(["generate", "RUN", "--prompt", "- x"], strict=True) is None
    assert [found for span in spans(text) if (found := missing(span))] == [
        "`nextvec demo [--minuts 8]`: demo has no option --minuts",
        "`nextvec train autoencoder|lm|bseline`: there is no verb 'bseline'",
        "there is no setting optim.lrr",
        "there is no file calmm.py",
        "tests/test_readme.py has no test_x",
    ]


@pytest.mark.slow
def test_marked_blocks_run(tmp_path: Path) -> None:
    stand_in = tmp_path / "bin" / "nextvec"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.format(python=sys.executable, small=json.dumps(SMALL)))
    stand_in.chmod(0o755)
    search = os.pathsep.join([str(stand_in.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    for path in documents():
        marked = [block for block in blocks(path.read_text(encoding="utf-8"), path.name) if block.marked]
        folder = tmp_path / path.stem
        (folder / "texts").mkdir(parents=True)
        for index in range(24):
            lines = [f"def f{index}_{n}(x, y):\n    return x * {n * index} + y\n\n" for n in range(14)]
            (folder / "texts" / f"{index}.py").write_text("".join(lines))
        for block in marked:
            assert block.language in SHELLS, f"{block.place}: only shell blocks can be marked as tested"
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.shell()],
                cwd=folder,
                env={**os.environ, "PATH": search, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, f"{block.place}\n{done.stdout}\n{done.stderr}"


def house_table() -> str:
    """The README's table of the house: each file with the first line of its docstring, folders in the order of the data."""
    order = [
        "config.py",
        "head_settings.py",
        "train_settings.py",
        "settings.py",
        "presets.py",
        "recipes.py",
        "configs",
        "text",
        "model",
        "scoring",
        "sampling",
        "train",
        "evaluate",
        "rundir.py",
        "card.py",
        "reference",
        "serve",
        "report",
        "watch",
        "demo",
        "sweep",
        "law",
        "bakeoff",
        "bench",
        "hardware.py",
        "process.py",
        "files.py",
        "lock.py",
        "errors.py",
        "cli",
    ]
    source = ROOT / "src" / "nextvec"

    def row(path: Path, name: str, mark: str = "") -> str:
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        return f"| {mark}`{name}`{mark} | {mark}{first.rstrip('.').replace('|', chr(92) + '|')}{mark} |"

    rows = []
    for name in order:
        if (source / name).is_file():
            rows.append(row(source / name, name))
            continue
        rows.append(row(source / name / "__init__.py", f"{name}/", "**"))
        files = sorted(
            path for path in (source / name).rglob("*.py") if path.name not in ("__init__.py", "commands.py")
        )
        rows += [row(path, path.relative_to(source).as_posix()) for path in files]
    listed = {path.name for path in source.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert listed - {"__init__.py"} == set(order), "a new room of the house: give it a place in `order`"
    return "\n".join(rows)


def test_the_readmes_table_of_the_house_is_true() -> None:
    """To mend it: cd tests, python -c "import test_readme; print(test_readme.house_table())", and paste."""
    assert house_table() in (ROOT / "README.md").read_text(encoding="utf-8")
