"""The journal of runs: every finished rollout in one SQLite file, so that a run that was stopped goes on.

    application_id, user_version   the file is a journal, and of which format
    runs          run_key, settings, question, capabilities, times, and the result once there is one
    candidates    run_key, round, slot, attempt, digest of the call -> the candidate as JSON

A rollout is written when it ends, before anybody uses it; one that stands there is never asked for again. It is found
by its place in the run AND the digest of its call, so a rollout of another prompt is never taken for it. A failed
rollout is written too, for the record, and is asked for again after a restart.

Writes go to SQLite's write-ahead log without waiting for the disk (tens of microseconds): a process that is killed
loses nothing, a power failure may cost the last rollouts but not the file. One process writes a file at a time, under
a lock of the operating system that ends with the process; any number may read it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from openzaya.errors import RSAError
from openzaya.ttc.completer import Capabilities
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.journal_file import connect, connect_read_only, explained, release_lock
from openzaya.ttc.results import Candidate, Round, candidate_from_dict, round_to_dict

APPLICATION_ID = 0x4F5A524A
FORMAT = 1
BYTES_PER_TOKEN = 8
"""Room for one generated token: JSON escapes, and a second time in the result."""

_TABLES = (
    """CREATE TABLE runs (
        run_key TEXT PRIMARY KEY,
        config TEXT NOT NULL,
        question TEXT NOT NULL,
        capabilities TEXT NOT NULL,
        begun_unix_s REAL NOT NULL,
        finished_unix_s REAL,
        result TEXT
    )""",
    """CREATE TABLE candidates (
        run_key TEXT NOT NULL REFERENCES runs,
        round INTEGER NOT NULL,
        slot INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        digest TEXT NOT NULL,
        status TEXT NOT NULL,
        num_failures INTEGER NOT NULL,
        candidate TEXT NOT NULL,
        recorded_unix_s REAL NOT NULL,
        PRIMARY KEY (run_key, round, slot, attempt, digest)
    )""",
)


class JournalProtocol(Protocol):
    """What a run asks of its journal. All methods are quick enough for an event loop and may be called by threads."""

    def begin(self, run_key: str, config: RSAConfig, question: Any, capabilities: Capabilities) -> None: ...

    def find(self, run_key: str, round_index: int, slot: int, attempt: int, digest: str) -> Candidate | None: ...

    def record(self, run_key: str, candidate: Candidate, attempt: int, digest: str) -> None: ...

    def finish(self, run_key: str, result: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunSummary:
    """One run of a journal, without its rollouts."""

    run_key: str
    question: Any
    begun_unix_s: float
    finished_unix_s: float | None
    num_done: int
    """Rollouts that are there."""
    num_rollouts: int
    """Rollouts that the settings ask for."""

    @property
    def is_finished(self) -> bool:
        return self.finished_unix_s is not None


class MemoryJournal:
    """A journal that ends with the process; for runs nobody wants to keep."""

    def __init__(self) -> None:
        self.results: dict[str, Mapping[str, Any]] = {}
        self._candidates: dict[tuple[str, int, int, int, str], Candidate] = {}

    def begin(self, run_key: str, config: RSAConfig, question: Any, capabilities: Capabilities) -> None:
        """Nothing to compare: a run of this process has the settings it was given."""

    def find(self, run_key: str, round_index: int, slot: int, attempt: int, digest: str) -> Candidate | None:
        found = self._candidates.get((run_key, round_index, slot, attempt, digest))
        return None if found is None else replace(found, is_resumed=True)

    def record(self, run_key: str, candidate: Candidate, attempt: int, digest: str) -> None:
        if candidate.status == "done":
            self._candidates[run_key, candidate.round_index, candidate.slot, attempt, digest] = candidate

    def finish(self, run_key: str, result: Mapping[str, Any]) -> None:
        self.results[run_key] = result


class Journal:
    """A journal in a file; made by :meth:`open`, closed by :meth:`close` or a ``with`` block."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock_descriptor: int | None) -> None:
        self.path = path
        self._connection = connection
        self._lock_descriptor = lock_descriptor
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False) -> Self:
        """Opens or makes a journal.

        With ``read_only`` it must exist, is not changed, and may be in use by another process.

        Raises:
            RSAError: it cannot be read or written, is no journal, has a newer format, or is in use.
        """
        path = Path(path).absolute()
        if read_only:
            if not path.is_file():
                raise RSAError(f"there is no journal {path}; name the file of an earlier run")
            journal = cls(path, connect_read_only(path), None)
        else:
            journal = cls(path, *connect(path))
        try:
            journal._prepare(read_only)
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Moves all into the one file and lets others write it. A second call does nothing."""
        with self._mutex:
            self._connection.close()
            release_lock(self.path, self._lock_descriptor)
            self._lock_descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    # --- writing --------------------------------------------------------------------------------

    def begin(self, run_key: str, config: RSAConfig, question: Any, capabilities: Capabilities) -> None:
        """Starts a run, or goes on with one that has the same settings, question and model.

        ``question`` is a JSON value or a dataclass of such: messages, tools and what else the answer depends on.

        Raises:
            RSAError: ``run_key`` stands for another run, or the disk has no room for all rollouts.
        """
        settings, asked = config.model_dump(mode="json"), json.loads(_json(question))
        described = _without_secrets(asdict(capabilities))
        kept = "SELECT config, question, capabilities FROM runs WHERE run_key = ?"
        row = self._one(kept, run_key)
        if row is None:
            self._check_room(config)
            self._write(
                "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, NULL, NULL)",
                (run_key, _json(settings), _json(asked), _json(described), time.time()),
            )
            row = self._one(kept, run_key)  # a thread that was quicker may have begun another run under this key
        assert row is not None
        self._check_same(run_key, [json.loads(value) for value in row], [settings, asked, described])

    def find(self, run_key: str, round_index: int, slot: int, attempt: int, digest: str) -> Candidate | None:
        """The finished rollout of this place and call, marked as resumed; None where there is none."""
        row = self._one(
            "SELECT candidate FROM candidates"
            " WHERE run_key = ? AND round = ? AND slot = ? AND attempt = ? AND digest = ? AND status = 'done'",
            *(run_key, round_index, slot, attempt, digest),
        )
        return None if row is None else replace(candidate_from_dict(json.loads(row[0])), is_resumed=True)

    def record(self, run_key: str, candidate: Candidate, attempt: int, digest: str) -> None:
        """Keeps a candidate that ended. A failure counts, and never replaces a rollout that is done; one that is done
        may be recorded again with what was added to it, such as its tail."""
        values = asdict(replace(candidate, is_resumed=False))
        values["error"] = _without_secrets(values["error"])
        place = (run_key, candidate.round_index, candidate.slot, attempt, digest)
        self._write(
            "INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET num_failures = num_failures + excluded.num_failures,"
            " candidate = iif(status = 'done' AND excluded.status <> 'done', candidate, excluded.candidate),"
            " recorded_unix_s = iif(status = 'done', recorded_unix_s, excluded.recorded_unix_s),"
            " status = iif(status = 'done', status, excluded.status)",
            (*place, candidate.status, int(candidate.status == "failed"), _json(values), time.time()),
        )

    def finish(self, run_key: str, result: Mapping[str, Any]) -> None:
        """Keeps the run's result, ``RSAResult.to_dict()``; of a run that is finished again, the last."""
        values = json.loads(_json(result))
        values["capabilities"] = _without_secrets(values.get("capabilities", {}))
        for one in values.get("rounds", []):
            for candidate in one["candidates"]:
                candidate["error"] = _without_secrets(candidate["error"])
        self._write(
            "UPDATE runs SET result = ?, finished_unix_s = ? WHERE run_key = ?", (_json(values), time.time(), run_key)
        )

    # --- reading --------------------------------------------------------------------------------

    def runs(self) -> list[RunSummary]:
        """All runs, in the order in which they began."""
        rows = self._all(
            "SELECT run_key, question, config, begun_unix_s, finished_unix_s,"
            " (SELECT count(DISTINCT round || ' ' || slot) FROM candidates"
            "  WHERE candidates.run_key = runs.run_key AND status = 'done')"
            " FROM runs ORDER BY begun_unix_s, rowid"
        )
        return [
            RunSummary(
                key, json.loads(question), begun, finished, num_done, RSAConfig(**json.loads(config)).num_rollouts
            )
            for key, question, config, begun, finished, num_done in rows
        ]

    def load(self, run_key: str) -> dict[str, Any]:
        """A run as ``RSAResult.to_dict`` gives it, with ``run_key``, ``question``, ``state`` and ``num_failures``.

        ``state`` is ``finished`` or ``unfinished``; an unfinished run has the rounds as far as they are there,
        nothing selected, and no answer.

        Raises:
            RSAError: no such run.
        """
        row = self._one("SELECT config, question, capabilities, result FROM runs WHERE run_key = ?", run_key)
        if row is None:
            known = ", ".join(run.run_key for run in self.runs()[:8]) or "none"
            raise RSAError(f"{self.path} has no run '{run_key}'; it has: {known}")
        config, question, capabilities = (json.loads(value) for value in row[:3])
        failures = self._one("SELECT total(num_failures) FROM candidates WHERE run_key = ?", run_key)
        marks = {"run_key": run_key, "question": question, "num_failures": int(failures[0]) if failures else 0}
        if row[3] is not None:
            return json.loads(row[3]) | marks | {"state": "finished"}
        result = self._unfinished(run_key, RSAConfig(**config))
        return result | marks | {"capabilities": capabilities, "state": "unfinished"}

    def _unfinished(self, run_key: str, config: RSAConfig) -> dict[str, Any]:
        rows = self._all(
            "SELECT candidate FROM candidates WHERE run_key = ? AND round <= ?"
            " ORDER BY status = 'done', recorded_unix_s, rowid",
            *(run_key, config.t),
        )
        rounds: dict[int, dict[int, Candidate]] = {}
        for (text,) in rows:  # of several attempts the last; a rollout that is done before one that failed
            candidate = candidate_from_dict(json.loads(text))
            rounds.setdefault(candidate.round_index, {})[candidate.slot] = candidate
        shown = []
        for index, slots in sorted(rounds.items()):
            candidates = tuple(slots[slot] for slot in sorted(slots))
            seconds = max((one.rollout.seconds for one in candidates if one.rollout is not None), default=0.0)
            shown.append(Round(index, candidates, index == config.t, seconds))
        tokens = [asdict(one.usage) for one in shown]
        return {
            "config": config.model_dump(mode="json"),
            "rounds": [round_to_dict(one) for one in shown],
            "selected": [],
            "answer": None,
            "score": None,
            "tokens": {key: sum(one[key] for one in tokens) for key in tokens[0]} if tokens else {},
            "seconds": round(sum(one.seconds for one in shown), 3),
            "stopped_early": None,
            "deviations": config.deviations,
            "warnings": config.warnings(),
        }

    # --- inside ---------------------------------------------------------------------------------

    def _prepare(self, read_only: bool) -> None:
        with self._mutex, explained(self.path):
            application_id = self._connection.execute("PRAGMA application_id").fetchone()[0]
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if application_id == APPLICATION_ID:
                if found > FORMAT:
                    raise RSAError(f"{self.path} has format {found}, this version reads {FORMAT}; update openzaya")
                if not read_only:
                    self._start_log()
                return
            tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if application_id or found or tables:
                raise RSAError(f"{self.path} is no RSA journal; name another file")
            if read_only:
                raise RSAError(f"{self.path} is empty; no run has begun in it")
            self._start_log()
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in _TABLES:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {FORMAT}")
            self._connection.execute("COMMIT")

    def _start_log(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("BEGIN IMMEDIATE")  # fails on a file that cannot be written, before any work is done
        self._connection.execute("COMMIT")

    def _check_same(self, run_key: str, kept: list[Any], given: list[Any]) -> None:
        different = [
            f"{name}={given[0].get(name)} is now asked, {name}={kept[0].get(name)} is in the file"
            for name in sorted(kept[0].keys() | given[0].keys())
            if kept[0].get(name) != given[0].get(name)
        ]
        if kept[1] != given[1]:
            different.append("the question or its messages are not the same")
        if kept[2]["model"] != given[2]["model"]:
            different.append(f"model {given[2]['model']!r} is now asked, {kept[2]['model']!r} is in the file")
        if different:
            raise RSAError(
                f"run '{run_key}' in {self.path} was begun with other settings: {'; '.join(different)}. "
                "Resume it with the same settings, or name another file"
            )

    def _check_room(self, config: RSAConfig) -> None:
        num_tokens = sum(
            config.width(index) * (config.final_budget if index == config.t else config.beta)
            for index in range(config.t + 1)
        )
        free_bytes, needed_bytes = shutil.disk_usage(self.path.parent).free, num_tokens * BYTES_PER_TOKEN
        if free_bytes < needed_bytes:
            raise RSAError(
                f"{self.path.parent} has {free_bytes / 1e6:,.0f} MB free, the journal of this run may take "
                f"{needed_bytes / 1e6:,.0f} MB; make room, or name a file on another disk"
            )

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._mutex, explained(self.path):
            self._connection.execute(statement, values)

    def _one(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        with self._mutex, explained(self.path):
            row: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
        return row

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._mutex, explained(self.path):
            return self._connection.execute(statement, values).fetchall()


def make_run_key(config: RSAConfig, question: Any, label: str = "") -> str:
    """A name for a run: ``label`` and a hash of settings and question, so that equal runs are one."""
    text = _json({"config": config.model_dump(mode="json"), "question": question})
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{label}-{digest}" if label else digest


_USER_INFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@?#'\"]*@", re.IGNORECASE)
_URL_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]+|\bsk-[\w-]{8,}", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """``text`` with nothing in its URLs that could be a key (user, password, query), and no bearer token."""
    return _BEARER.sub("[removed]", _URL_QUERY.sub(r"\1", _USER_INFO.sub(r"\1", text)))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, list | tuple):
        return [_without_secrets(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without_secrets(entry) for key, entry in value.items()}
    return value


def _json(value: Any) -> str:
    # ASCII, since a model can write half of a surrogate pair, which no encoding of a text column takes.
    return json.dumps(value, ensure_ascii=True, default=_as_json)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
