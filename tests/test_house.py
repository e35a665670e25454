"""The rules of the house that no type checker sees: who may import whom, what help may load, what the wheel holds."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import tomllib
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import nextvec

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nextvec"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400  # lines; a longer file is usually two rooms

MATHS = ("model/", "scoring/", "sampling/temperature.py")  # pure maths
MATHS_MAY_USE = ("torch", "nextvec.config", "nextvec.errors", "nextvec.model", "nextvec.scoring")
# Doors out of the maths, opened when they are called and not when the file is imported.
DOORS = {"nextvec.rundir", "nextvec.sampling.generate"}  # from_pretrained, stream

HEAVY = ("torch", "accelerate", "tokenizers", "matplotlib", "pyarrow", "datasets", "numpy", "safetensors")
HELP_SECONDS = 2.0  # the aim is 0.5; the rest is for a machine with other work


def name_of(path: Path) -> str:
    """Dotted name of a module of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, deferred: bool) -> Iterator[str]:
    """Names imported when the module is, or (deferred) inside its functions; imports for type checkers are left out.

    `from a import b` counts as `a.b` where that is a module of the package, and as `a` otherwise.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported_anywhere(node) if deferred else ()
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_by(node) if not deferred else ()
        else:
            yield from imports(node, deferred)


def imported_anywhere(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_by(node)


def imported_by(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, f"line {node.lineno}: imports are absolute here"
    assert node.module is not None
    known = {name_of(path) for path in MODULES}
    for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in known else node.module


def under(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in allowed)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_import_rules_see_what_they_should() -> None:
    """The reader of imports against a small module with each kind of import."""
    tree = ast.parse(
        "import math\nfrom nextvec import rundir\nif TYPE_CHECKING:\n    import yaml\n"
        "class A:\n    import json\n    def f(self):\n        def g():\n            from nextvec.cli import app\n"
    )
    assert list(imports(tree, deferred=False)) == ["math", "nextvec.rundir", "json"]
    assert list(imports(tree, deferred=True)) == ["nextvec.cli"]


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.relative_to(PACKAGE).as_posix().startswith(MATHS)], ids=name_of
)
def test_pure_maths_needs_torch_and_itself_only(path: Path) -> None:
    tree = parsed(path)
    allowed = (*MATHS_MAY_USE, *sys.stdlib_module_names)
    at_import = {name for name in imports(tree, deferred=False) if not under(name, allowed)}
    assert not at_import, f"{name_of(path)} imports {at_import}"
    later = {name for name in imports(tree, deferred=True) if not under(name, allowed)} - DOORS
    assert not later, f"{name_of(path)} imports {later} inside a function"


@pytest.mark.parametrize("path", [p for p in MODULES if PACKAGE / "cli" not in p.parents], ids=name_of)
def test_nothing_but_the_command_line_imports_the_command_line(path: Path) -> None:
    assert not [name for name in imported_anywhere(parsed(path)) if under(name, ("nextvec.cli",))]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_what_it_is_and_stays_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no docstring"
    assert len(text.splitlines()) <= LONGEST, f"{name_of(path)} has more than {LONGEST} lines: split it"


SHOW_HELP = """
import json, sys
from nextvec.cli import main
loaded = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["nextvec", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    loaded[" ".join(words)] = sorted(sys.modules)
print(json.dumps(loaded), file=sys.stderr)
"""


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    from typer.main import get_command

    from nextvec.cli import app, commands  # noqa: F401  (registers the verbs)

    verbs: list[list[str]] = [[]]
    for words in verbs:  # grows while it is read
        command = get_command(app)
        for word in words:
            command = command.commands[word]  # type: ignore[attr-defined]
        verbs += [[*words, name] for name in getattr(command, "commands", {})]
    assert ["train", "lm"] in verbs
    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, json.dumps(verbs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for words, loaded in json.loads(done.stderr).items():
        heavy = set(HEAVY) & set(loaded)
        assert not heavy, f"nextvec {words} --help loads {heavy}"


def test_help_answers_at_once() -> None:
    """The quickest of three in processor time, so that a busy machine does not fail it."""
    times = []
    for _ in range(3):
        begin = _seconds_of_children()
        done = subprocess.run([sys.executable, "-c", SHOW_HELP, "[[]]"], capture_output=True, text=True, check=True)
        times.append(_seconds_of_children() - begin)
        assert "Usage: nextvec" in done.stdout
    assert min(times) < HELP_SECONDS


def _seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def test_public_names_resolve_and_explain_themselves() -> None:
    for name in nextvec.__all__:
        value = getattr(nextvec, name)
        if name == "__version__":
            continue
        assert isinstance(value, type | types.FunctionType), f"{name} is neither a class nor a function"
        text = inspect.getdoc(value) or ""
        assert len(text) > 20, f"{name} has no docstring"
        assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclasses make up"
    assert nextvec.__all__ == sorted(nextvec.__all__)
    assert dir(nextvec) == nextvec.__all__
    with pytest.raises(AttributeError, match="no attribute 'Clam'"):
        nextvec.Clam  # noqa: B018


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert nextvec.__version__ == project["version"] == str(citation["version"])
    assert citation["license"] == project["license"]
    assert nextvec.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    said = subprocess.run(
        [sys.executable, "-c", "from nextvec.cli import main; main()", "--version"], capture_output=True
    )
    assert (said.returncode, said.stdout.decode().strip()) == (0, f"nextvec {nextvec.__version__}")


def test_the_wheel_holds_the_whole_package_and_its_type_marker(tmp_path: Path) -> None:
    """Built by the project's own backend, in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    here = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "nextvec/py.typed" in here
    assert here <= names
    extra = {name for name in names - here if ".dist-info/" not in name}
    assert not extra, f"the wheel holds {extra}"
    assert any(name.endswith("licenses/LICENSE") for name in names)
