"""Reading documents: text files, JSON lines and parquet, in a deterministic shuffled order.

Files are found from folders, globs or names and sorted; each holds one or more groups of records (a
text file is one record, a JSONL file gives groups of 256 lines, a parquet file its row groups). Each
epoch shuffles the groups and the records inside a group by a generator seeded with (seed, epoch), so
memory holds one group and the cursor is three integers.

``python-stdlib`` names the Python standard library's source files found on this machine, in sorted
order: the same on every machine with the same Python version.
"""

from __future__ import annotations

import glob
import json
import random
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from openzaya.errors import DataError

PYTHON_STDLIB = "python-stdlib"
RECORD_SUFFIXES = (".jsonl", ".parquet")
FOLDER_SUFFIXES = (".txt", ".md", ".py", *RECORD_SUFFIXES)
LINES_PER_GROUP = 256

_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
"""Folders of the standard library left out: tests, other packages, and tables of character codes."""


@dataclass(frozen=True)
class Record:
    """One document as read: ``where`` names file and line for error messages."""

    where: str
    value: Any


class DocumentFile(Protocol):
    """A file of records in groups that can be read independently."""

    num_groups: int

    def read_group(self, group: int) -> list[Record]: ...


class TextFile:
    """A whole file as one record (a string); ``source_code`` honours Python's encoding declarations."""

    def __init__(self, path: Path, *, source_code: bool = False) -> None:
        self.path = path
        self.num_groups = 1
        self._source_code = source_code

    def read_group(self, group: int) -> list[Record]:
        try:
            if self._source_code:
                with tokenize.open(self.path) as file:
                    return [Record(str(self.path), file.read())]
            return [Record(str(self.path), self.path.read_bytes().decode("utf-8"))]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: byte {error.start} is not UTF-8; convert the file, or leave it out"
            ) from None
        except (OSError, SyntaxError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); fix or leave out the file") from None


class JsonLinesFile:
    """One JSON object a line; blank lines are passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: list[int] = []
        """Where each group's first line begins, in bytes."""
        position = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file):
                    if number % LINES_PER_GROUP == 0:
                        self._offsets.append(position)
                    position += len(line)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); fix or leave out the file") from None
        self.num_groups = len(self._offsets)

    def read_group(self, group: int) -> list[Record]:
        records = []
        with self.path.open("rb") as file:
            file.seek(self._offsets[group])
            for number, line in enumerate(islice(file, LINES_PER_GROUP), group * LINES_PER_GROUP + 1):
                if line.strip():
                    records.append(self._parse(line, number))
        return records

    def _parse(self, line: bytes, number: int) -> Record:
        where = f"{self.path}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {error.start} of the line is not UTF-8; fix or remove the line") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON value ({error}); fix or remove the line") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: holds a {type(value).__name__}; give one JSON object a line")
        return Record(where, value)


class ParquetFile:
    """One record a row, one group a row group."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise DataError(
                f"{path}: reading parquet needs pyarrow; install it, or convert the file to JSONL"
            ) from None
        self.path = path
        try:
            metadata = parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error}); fix or leave out the file") from None
        self.num_groups = metadata.num_row_groups
        self._first_rows = [0]
        for group in range(metadata.num_row_groups):
            self._first_rows.append(self._first_rows[-1] + metadata.row_group(group).num_rows)

    def read_group(self, group: int) -> list[Record]:
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                rows = file.read_row_group(group).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: row group {group} cannot be read ({error}); fix the file") from None
        return [Record(f"{self.path}:row {self._first_rows[group] + i + 1}", row) for i, row in enumerate(rows)]


def find_files(paths: str | Path | Sequence[str | Path]) -> list[DocumentFile]:
    """The document files that ``paths`` name, sorted by path, each once.

    A folder means all its .txt, .md, .py, .jsonl and .parquet files, at any depth; a glob or a name
    means exactly those files, read as text unless they end in .jsonl or .parquet.
    """
    wanted = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found: set[Path] = set()
    source_code: set[Path] = set()
    for name in wanted:
        if str(name) == PYTHON_STDLIB:
            source_code |= set(_stdlib_files())
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            matches = [file for file in path.rglob("*") if file.suffix in FOLDER_SUFFIXES and file.is_file()]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        if not matches:
            raise DataError(
                f"'{name}' names no files; give a file, a glob, '{PYTHON_STDLIB}', or a folder with "
                f"{', '.join(FOLDER_SUFFIXES)} files"
            )
        found |= set(matches)
    return [_open(path, path in source_code) for path in sorted(found | source_code)]


def _open(path: Path, source_code: bool) -> DocumentFile:
    if path.suffix == ".jsonl":
        return JsonLinesFile(path)
    if path.suffix == ".parquet":
        return ParquetFile(path)
    return TextFile(path, source_code=source_code)


def _stdlib_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        if not _STDLIB_SKIPPED.intersection(path.relative_to(root).parts[:-1]) and path.is_file():
            yield path


class DocumentStream:
    """Endless records in shuffled epochs with a cursor (epoch, group, record)."""

    def __init__(self, files: Sequence[DocumentFile], seed: int) -> None:
        self._groups = [(file, group) for file in files for group in range(file.num_groups)]
        if not self._groups:
            raise DataError(f"{len(files)} files hold no records; give files with data")
        self.seed = seed
        self.epoch = 0
        self._group = 0
        self._record = 0
        self._order: tuple[int, list[int]] | None = None
        self._records: tuple[tuple[int, int], list[Record]] | None = None

    def peek(self, num_records: int) -> list[Record]:
        """Up to ``num_records`` records from the cursor on, at least one, none beyond the current group."""
        groups_passed = 0
        while self._record >= len(self._current_group()):
            self._record = 0
            self._group += 1
            groups_passed += 1
            if self._group == len(self._groups):
                self._group = 0
                self.epoch += 1
            if groups_passed > len(self._groups):
                raise DataError(f"none of {len(self._groups)} groups of records holds any; give files with data")
        return self._current_group()[self._record : self._record + num_records]

    def advance(self) -> None:
        """Move the cursor past the record that ``peek`` gives first."""
        self._record += 1

    def _current_group(self) -> list[Record]:
        key = (self.epoch, self._group)
        if self._records is None or self._records[0] != key:
            if self._order is None or self._order[0] != self.epoch:
                order = list(range(len(self._groups)))
                random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
                self._order = (self.epoch, order)
            file, group = self._groups[self._order[1][self._group]]
            records = file.read_group(group)
            random.Random(f"{self.seed}/{self.epoch}/{self._group}").shuffle(records)
            self._records = (key, records)
        return self._records[1]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and the number of groups by which changed data is noticed."""
        return {
            "seed": self.seed,
            "num_groups": len(self._groups),
            "epoch": self.epoch,
            "group": self._group,
            "record": self._record,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved cursor; ``DataError`` where seed or data differ."""
        if state["num_groups"] != len(self._groups) or state["seed"] != self.seed:
            raise DataError(
                f"the saved cursor belongs to {state['num_groups']} groups of records with seed {state['seed']}, here "
                f"are {len(self._groups)} with seed {self.seed}; restore the data and seed, or start the phase anew"
            )
        self.epoch, self._group, self._record = state["epoch"], state["group"], state["record"]
