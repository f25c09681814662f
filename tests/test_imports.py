"""The shape of the package: who may import whom, what the model never touches, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "openzaya"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part may import the parts of the rows above its own, and itself; parts of one row do not know each other.
ROWS = (
    ("errors",),
    ("config", "runlog", "intervals"),
    ("kernels",),
    ("model",),
    ("sandbox", "problems"),
    ("data",),
    ("train", "infer", "environments"),
    ("ttc", "machine"),
    ("rl",),
    ("eval", "serve"),
    ("stages",),
    ("initialize",),
    ("commands",),
    ("cli",),
)
HEIGHT = {part: height for height, row in enumerate(ROWS) for part in row}
MAX_LINES = 450
# Slow to import: a command such as `openzaya --help`, and reading a recipe, must not wait for them.
HEAVY = ("torch", "transformers", "matplotlib", "pyarrow", "tensorboard")


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def violations(part: str, source: str) -> list[str]:
    found = []
    for line, name in imports(source):
        if not name.startswith("openzaya."):
            continue
        other = name.split(".")[1]
        if other not in HEIGHT:
            continue  # `from openzaya import load` or __version__: the public names
        if other != part and HEIGHT[other] >= HEIGHT[part]:
            found.append(f"line {line}: {part} imports {other}")
    return found


def test_every_part_has_its_place():
    parts = {part_of(file) for file in FILES} - {"__init__"}
    assert parts <= HEIGHT.keys()
    assert len(FILES) > 40, "the package was found"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    if part_of(file) != "__init__":
        assert violations(part_of(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("model", "from openzaya.data.chat import render"),
        ("model", "def late():\n    import openzaya.train.loop"),
        ("train", "from openzaya.infer.generate import generate"),
        ("errors", "from openzaya.config import load_recipe"),
        ("problems", "from openzaya import data"),
    ],
)
def test_a_planted_import_is_seen(part, source):
    assert violations(part, source)


def test_the_model_knows_nothing_of_other_processes():
    for file in (PACKAGE / "model").glob("*.py"):
        source = file.read_text()
        assert "torch.distributed" not in source, file
        assert not [name for _, name in imports(source) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("module", ["openzaya", "openzaya.cli", "openzaya.config", "openzaya.runlog"])
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_says_what_it_is_and_stays_readable(file):
    source = file.read_text()
    assert ast.get_docstring(ast.parse(source)), "a file opens with what it is"
    assert source.count("\n") <= MAX_LINES


def test_every_test_file_is_collected():
    """A file whose name pytest does not match would pass unseen."""
    tests = Path(__file__).parent
    for file in tests.rglob("*.py"):
        has_tests = any(
            isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            for node in ast.parse(file.read_text()).body
        )
        assert not has_tests or file.name.startswith("test_"), file
