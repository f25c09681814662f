"""A self-contained page about runs of Markovian RSA: the population round by round, and who aggregated whom.

The page is view.html with the runs put in as JSON. Model text is escaped so that it cannot leave its place, the
page's script makes text nodes of it only, and a content security policy forbids every request and every other script.
Texts together beyond ``MAX_CHARACTERS`` are shortened in the middle, the longest first; the journal keeps them whole.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from openzaya.runlog import write_text_atomically
from openzaya.ttc.journal import Journal

MAX_CHARACTERS = 24_000_000
"""Of all texts in a page: what browsers, also those of phones, open without trouble."""
LONG_TEXTS = ("reasoning", "content", "text")
SQLITE_MAGIC = b"SQLite format 3\0"

Run = Mapping[str, Any]


def is_journal(path: Path) -> bool:
    """Whether ``path`` is a file of the kind that journals are; reads its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC


def write_journal_view(journal_path: Path, page_path: Path | None = None) -> Path:
    """Write the page of all runs of a journal, by default beside it; gives its path.

    Raises ``RSAError`` for a file that is no journal, ``OSError`` where the page cannot be written.
    """
    with Journal.open(journal_path, read_only=True) as journal:
        runs = JournalRuns(journal, {run.run_key: {} for run in journal.runs()})
        return write_view(runs, page_path or journal_path.with_suffix(".html"), title=journal_path.name)


@dataclass(frozen=True)
class JournalRuns:
    """Runs of a journal, each read when its turn comes: together they may be larger than memory."""

    journal: Journal
    keys: Mapping[str, Mapping[str, Any]]
    """Runs by their keys, with what is to be known of each besides."""

    def __iter__(self) -> Iterator[Run]:
        for key, more in self.keys.items():
            yield self.journal.load(key) | dict(more)


def write_view(runs: Iterable[Run], path: Path, *, title: str = "Markovian RSA") -> Path:
    """Write the page of ``runs``, as the journal's ``load`` or ``RSAResult.to_dict`` give them; gone through twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, render_view(runs, title=title))
    return path


def render_view(runs: Iterable[Run], *, title: str = "Markovian RSA", max_characters: int = MAX_CHARACTERS) -> str:
    """The page as text."""
    template = files("openzaya.ttc").joinpath("view.html").read_text(encoding="utf-8")
    limit = _text_limit([length for run in runs for length in _text_lengths(run)], max_characters)
    data = {"title": title, "runs": [_cleaned(run, limit) for run in runs]}
    # Half a surrogate pair, which a model can write, has no encoding: it becomes a question mark.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, default=str).encode(errors="replace").decode()
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return template.replace("__POLICY__", _policy(template), 1).replace("__DATA__", text, 1)


def _policy(template: str) -> str:
    """No requests; of scripts and styles only the page's own, known by their hashes."""
    hashes = {}
    for tag in ("style", "script"):
        [body] = re.findall(rf"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )


def _text_lengths(value: Any) -> list[int]:
    if isinstance(value, Mapping):
        own = [len(entry) for name, entry in value.items() if name in LONG_TEXTS and isinstance(entry, str)]
        return own + [length for entry in value.values() for length in _text_lengths(entry)]
    if isinstance(value, list | tuple):
        return [length for entry in value for length in _text_lengths(entry)]
    return []


def _text_limit(lengths: list[int], max_characters: int) -> int:
    """The longest text that may stay whole: cutting all longer ones to it brings the sum below the maximum."""
    left, num = max_characters, len(lengths)
    for length in sorted(lengths):
        if length * num > left:
            return left // num
        left, num = left - length, num - 1
    return max(lengths, default=0)


def _cleaned(value: Any, limit: int) -> Any:
    """A copy with long texts shortened and without numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {
            str(name): _shortened(entry, limit)
            if name in LONG_TEXTS and isinstance(entry, str)
            else _cleaned(entry, limit)
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [_cleaned(entry, limit) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    # The end stays longer: it is what the next round reads.
    head, tail = limit // 4, limit - limit // 4
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[len(text) - tail :]}"
