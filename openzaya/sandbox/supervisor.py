"""Runs test after test, each in a process of its own that starts from nothing, and says what became of it.

As process 1 of its namespace (or as another user, or out of reach by the filter) it cannot be signalled, traced or
written to by the programs. It reads a test only when it is to run, so that no program finds the next ones in memory.
After each test everything else in the namespace is killed. Standard library only.
"""

from __future__ import annotations

import _signal  # `signal` would import enum: a third of the whole start
import contextlib
import fcntl
import marshal
import os
import select
import time

from openzaya.sandbox import linux, program

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` is slow to import too
    from typing import Any

SCRATCH = "/tmp"
_CRASHES = {4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 11: "SIGSEGV", 31: "SIGSYS"}
_SIGKILL, _SIGXCPU = 9, 24
_CPUCLOCK_SCHED = 2
_NUM_INODES = 1024


def read_message(descriptor: int) -> bytes | None:
    """None at the end of the stream."""
    head = _read_exactly(descriptor, 8)
    return None if head is None else _read_exactly(descriptor, int.from_bytes(head, "big"))


def write_message(descriptor: int, message: bytes) -> None:
    data = len(message).to_bytes(8, "big") + message
    while data:
        data = data[os.write(descriptor, data) :]


def _read_exactly(descriptor: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 16))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def supervise(header: dict[str, Any], requests: int, results: int) -> None:
    """Serve tests until the caller closes ``requests`` (or is gone)."""
    header["rules"] = None
    if not header["scratch"]:
        header["rules"] = linux.file_rules(header["readable"], header["writable"], header["listed"])
    deadline = time.monotonic() + header["limits"]["wall_s"]
    while (message := read_message(requests)) is not None:
        if time.monotonic() >= deadline:
            outcome = [*_outcome("timeout", "not started: the batch's wall time was spent before"), b"0"]
        else:
            outcome = _run_test(header, marshal.loads(message), requests, deadline)
        write_message(results, b"".join(len(field).to_bytes(8, "big") + field for field in outcome))
    os._exit(0)


def _run_test(header: dict[str, Any], test: dict[str, Any], requests: int, deadline: float) -> list[bytes]:
    started = time.monotonic()
    stdin = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    _write_all(stdin, test.pop("stdin").encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    _seal(stdin)
    pipes = [os.pipe() for _ in range(4)]
    if header["scratch"]:
        options = f"size={header['limits']['disk_mb']}m,nr_inodes={_NUM_INODES},mode=1777"
        linux.mount("tmpfs", SCRATCH, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, options)
    child = os.fork()
    if child == 0:
        (_, out), (_, err), (_, control), (_, ready) = pipes
        _become_program(header, (stdin, out, err, control, ready))
        program.execute(header["source"], test)
    os.close(stdin)
    for _, write_end in pipes:
        os.close(write_end)
    try:
        said = os.read(pipes[3][0], 500)
        watch = _Watch(child, [pipe[0] for pipe in pipes[:3]], header["limits"])
        if said != b"ready":
            watch.stop, watch.error = "killed", f"the sandbox could not be set up: {said.decode(errors='replace')}"
        else:
            watch.until_end(requests, deadline)
        _kill_all(child, header["method"])
        _, status, usage = os.wait4(child, 0)
        _reap_all(header["method"])
        watch.drain()
    finally:
        for read_end, _ in pipes:
            os.close(read_end)
        if header["scratch"]:
            linux.unmount(SCRATCH)
    outcome = watch.outcome(status, usage.ru_utime + usage.ru_stime, test["function"] is not None)
    return [*outcome, b"%f" % (time.monotonic() - started)]


def _become_program(header: dict[str, Any], descriptors: tuple[int, int, int, int, int]) -> None:
    stdin, out, err, control, ready = descriptors
    try:
        # High enough not to be overwritten by the ones that the program gets.
        ready = _move_up(ready)
        control = _move_up(control)
        for place, descriptor in enumerate((stdin, out, err)):
            os.dup2(descriptor, place)
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        program.confine(header, control)
        os.write(ready, b"ready")
        os.closerange(program.CONTROL + 1, 1024)
    except BaseException as error:
        os.write(ready, f"{type(error).__name__}: {error}"[:400].encode())
        os._exit(1)


def _move_up(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20)


def _seal(descriptor: int) -> None:
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _kill_all(child: int, method: str) -> None:
    # In a process namespace of our own: everybody but ourselves, at once. Otherwise the program could not fork.
    with contextlib.suppress(ProcessLookupError):
        os.kill(child if method == "landlock" else -1, _SIGKILL)


def _reap_all(method: str) -> None:
    if method != "landlock":
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


class _Watch:
    """One running test: collects what it writes, ends it at its limits."""

    def __init__(self, child: int, streams: list[int], limits: dict[str, Any]) -> None:
        self.child = child
        self.streams = streams
        self.limits = limits
        self.written = [bytearray() for _ in streams]
        # Before the value stands a byte that says what it is.
        self.most = [limits["output_bytes"] + extra for extra in (0, 0, 1)]
        self.stop = ""
        self.error = ""

    def until_end(self, requests: int, deadline: float) -> None:
        """Until the program's first process ends, a limit is reached, or the caller is gone (SystemExit)."""
        pidfd = os.pidfd_open(self.child)
        poller = select.poll()
        for stream in self.streams:
            poller.register(stream, select.POLLIN)
        poller.register(pidfd, select.POLLIN)
        poller.register(requests, 0)
        try:
            while not self.stop:
                wall = deadline - time.monotonic()
                processor = self.limits["cpu_s"] - self._processor_seconds()
                if wall <= 0 or processor <= 0:
                    self.stop = "timeout"
                    self.error = f"the {self.limits['cpu_s']:g} s of processor time are spent"
                    if wall <= 0:
                        self.error = f"the {self.limits['wall_s']:g} s by the clock for all tests are spent"
                    break
                # Threads may use several processors at once: look more often the nearer the limit.
                events = dict(poller.poll(1000 * max(0.004, min(wall, processor / 4))))
                if events.get(requests):
                    raise SystemExit("the caller is gone")
                for stream in [stream for stream in self.streams if stream in events]:
                    if not self._read(stream):
                        poller.unregister(stream)
                if pidfd in events:
                    break
        finally:
            os.close(pidfd)

    def drain(self) -> None:
        """What is left in the pipes once all writers are dead."""
        for stream in self.streams:
            while self.stop != "output" and self._read(stream):
                pass

    def outcome(self, status: int, processor_seconds: float, with_value: bool) -> list[bytes]:
        """Status and texts, from the wait status above all."""
        out, err, said = (bytes(part[:limit]) for part, limit in zip(self.written, self.most, strict=True))
        if self.stop:
            return _outcome(self.stop, self.error, out)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number in (_SIGXCPU, _SIGKILL) and processor_seconds >= self.limits["cpu_s"]:
                return _outcome("timeout", "the processor time is spent", out)
            if number in _CRASHES:
                return _outcome("error", f"crashed with {_CRASHES[number]}", out)
            return _outcome("killed", f"ended by signal {number}", out)
        kind, text = said[:1], said[1:]
        if code := os.WEXITSTATUS(status):
            last = text if kind in (program.FAILED, program.OUT_OF_MEMORY) else err.rstrip().rpartition(b"\n")[2]
            error = last[:300].decode("utf-8", "replace") or f"exit code {code}"
            return _outcome("memory" if kind == program.OUT_OF_MEMORY else "error", error, out)
        if not with_value:
            return _outcome("ok", "", out)
        if kind == program.VALUE:
            return _outcome("ok", "", out, text)
        return _outcome("error", "ended without giving a value", out)

    def _processor_seconds(self) -> float:
        try:
            return time.clock_gettime((~self.child << 3) | _CPUCLOCK_SCHED)
        except OSError:  # it has just ended
            return 0.0

    def _read(self, stream: int) -> bool:
        """False at its end."""
        data = os.read(stream, 1 << 16)
        place = self.streams.index(stream)
        self.written[place] += data
        if len(self.written[place]) > self.most[place]:
            self.stop = "output"
            name = ("standard output", "standard error", "the value")[place]
            self.error = f"more than {self.limits['output_bytes']} bytes of {name}"
        return bool(data)


def _outcome(status: str, error: str, stdout: bytes = b"", value: bytes = b"") -> list[bytes]:
    """The fields of a result, but for the seconds."""
    return [status.encode(), error.encode("utf-8", "replace"), stdout, value]
