"""The documents are true where a program can tell: links and named files exist, commands and settings are known."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from openzaya.cli import app
from openzaya.config import load_recipe
from openzaya.stages import stage_schema

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@by_name
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@by_name
def test_named_files_exist(document):
    for name in re.findall(r"`((?:openzaya|tests|recipes|benchmarks|docs)/[\w./-]+)`", document.read_text()):
        assert (ROOT / name).exists(), f"{document.name}: {name}"


def test_every_module_stands_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "openzaya").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py" and "problems/" not in name:
            assert f"`{name}`" in text, f"docs/architecture.md does not say what {name} is"


def commands(text: str) -> list[list[str]]:
    """The ``openzaya`` commands in fenced blocks and usage lines, as words without the comment."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    return [shlex.split(line, comments=True)[1:] for line in blocks.splitlines() if line.startswith("openzaya ")]


def check_command(words: list[str]) -> None:
    verb = VERBS[words[0]]
    options = {option for parameter in verb.params for option in parameter.opts} | {"--help"}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= options, f"openzaya {' '.join(words)}: no such option: {given - options}"
    for word in words[1:]:
        if word.startswith("recipes/"):
            assert (ROOT / word).exists(), word


@by_name
def test_commands_exist(document):
    for words in commands(document.read_text()):
        check_command(words)


@by_name
def test_recipes_in_documents_read(document, tmp_path):
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", document.read_text(), flags=re.DOTALL)):
        if "kind" in tomllib.loads(block) and "base" not in tomllib.loads(block):
            path = tmp_path / f"{number:02}-block.toml"
            path.write_text(block)
            load_recipe(path, stage_schema(path))


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_an_example_that_exists(verb):
    example = VERBS[verb].epilog
    assert example.startswith(f"Example: openzaya {verb} ")
    check_command(shlex.split(example.removeprefix("Example: openzaya ")))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        text = "\n".join(re.findall(r"`[^`]*`|```.*?```", document.read_text(), flags=re.DOTALL))
        for target in re.findall(r"\bmake ([a-z-]+)", text):
            assert target in targets, f"{document.name}: make {target}"


def test_the_metrics_table_names_what_training_logs():
    table = set(re.findall(r"`([a-z]+/[a-z_0-9]+)`", (ROOT / "docs" / "run-directory.md").read_text()))
    logged = set()
    for file in (ROOT / "openzaya" / "train").glob("*.py"):
        logged |= set(re.findall(r'"((?:loss|train|route|residual|optim|data|time)/[a-z_0-9]+)"', file.read_text()))
    # schedule_scale goes from the optimiser to the balancer and is not logged.
    assert table == logged - {"optim/schedule_scale"}


def test_pinned_torch_is_the_one_that_make_installs():
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert f"TORCH_VERSION := {pins['torch']}\n" in (ROOT / "Makefile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in wanted:
        name = re.split(r"[<>=!~ ]", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"constraints.txt does not pin {name}"
