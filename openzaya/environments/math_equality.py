"""Whether two mathematical answers are equal, by the package math-verify where it is installed.

math-verify hands what a model wrote to a computer algebra system, which may take for ever or all memory
(``10^{10^{10}}``), and its own time limits work in the main thread only. So it runs in a worker process; a pair that
takes too long costs that process.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

from openzaya.environments.worker import Worker, WorkerFailure

TIMEOUT_S = 3.0
MAX_LENGTH = 300
"""Longer answers are compared by their spelling only."""
MEMORY_BYTES = 2 << 30

_worker = Worker("openzaya.environments.math_equality:Service", memory_bytes=MEMORY_BYTES)


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


@lru_cache(maxsize=4096)
def is_equal(one: str, other: str) -> bool:
    """Whether two normalised answers are equal; a pair that cannot be compared counts as different.

    Safe to call from any thread.
    """
    return compare(one, other) is True


def compare(one: str, other: str) -> bool | None:
    """As :func:`is_equal`, with None for a pair that took too long or cost the process."""
    if one == other:
        return True
    if not is_available() or max(len(one), len(other)) > MAX_LENGTH or (_is_number(one) and _is_number(other)):
        return False
    try:
        return bool(_worker.call("is_equal", one, other, timeout_s=TIMEOUT_S))
    except WorkerFailure:
        return None


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace("/", "", 1).isdigit()


class Service:
    """Runs in the worker process."""

    def __init__(self) -> None:
        import math_verify

        self._parse, self._verify = math_verify.parse, math_verify.verify
        self.is_equal("x+1", "1+x")  # loads the grammar: seconds that are not on the first pair's account

    def is_equal(self, gold: str, given: str) -> bool:
        try:
            known, found = (self._parse(f"${text}$", parsing_timeout=None) for text in (gold, given))
            return bool(self._verify(known, found, timeout_seconds=None))
        except (Exception, MemoryError, RecursionError):  # no formula, or none that can be compared
            return False
