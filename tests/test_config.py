"""Recipes: inheritance, overrides, origins, messages for mistakes, and the resolved text as a recipe."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from openzaya.config import dump_toml, load_recipe
from openzaya.errors import ConfigError


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSource(Strict):
    kind: Literal["text"] = "text"
    folder: str = "."
    weight: float = 1.0


class ProblemSource(Strict):
    kind: Literal["problems"]
    families: tuple[str, ...] = ()
    weight: float = Field(1.0, gt=0)


class Optimiser(Strict):
    learning_rate: float = 0.01
    warm_up_steps: int = Field(10, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Recipe(Strict):
    name: str
    seed: int = 0
    start_from: str | None = None
    optimiser: Optimiser = Optimiser()
    sources: tuple[Annotated[TextSource | ProblemSource, Field(discriminator="kind")], ...] = ()


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


BASE = """\
name = "base"
seed = 7
[optimiser]
learning_rate = 0.5
betas = [
    0.8,
    0.9,
]
warm_up_steps = 3
"""

CHILD = """\
base = "../base.toml"
name = "child"

[optimiser]
warm_up_steps = 4  # the base has 3

[[sources]]
kind = "text"
[[sources]]
kind = "problems"
families = ["sorting"]
weight = 2.5
"""


def test_values_come_from_default_base_file_and_override(write):
    base = write("base.toml", BASE)
    child = write("stages/child.toml", CHILD)
    resolved = load_recipe(child, Recipe, ["optimiser.betas=[0.1, 0.2]", "sources.0.folder=data"])

    assert resolved.value.name == "child"
    assert resolved.value.seed == 7
    assert resolved.value.optimiser == Optimiser(learning_rate=0.5, warm_up_steps=4, betas=(0.1, 0.2))
    assert resolved.value.sources == (
        TextSource(folder="data"),
        ProblemSource(kind="problems", families=("sorting",), weight=2.5),
    )
    base_name = child.parent / ".." / base.name
    assert resolved.origin("name") == f"{child}:2"
    assert resolved.origin("seed") == f"{base_name}:2"
    assert resolved.origin("optimiser.learning_rate") == f"{base_name}:4"
    assert resolved.origin("optimiser.warm_up_steps") == f"{child}:5"
    assert resolved.origin("optimiser.betas") == "override optimiser.betas=[0.1, 0.2]"
    assert resolved.origin("sources.0.folder") == "override sources.0.folder=data"
    assert resolved.origin("sources.0.weight") == "default"
    assert resolved.origin("sources.1.weight") == f"{child}:12"
    assert resolved.origin("start_from") == "default"


def test_line_numbers_count_values_that_span_lines(write):
    base = write("base.toml", BASE)
    assert load_recipe(base, Recipe).origin("optimiser.warm_up_steps") == f"{base}:9"


def test_a_list_of_the_child_replaces_the_base_s_list_and_its_origins(write):
    write("base.toml", 'name = "b"\nsources = [{kind = "text", weight = 3.0}, {kind = "text"}]\n')
    child = write("child.toml", 'base = "base.toml"\nsources = [{kind = "text"}]\n')
    resolved = load_recipe(child, Recipe)
    assert resolved.value.sources == (TextSource(),)
    assert resolved.origin("sources.0.weight") == "default"
    assert resolved.origin("sources.0.kind") == f"{child}:2"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("seed=3", "seed", 3),
        ("name=plain words, no quotes", "name", "plain words, no quotes"),
        ('name="quoted"', "name", "quoted"),
        ("name=2026-01-01", "name", "2026-01-01"),
        ("name=1\nseed=99", "name", "1\nseed=99"),
        ("name=a=b", "name", "a=b"),
        ("start_from=runs/nano", "start_from", "runs/nano"),
    ],
)
def test_override_values(write, override, field, value):
    resolved = load_recipe(write("r.toml", 'name = "r"\n'), Recipe, [override])
    assert getattr(resolved.value, field) == value
    if field != "seed":
        assert resolved.value.seed == 0


def test_an_override_makes_the_tables_it_needs(write):
    resolved = load_recipe(write("r.toml", 'name = "r"\n'), Recipe, ["optimiser.learning_rate=1e-3"])
    assert resolved.value.optimiser.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ('name = "r"\nsede = 1\n', [], ["sede", "did you mean 'seed'", ":2"]),
        ('name = "r"\n[optimiser]\nlearning_rat = 1.0\n', [], ["optimiser.learning_rat", "'learning_rate'", ":3"]),
        ('name = "r"\n[optimizer]\nlearning_rate = 1.0\n', [], ["optimizer", "did you mean 'optimiser'"]),
        ('name = "r"\n[[sources]]\nkind = "problems"\nfamily = "a"\n', [], ["family", "'families'", ":4"]),
        ('name = "r"\n[[sources]]\nkind = "problems"\nzzzz = "a"\n', [], ["known keys: kind, families, weight"]),
        (
            'name = "r"\n',
            ["optimiser.warm_up_steps=-1"],
            ["warm_up_steps=-1", "override", "greater than or equal to 0"],
        ),
        ("seed = 1\n", [], ["'name' is required"]),
        ('name = "r"\n', ["seed"], ["key.sub=value"]),
        ('name = "r"\n', ["optimiser..x=1"], ["key.sub=value"]),
        ('name = "r"\n', ["name.x=1"], ["'name' is the plain value 'r'"]),
        ('name = "r"\nsources = [{kind = "text"}]\n', ["sources.1.weight=1"], ["list of 1"]),
        ('name = "r"\nname = "s"\n', [], ["not valid TOML", "line 2"]),
        ('base = 3\nname = "r"\n', [], ["base=3"]),
        ('base = "absent.toml"\n', [], ["absent.toml", "base of r.toml", "No such file"]),
    ],
)
def test_mistakes_are_named_with_their_remedy(write, text, overrides, expected):
    path = write("r.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, Recipe, overrides)
    for part in expected:
        assert part in str(caught.value)


def test_all_findings_come_at_once(write):
    path = write("r.toml", 'name = "r"\nsede = 1\nseed = "x"\n')
    with pytest.raises(ConfigError, match=r"(?s)seed='x'.*sede"):
        load_recipe(path, Recipe)


def test_a_cycle_of_bases_is_refused(write):
    path = write("a.toml", 'base = "sub/b.toml"\n')
    write("sub/b.toml", 'base = "../a.toml"\n')
    with pytest.raises(ConfigError, match=r"a.toml -> b.toml -> a.toml"):
        load_recipe(path, Recipe)


def test_the_resolved_text_is_a_recipe_with_the_same_values(write):
    write("base.toml", BASE)
    resolved = load_recipe(write("stages/child.toml", CHILD), Recipe, ['start_from="C:\\\\run \\"x\\""'])
    again = load_recipe(write("resolved.toml", resolved.to_toml()), Recipe)
    assert again.value == resolved.value
    assert again.to_toml() == resolved.to_toml()
    assert again.origin("sources.0.weight").startswith(str(again.path)), "defaults are written out"


def test_describe_shows_every_value_and_its_origin(write):
    path = write("r.toml", 'name = "r"\n')
    lines = load_recipe(path, Recipe, ["seed=5"]).describe().splitlines()
    table = {line.split(" = ")[0]: line for line in lines}
    assert set(table) == {
        *("name", "seed", "sources"),
        *("optimiser.learning_rate", "optimiser.warm_up_steps", "optimiser.betas"),
    }
    assert table["name"].endswith(f"# {path}:1")
    assert table["seed"].split() == ["seed", "=", "5", "#", "override", "seed=5"]
    assert table["optimiser.betas"].endswith("# default")


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), text)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=12
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.dictionaries(text, values, max_size=4))
def test_dump_toml_reads_back_equal(table):
    assert tomllib.loads(dump_toml(table)) == table


def test_dump_toml_leaves_none_out_and_refuses_what_toml_lacks():
    assert dump_toml({"a": None, "b": {"c": None, "d": 1}}) == "[b]\nd = 1\n"
    with pytest.raises(ConfigError, match=r"b\.c=.*cannot be written"):
        dump_toml({"b": {"c": object()}})
