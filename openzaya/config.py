"""Recipes: TOML files that say how a stage of work is done, and where each of their values came from.

A recipe is sparse: it holds what differs from the defaults of its schema (a frozen pydantic model
that stands beside the component it configures). Values are looked up in this order, later wins:

1. the schema's defaults;
2. the file named by ``base = "../other.toml"`` (relative to the file that says so, and recursive);
3. the file itself; tables merge key by key, lists and plain values are replaced whole;
4. overrides ``key.sub=value`` from the command line. The value is read as TOML (``3``, ``1e-3``,
   ``true``, ``[1, 2]``) and taken as plain text where it is none. A number as part of the key
   addresses an entry of a list: ``sources.0.weight=2``.

Unknown keys are errors that name the nearest known one. ``Resolved.to_toml`` writes every value out;
the text is itself a recipe that resolves to the same values, and is saved with each run.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from openzaya.errors import ConfigError

SchemaT = TypeVar("SchemaT", bound=BaseModel)

BASE_KEY = "base"
DEFAULT_ORIGIN = "default"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")
_HEADER = re.compile(r"\s*(\[\[?)(.+?)(\]\]?)\s*(#.*)?\Z")
_ASSIGNMENT = re.compile(r"\s*[\w\"'-][^=#\[\]]*=")


@dataclass(frozen=True)
class Resolved(Generic[SchemaT]):
    """A validated recipe together with the origin of each of its values."""

    value: SchemaT
    path: Path
    origins: Mapping[str, str]
    """Dotted key -> ``file:line``, ``override`` or ``base`` of a list's entry; absent means default."""

    def origin(self, key: str) -> str:
        """Where the dotted ``key`` got its value: ``file:line``, ``override: TEXT`` or ``default``."""
        return _origin_of(key, self.origins)

    def to_toml(self) -> str:
        """Every value, defaults included, as a recipe that needs no base."""
        return dump_toml(self.value.model_dump(mode="json"))

    def describe(self) -> str:
        """One aligned line a value: ``key = value  # origin``."""
        rows = [(f"{key} = {_inline(value)}", self.origin(key)) for key, value in _leaves(self._plain())]
        width = min(max((len(left) for left, _ in rows), default=0), 72)
        return "\n".join(f"{left:<{width}}  # {origin}" for left, origin in rows)

    def _plain(self) -> dict[str, Any]:
        return _without_none(self.value.model_dump(mode="json"))


def load_recipe(path: str | Path, schema: type[SchemaT], overrides: Sequence[str] = ()) -> Resolved[SchemaT]:
    """Read ``path``, its bases and the ``overrides``, and validate them against ``schema``.

    Raises :class:`ConfigError` for a missing or malformed file, a cycle of bases, an unknown key or
    a value that the schema refuses; all findings of the schema come in one message.
    """
    path = Path(path)
    values, origins = _read_with_bases(path, ())
    for override in overrides:
        _apply_override(values, origins, override)
    try:
        value = schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, schema, str(path), origins)) from None
    return Resolved(value=value, path=path, origins=origins)


def describe_validation_error(
    error: ValidationError, schema: type[BaseModel], what: str, origins: Mapping[str, str] | None = None
) -> str:
    """Pydantic's findings as one message: key, value, origin, and the nearest known key for an unknown one."""
    lines = []
    for item in error.errors():
        is_unknown = item["type"] == "extra_forbidden"
        parts, known = _locate(schema, item["loc"][:-1] if is_unknown else item["loc"])
        key = ".".join([*parts, str(item["loc"][-1])] if is_unknown else parts)
        origin = _origin_of(key, origins or {})
        place = "" if origin == DEFAULT_ORIGIN else f" ({origin})"
        if is_unknown:
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"unknown key '{key}'{place}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"'{key}' is required; set it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}={item['input']!r}{place}: {message}" if key else message)
    return f"{what}: " + "\n  ".join(lines)


# --- writing TOML ---------------------------------------------------------------------------------


def dump_toml(values: Mapping[str, Any]) -> str:
    """``values`` as TOML text that reads back equal.

    Holds strings, booleans, numbers, lists and tables with string keys. ``None`` in a table is left
    out (TOML has no null); anything else raises :class:`ConfigError` naming the key.
    """
    lines: list[str] = []
    _dump_table(_without_none(dict(values)), (), lines)
    return "\n".join(lines).strip("\n") + "\n"


def _dump_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    """Plain values first: after a sub-table's header they would belong to it."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    table_lists = {key: value for key, value in table.items() if _is_list_of_tables(value)}
    for key, value in table.items():
        if key not in tables and key not in table_lists:
            lines.append(f"{_key(key)} = {_inline(value, (*path, key))}")
    for key, value in tables.items():
        lines += ["", f"[{_dotted((*path, key))}]"]
        _dump_table(value, (*path, key), lines)
    for key, entries in table_lists.items():
        for entry in entries:
            lines += ["", f"[[{_dotted((*path, key))}]]"]
            _dump_table(entry, (*path, key), lines)


def _inline(value: Any, path: tuple[str, ...] = ()) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(entry, path) for entry in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_inline(entry, (*path, key))}" for key, entry in value.items()) + "}"
    raise ConfigError(
        f"{_dotted(path)}={value!r} cannot be written as TOML; use text, numbers, booleans, lists or tables"
    )


def _key(key: str) -> str:
    return key if _BARE_KEY.match(key) else _inline(key)


def _dotted(path: Sequence[str]) -> str:
    return ".".join(_key(part) for part in path)


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_without_none(entry) for entry in value]
    return value


# --- reading and merging --------------------------------------------------------------------------


def _read_with_bases(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merged values and origins of ``path`` and its bases; ``children`` are the files that led here."""
    identity = path.resolve()
    if identity in children:
        chain = " -> ".join(file.name for file in (*children, identity))
        raise ConfigError(f"{path}: the recipes name each other as base ({chain}); remove one of the base keys")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        wanted = f" (base of {children[-1].name})" if children else ""
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read recipe {path}{wanted}: {reason}; check the path") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct it there") from None
    origins = {key: f"{path}:{line}" for key, line in _key_lines(text).items() if key != BASE_KEY}
    base = values.pop(BASE_KEY, None)
    if base is None:
        return values, origins
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={base!r} must be the path of one recipe, in quotes")
    merged, base_origins = _read_with_bases(path.parent / base, (*children, identity))
    _merge(merged, values, (), base_origins)
    return merged, base_origins | origins


def _merge(below: dict[str, Any], above: dict[str, Any], path: tuple[str, ...], origins: dict[str, str]) -> None:
    for key, value in above.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value, here, origins)
        else:
            below[key] = value
            _forget(origins, _dotted(here))


def _forget(origins: dict[str, str], key: str) -> None:
    """Drop what is known about a value, and about all inside it, that is being replaced."""
    for known in [known for known in origins if known == key or known.startswith(f"{key}.")]:
        del origins[known]


def _key_lines(text: str) -> dict[str, int]:
    """Line number of every value, by dotted key; entries of a list of tables are numbered."""
    lines = text.splitlines()
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    prefix: tuple[str, ...] = ()
    index = 0
    while index < len(lines):
        line = lines[index]
        if header := _HEADER.match(line):
            prefix = _numbered(_key_path(header[2]), counts, is_new_entry=header[1] == "[[")
        elif _ASSIGNMENT.match(line):
            end, parsed = _assignment_end(lines, index)
            for path, _ in _leaves(parsed):
                found.setdefault(_dotted((*prefix, *_split(path))), index + 1)
            index = end
            continue
        index += 1
    return found


def _assignment_end(lines: list[str], start: int) -> tuple[int, dict[str, Any]]:
    """The value may span lines (arrays, multi-line strings): it ends where the text first parses."""
    for end in range(start + 1, len(lines) + 1):
        try:
            return end, tomllib.loads("\n".join(lines[start:end]))
        except tomllib.TOMLDecodeError:
            continue
    return start + 1, {}


def _numbered(path: tuple[str, ...], counts: dict[str, int], *, is_new_entry: bool) -> tuple[str, ...]:
    """``path`` of a header with the entry's number put in after each part that is a list of tables."""
    numbered: tuple[str, ...] = ()
    for depth, part in enumerate(path):
        numbered = (*numbered, part)
        key = _dotted(numbered)
        if is_new_entry and depth == len(path) - 1:
            counts[key] = counts.get(key, -1) + 1
        if key in counts:
            numbered = (*numbered, str(counts[key]))
    return numbered


def _key_path(text: str) -> tuple[str, ...]:
    """The parts of a dotted key, quotes resolved."""
    value: Any = tomllib.loads(f"{text} = 0")
    parts: list[str] = []
    while isinstance(value, dict):
        part, value = next(iter(value.items()))
        parts.append(part)
    return tuple(parts)


def _split(dotted: str) -> tuple[str, ...]:
    return _key_path(dotted)


def _leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every value that is not itself a non-empty table, with its dotted key; lists of tables are entered."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        elif _is_list_of_tables(value):
            for number, entry in enumerate(value):
                yield from _leaves(entry, (*path, key, str(number)))
        else:
            yield _dotted((*path, key)), value


def _origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Origin of ``key``, of the list it is an entry of, or of the first value inside it."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (origin := origins.get(".".join(parts[:length]))) is not None:
            return origin
    return next((origin for known, origin in origins.items() if known.startswith(f"{key}.")), DEFAULT_ORIGIN)


def _apply_override(values: dict[str, Any], origins: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override '{override}' is not of the form key.sub=value; write, for example, train.seed=1")
    target: Any = values
    for depth, part in enumerate(parts):
        place: Any = part
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                around = ".".join(parts[:depth])
                raise ConfigError(
                    f"override '{override}': '{around}' is a list of {len(target)} entries; give a number below that"
                )
            place = int(part)
        elif not isinstance(target, dict):
            around = ".".join(parts[:depth])
            raise ConfigError(
                f"override '{override}': '{around}' is the plain value {target!r}, not a table; stop there"
            )
        if depth == len(parts) - 1:
            target[place] = _parse_override_value(text)
            _forget(origins, _dotted(parts))
            for leaf, _ in _leaves({part: target[place]}, tuple(parts[:-1])):
                origins[leaf] = f"override {override}"
        elif isinstance(target, dict):
            target = target.setdefault(place, {})
        else:
            target = target[place]


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"key=value"`` as key and value, the value read as in an override; raises :class:`ConfigError`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"'{text}' is not of the form key=value; write, for example, num_hidden_layers=3")
    return key.strip(), _parse_override_value(value)


def _parse_override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed.get("value")
    # `1 \n other = 2` parses too, and a date is text to every recipe: both are meant literally.
    is_literal = len(parsed) == 1 and not isinstance(value, datetime.date | datetime.time)
    return value if is_literal else text


# --- schemas --------------------------------------------------------------------------------------


def _locate(schema: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """Pydantic's ``location`` as the reader's key, and the field names that are allowed there.

    Pydantic puts the tag or class name of a union's member into the location; the file has no such key.
    """
    candidates: list[type[BaseModel]] = [schema]
    key: list[str] = []
    for part in location:
        fields = [model.model_fields[str(part)] for model in candidates if part in model.model_fields]
        members = [model for model in candidates if part == model.__name__ or part in _literal_values(model)]
        if fields:
            candidates = [model for field in fields for model in _models_in(field.annotation)]
        elif members:
            candidates = members
            continue
        key.append(str(part))
    return key, list(dict.fromkeys(name for candidate in candidates for name in candidate.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _literal_values(model: type[BaseModel]) -> set[Any]:
    """Values of the model's ``Literal`` fields: a discriminated union's tags are among them."""
    return {
        value
        for field in model.model_fields.values()
        if typing.get_origin(field.annotation) is typing.Literal
        for value in typing.get_args(field.annotation)
    }
