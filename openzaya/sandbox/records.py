"""What goes into the sandbox and what comes out: limits, tests, results. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from openzaya.errors import SandboxError

MAX_SOURCE_BYTES = 1 << 20
MAX_TEST_BYTES = 8 << 20

Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True)
class Limits:
    """What one tested program may use. All are enforced by the kernel or by a supervisor it cannot reach.

    ``num_processes`` 1: it may not fork; up to 16 threads. More: that many processes and threads together, of which
    EACH may use ``memory_mb``.
    """

    cpu_s: float = 2.0
    """Processor seconds of each test."""
    wall_s: float = 6.0
    """Seconds by the clock for the WHOLE batch of tests, without the sandbox's start."""
    memory_mb: int = 256
    """Address space of a process in MiB, beyond the interpreter's own."""
    num_processes: int = 1
    output_bytes: int = 65536
    """For each test: that much on standard output, as much on standard error, as much as a value in JSON."""
    disk_mb: int = 8
    """Size in MiB of the scratch directory (kept in memory, empty at the start of each test), and of any one file."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("cpu_s", 0.01, 3600),
            ("wall_s", 0.01, 86400),
            ("memory_mb", 16, 1 << 20),
            ("num_processes", 1, 4096),
            ("output_bytes", 1, 64 << 20),
            ("disk_mb", 1, 1 << 16),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise SandboxError(f"sandbox limit {name} is {value!r}; it must lie between {low:g} and {high:g}")
            if name[-2:] != "_s" and not isinstance(value, int):
                raise SandboxError(f"sandbox limit {name} is {value!r}; it must be a whole number")


@dataclass(frozen=True)
class Test:
    """One run of the program: with standard input, or by calling one of its functions.

    Without ``function`` the program runs as ``__main__`` and reads ``stdin``; with it, the program is first executed
    as a module (``__name__`` is ``"program"``), then ``function(*arguments)`` is called and its result is the value.
    Arguments and value travel as JSON: tuples become lists, keys of dictionaries become strings.
    """

    __test__: ClassVar[bool] = False
    """pytest shall not collect it."""

    stdin: str = ""
    function: str | None = None
    arguments: tuple[Any, ...] | list[Any] = ()


@dataclass(frozen=True)
class Result:
    """What became of one test.

    * ``ok``: the program ended by itself with exit code 0, and the function (if one was asked for) gave a value;
    * ``error``: an exception, another exit code, a crash, or no value that JSON can express;
    * ``timeout``: the test's processor time or the batch's wall time was spent (perhaps before this test began);
    * ``memory``: a MemoryError that nobody caught;
    * ``output``: more output than allowed;
    * ``killed``: ended by a signal that is none of its own crashes, or the sandbox broke down.

    Whether the answer is right is for the caller to judge: nothing that could tell it is ever inside the sandbox.
    """

    status: Status
    stdout: str = ""
    """What was written until the end, not more than the limit; bytes that are not UTF-8 are replaced."""
    value: Any = None
    """The function's result as JSON gives it back; None unless the status is ``ok``."""
    error: str = ""
    """Short text for people. Written by the tested program in part: never decide anything by it."""
    seconds: float = 0.0
    """Wall time of this test."""
