"""A service in a process of its own: what may hang, crash, eat memory or change global state is called there.

The process runs one object, ``target(**arguments)``, and answers one JSON line a call. A call that takes too long, and
a process that dies, cost that process alone: the next call starts another one. Standard output of what runs there is
thrown away, since libraries print. The process is a fresh interpreter, so that it does not matter which threads the
caller has; it ends when the caller's end of its input closes, and by an alarm when it computes on without a caller.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
PATIENCE = 10
"""A call may take its time limit in processor time, and this many times as long by the clock: machines are busy."""
MEMORY_BYTES = 8 << 30
"""Address space; a library that imports torch needs gigabytes of it without using them."""


class WorkerFailure(Exception):
    """A call without a result: the process hung or died, or what it called raised. The message says which."""


class Worker:
    """Calls methods of ``target`` ("module:name") in a process, started with the first call.

    Safe to use from several threads, which wait for each other; a fork of this process starts its own. Holders count:
    ``share`` adds one, ``close`` takes one away, and the last one ends the process.
    """

    def __init__(
        self, target: str, arguments: Mapping[str, Any] | None = None, *, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._setup = {"target": target, "arguments": dict(arguments or {}), "memory_bytes": memory_bytes}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._num_holders = 1
        _living.add(self)

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """``method(*arguments)`` of the service; arguments and result are JSON.

        ``timeout_s`` is seconds of the process's own processor time; asleep, or starved by others, it may take
        ``PATIENCE`` times as long.

        Raises:
            WorkerFailure: it raised, took longer, or the process died.
        """
        with self._lock:
            process = self._started()
            line = json.dumps({"call": method, "arguments": arguments, "timeout_s": timeout_s}).encode()
            try:
                reply = _exchange(process, line, timeout_s)
            except _Broken as broken:
                self._end()
                raise WorkerFailure(f"{method}: {broken}") from None
        if "error" in reply:
            raise WorkerFailure(f"{method}: {reply['error']}")
        return reply.get("value")

    def restart(self) -> None:
        """End the process; the next call starts another one."""
        with self._lock:
            self._end()

    def share(self) -> Worker:
        """This worker, for one holder more."""
        with self._lock:
            self._num_holders += 1
        return self

    def close(self) -> None:
        """One holder less; the last one ends the process. A later call starts it again."""
        with self._lock:
            self._num_holders -= 1
            if self._num_holders <= 0:
                self._end()

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._end()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONHASHSEED": "0",  # libraries iterate over sets of strings
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", "from openzaya.environments.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._process, self._owner = process, os.getpid()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        try:
            reply = _exchange(process, json.dumps(self._setup).encode(), START_TIMEOUT_S)
        except _Broken as broken:
            self._end()
            raise WorkerFailure(f"cannot start {self._setup['target']}: {broken}") from None
        if "error" in reply:
            self._end()
            raise WorkerFailure(f"cannot start {self._setup['target']}: {reply['error']}")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


_living: weakref.WeakSet[Worker] = weakref.WeakSet()


class _Broken(Exception):
    """No reply; why."""


def _exchange(process: subprocess.Popen[bytes], line: bytes, timeout_s: float) -> dict[str, Any]:
    """Send a line and read one."""
    assert process.stdin is not None and process.stdout is not None
    begin, begin_cpu = time.monotonic(), _processor_seconds(process.pid)
    unsent = memoryview(line + b"\n")
    received = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            passed = time.monotonic() - begin
            if passed >= timeout_s:
                used = _processor_seconds(process.pid) - begin_cpu
                if used >= timeout_s or passed >= PATIENCE * timeout_s:
                    raise _Broken(f"no answer within {timeout_s:g} s; the process was ended")
            for key, _ in selector.select(max(timeout_s - passed, min(0.5, timeout_s))):
                try:
                    if key.fileobj is process.stdin:
                        unsent = unsent[os.write(process.stdin.fileno(), unsent[: 1 << 16]) :]
                        if not unsent:
                            selector.unregister(process.stdin)
                        continue
                    found = os.read(process.stdout.fileno(), 1 << 20)
                except BlockingIOError:
                    continue
                except OSError:
                    found = b""
                if not found:
                    raise _Broken(f"the process died{_exit_code(process)}")
                received += found
                if received.endswith(b"\n"):
                    return dict(json.loads(received))


def _processor_seconds(pid: int) -> float:
    """Processor time that a process has used; where this system does not tell, the clock's."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.monotonic()


def _exit_code(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f" (exit code {process.wait(1.0)})"
    return ""


def serve() -> None:
    """The process: its setup in the first line of standard input, then one call a line."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who closes standard input
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values).encode() + b"\n")
        replies.flush()

    def describe(error: BaseException) -> str:
        return f"{type(error).__name__}: {error}"[:500]

    setup = json.loads(requests.readline() or b"{}")
    if not setup:
        return
    signal.alarm(int(PATIENCE * START_TIMEOUT_S) + 2)
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    try:
        module, _, name = setup["target"].partition(":")
        service = getattr(importlib.import_module(module), name)(**setup["arguments"])
    except BaseException as error:
        reply(error=describe(error))
        return
    signal.alarm(0)
    reply(value=None)
    for line in requests:
        request = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # libraries set their own
        signal.alarm(int(PATIENCE * request["timeout_s"]) + 2)
        try:
            value = getattr(service, request["call"])(*request["arguments"])
            message: dict[str, Any] = {"value": value}
            json.dumps(message)
        except (Exception, MemoryError, RecursionError) as error:
            message = {"error": describe(error)}
        signal.alarm(0)
        reply(**message)


@atexit.register
def _end_all() -> None:
    for worker in list(_living):
        worker.restart()
