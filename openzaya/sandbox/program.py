"""The tested program's own process: gives up every right, then executes the program. Standard library only.

Reached by fork from the supervisor. What the program says about itself (an exception, a value) goes through descriptor
CONTROL; whether it ended well is told by its exit code, which the supervisor gets from the kernel.
"""

from __future__ import annotations

import os
import resource
import sys

from openzaya.sandbox import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONTROL = 3
VALUE, FAILED, OUT_OF_MEMORY = b"V", b"E", b"M"
"""The first byte of what is written to CONTROL."""
NUM_THREADS = 16
"""Threads of a program that may not fork."""
_FINAL_WORDS = ("open", "__del__", "import io", "from io", "weakref", "exec", "__import__", "importlib")
"""A program without any of these words leaves no open file, finaliser or module that shutting down would look after."""
_OUR_MODULES = ("linux", "launcher", "supervisor", "program")


def confine(header: dict[str, Any], control: int) -> None:
    """Leave the supervisor's side for good: session, descriptors, limits, user, files, system calls. OSError else."""
    limits = header["limits"]
    if header["method"] != "landlock":
        os.setsid()
    os.dup2(control, CONTROL)
    mebibyte = 1 << 20
    scratch = limits["disk_mb"] * mebibyte if header["scratch"] else 0
    processes = limits["num_processes"]
    for what, most in (
        (resource.RLIMIT_AS, header["base_bytes"] + limits["memory_mb"] * mebibyte),
        (resource.RLIMIT_CPU, int(limits["cpu_s"]) + 2),
        (resource.RLIMIT_FSIZE, scratch),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_STACK, 64 * mebibyte),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
        # Threads count, and as an ordinary user so do the launcher and the supervisor.
        (resource.RLIMIT_NPROC, (NUM_THREADS if processes == 1 else processes) + (header["user"] is None) * 2),
    ):
        if what == resource.RLIMIT_NPROC and header["method"] == "landlock":
            continue  # it would count all that this user runs; the filter allows no thread and no process there
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    if header["user"] is not None:
        linux.outlive_change_of_user()
        os.setgroups([])
        os.setresgid(header["user"], header["user"], header["user"])
        os.setresuid(header["user"], header["user"], header["user"])
    # Without a root directory of its own, the library may lie below root's closed home: Landlock opens nothing else.
    reads_past_modes = header["user"] is not None and header["method"] == "landlock"
    linux.keep_capabilities((linux.CAP_DAC_READ_SEARCH,) if reads_past_modes else ())
    linux.forbid_inspection()
    linux.die_with_parent()
    linux.forbid_new_privileges()
    os.chdir(header["directory"])
    rules = header["rules"]
    if header["scratch"]:  # it is another directory for each test, even under the same name
        rules = linux.file_rules(header["readable"], header["writable"], header["listed"])
    if rules is not None:
        linux.obey(rules)
    linux.filter_calls(bytes.fromhex(header["filter"]))


def execute(source: str, test: dict[str, Any]) -> None:
    """Run the program as the test says; never returns."""
    for name in _OUR_MODULES:
        sys.modules.pop(f"openzaya.sandbox.{name}", None)
    for name in ("openzaya", "openzaya.sandbox"):
        sys.modules.pop(name, None)
    sys.dont_write_bytecode = True
    sys.argv[:] = ["program.py"]
    function = test["function"]
    module = type(sys)("__main__" if function is None else "program")
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
        if function is not None:
            import json

            value = module.__dict__[function](*test["arguments"])
            _say(VALUE + json.dumps(value, allow_nan=False).encode())
    except SystemExit as error:
        _finish(source, error.code)
    except BaseException as error:
        _say((OUT_OF_MEMORY if isinstance(error, MemoryError) else FAILED) + _describe(error))
        _finish(source, 1)
    _finish(source, 0)


def _finish(source: str, code: object) -> None:
    """Shut down as the interpreter does. Its usual way is slow: only if needed."""
    if any(name in sys.modules for name in ("threading", "atexit")) or any(word in source for word in _FINAL_WORDS):
        sys.exit(code)  # type: ignore[arg-type]
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    try:
        sys.stdout.flush()
    except (AttributeError, ValueError):  # it was closed or replaced
        pass
    except OSError:
        code = 120
    os._exit(int(code or 0) & 0xFF)


def _describe(error: BaseException) -> bytes:
    try:
        return f"{type(error).__name__}: {error}"[:300].encode("utf-8", "replace")
    except BaseException:
        return type(error).__name__[:300].encode("utf-8", "replace")


def _say(data: bytes) -> None:
    while data:
        data = data[os.write(CONTROL, data) :]
