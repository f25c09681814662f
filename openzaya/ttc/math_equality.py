"""Whether two mathematical answers are equal, by the package math-verify where it is installed.

math-verify hands what a model wrote to a computer algebra system, which may take for ever or all memory
(``10^{10^{10}}``), and its own time limits work in the main thread only. So it runs in a process of its own, fed with
one JSON line a pair; a pair that takes too long costs that process, and counts as different.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
from functools import lru_cache

TIMEOUT_S = 3.0
START_TIMEOUT_S = 60.0
MAX_LENGTH = 300
"""Longer answers are compared by their spelling only."""
MEMORY_BYTES = 2 << 30

_lock = threading.Lock()
_worker: subprocess.Popen[bytes] | None = None


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


@lru_cache(maxsize=4096)
def is_equal(one: str, other: str) -> bool:
    """Whether two normalised answers are equal; safe to call from any thread."""
    if one == other:
        return True
    if not is_available() or max(len(one), len(other)) > MAX_LENGTH or (_is_number(one) and _is_number(other)):
        return False
    with _lock:
        return _ask(one, other)


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace("/", "", 1).isdigit()


def _ask(one: str, other: str) -> bool:
    global _worker
    if _worker is None or _worker.poll() is not None:
        _worker = _start()
    answer = _exchange(_worker, [one, other], TIMEOUT_S) if _worker is not None else None
    if answer is None:
        _stop()
    return answer is True


def _start() -> subprocess.Popen[bytes] | None:
    worker = subprocess.Popen(
        [sys.executable, "-c", "from openzaya.ttc.math_equality import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    # Importing takes a second or more: not on the account of the first pair.
    if _exchange(worker, ["1", "1"], START_TIMEOUT_S) is not True:
        worker.kill()
        worker.wait()
        return None
    return worker


def _exchange(worker: subprocess.Popen[bytes], pair: list[str], timeout_s: float) -> bool | None:
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(pair).encode() + b"\n")
        worker.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        return bool(json.loads(worker.stdout.readline()))
    except (OSError, ValueError):
        return None


@atexit.register
def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.wait()
        for stream in (_worker.stdin, _worker.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        _worker = None


def serve() -> None:
    """The worker: a pair a line on standard input, ``true`` or ``false`` a line on standard output."""
    import resource
    import signal

    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes standard input
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        signal.alarm(int(TIMEOUT_S) + 1)  # ends this process, should the parent be gone
        try:
            gold, given = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
            is_same = bool(verify(gold, given, timeout_seconds=None))
        except (Exception, MemoryError, RecursionError):
            is_same = False
        signal.alarm(0)
        answers.write(json.dumps(is_same) + "\n")
        answers.flush()
