"""The ways to isolate a program, best first; the first that is seen to hold on this machine is used, or none.

1. ``namespaces``: namespaces for mounts, processes, network, IPC, host name and cgroups, entered by our own launcher;
2. ``bubblewrap``: the same made by bwrap(1), for machines that allow namespaces to that program only. No scratch
   directory: the program can write no file;
3. ``landlock``: no namespaces (a container, say), but Landlock for files and the filter for everything else. No
   scratch directory, no signals, no threads, no second process.

On top of each: another user where we are root, no capabilities, no new privileges, resource limits, Landlock where the
kernel has it, and the seccomp filter. A method counts only if a probe program fails at everything it should fail at.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import sysconfig
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openzaya.errors import SandboxError, SandboxUnavailable
from openzaya.sandbox.records import Limits
from openzaya.sandbox.seccomp import MACHINES, filter_program

Method = Literal["namespaces", "bubblewrap", "landlock"]
METHODS: tuple[Method, ...] = ("namespaces", "bubblewrap", "landlock")

_HERE = Path(__file__).resolve().parent
_PARTS = ("linux.py", "launcher.py", "supervisor.py", "program.py")
_PACKAGES_OF_OTHERS = ("site-packages", "dist-packages")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_NOBODY = 65534
_FIRST_USER = 1_600_000_000
"""Far above the users of any system: nothing belongs to these ids."""

# Run as `python -c`: our modules under their usual names, without the package's own imports.
_START = """
import sys, types
for name, path in (("openzaya", {package!r}), ("openzaya.sandbox", {sandbox!r})):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
del module, name, path, types
from openzaya.sandbox.launcher import main
main()
"""


@dataclass(frozen=True)
class Isolation:
    """What holds on this machine."""

    method: Method
    user: str
    """Whom programs run as: ``own`` (the caller, without rights) or ``other`` (an id that owns nothing)."""
    refused: tuple[str, ...] = ()
    """Why better methods do not hold, a line each."""

    def __str__(self) -> str:
        whose = "an unprivileged user" if self.user == "other" else "the calling user, without rights"
        return f"{self.method}, as {whose}"


@dataclass(frozen=True)
class Start:
    """How one batch is started: the command, its environment, and the launcher's header."""

    command: list[str]
    environment: dict[str, str]
    header: dict[str, Any]


def start_of(method: Method, source: str, limits: Limits) -> Start:
    """SandboxError for limits that the method cannot give; OSError where something it needs is not there."""
    interpreter = _interpreter()
    other = _other_user()
    if method == "landlock" and limits.num_processes > 1:
        raise SandboxError(
            f"sandbox limit num_processes is {limits.num_processes}, but the only isolation here is 'landlock', which "
            "allows 1; set it to 1, or allow namespaces on this machine"
        )
    scratch = method == "namespaces"
    machine = platform.machine()
    targets = [target for _, target in interpreter.binds]  # what shall not be seen in them is masked
    header = {
        "method": method,
        "source": source,
        "user": other,
        "scratch": scratch,
        "directory": "/tmp" if scratch else "/",
        "binds": interpreter.binds + [(device, device) for device in _DEVICES],
        "masks": interpreter.masks,
        "readable": [
            *(interpreter.readable if method == "landlock" else targets),
            "/dev/null",
            "/dev/zero",
            "/dev/random",
            "/dev/urandom",
        ],
        "writable": ["/tmp", "/dev/null"] if scratch else ["/dev/null"],
        "listed": interpreter.listed if method == "landlock" else [],
        "limits": {name: getattr(limits, name) for name in limits.__dataclass_fields__},
        "filter": filter_program(
            machine,
            threads=method != "landlock",
            processes=limits.num_processes > 1,
            files=scratch,
            signals=method != "landlock",
        ).hex(),
    }
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    package, prefix = str(_HERE.parent), []
    if method == "bubblewrap":
        package = "/openzaya"
        prefix = _bubblewrap(interpreter, environment, as_root=other is not None)
    start = _START.format(package=package, sandbox=f"{package}/sandbox")
    return Start([*prefix, interpreter.path, "-P", "-s", "-S", "-c", start], environment, header)


@dataclass(frozen=True)
class _Interpreter:
    path: str
    binds: list[tuple[str, str]]
    """(real path, path as the interpreter names it) of directories and files it needs to import from its library."""
    masks: list[str]
    """Directories within the binds that programs shall not see: installed packages."""
    readable: list[str]
    listed: list[str]
    """Directories whose names may be listed, though not all of their files read."""


@functools.cache
def _interpreter() -> _Interpreter:
    path = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sys.base_prefix) / sys.platlibdir / version
    libraries = [sysconfig.get_path("stdlib"), str(library), str(Path(sys.base_exec_prefix) / "lib" / version)]
    multiarch = sysconfig.get_config_var("MULTIARCH") or "none"
    shared = [f"/lib/{multiarch}", f"/usr/lib/{multiarch}", "/lib64", "/usr/lib64", "/etc/ld.so.cache"]
    name = sysconfig.get_config_var("INSTSONAME") or "none"
    own = [str(Path(sys.base_prefix) / place / name) for place in ("lib", "lib64")]
    if Path(sys.base_prefix) not in (Path("/usr"), Path("/usr/local")):
        # An environment with libraries of its own (conda, python-build-standalone): files only, not what lies below.
        own += [str(file) for file in sorted(Path(sys.base_prefix, "lib").glob("lib*.so*"))]
    wanted = [entry for entry in dict.fromkeys([*libraries, *shared, *own]) if os.path.exists(entry)]
    binds = [(os.path.realpath(entry), entry) for entry in wanted]
    masks, readable, listed = [], [], []
    for _, target in binds:
        inside = [f"{target}/{package}" for package in _PACKAGES_OF_OTHERS if os.path.isdir(f"{target}/{package}")]
        if not inside:
            readable.append(target)
            continue
        masks += inside
        listed.append(target)
        readable += [entry.path for entry in os.scandir(target) if entry.name not in _PACKAGES_OF_OTHERS]
    return _Interpreter(path, binds, masks, readable, listed)


def _other_user() -> int | None:
    """An id to run programs as: only root can take one, and only one that its user namespace knows."""
    if os.geteuid() != 0:
        return None
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    wanted = _FIRST_USER + (os.getpid() << 8) % 100_000_000 + threading.get_native_id() % 256
    for candidate in (wanted, _NOBODY):
        if any(first <= candidate < first + count for first, _, count in ranges):
            return candidate
    return None


def _bubblewrap(interpreter: _Interpreter, environment: dict[str, str], *, as_root: bool) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("bwrap is not installed")
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--as-pid-1", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if as_root:
        for name in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            command += ["--cap-add", name]
    else:
        command.append("--unshare-user")
    for name, value in environment.items():
        command += ["--setenv", name, value]
    binds = [*interpreter.binds, (interpreter.path, interpreter.path)]
    # It gives directories on the way the modes of the originals, and root's home is closed.
    for parent in sorted({str(parent) for _, target in binds for parent in Path(target).parents[:-1]}):
        command += ["--perms", "0755", "--dir", parent]
    for source, target in binds:
        command += ["--ro-bind", source, target]
    for mask in interpreter.masks:
        command += ["--tmpfs", mask, "--remount-ro", mask]
    for part in _PARTS:
        command += ["--ro-bind", str(_HERE / part), f"/openzaya/sandbox/{part}"]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--"]


_lock = threading.Lock()
_found: dict[int, Isolation] = {}


def isolation() -> Isolation:
    """The method that holds here, found by trying once in each process. SandboxUnavailable where none does."""
    from openzaya.sandbox.probe import fault_of

    with _lock:
        user = os.geteuid()
        if user not in _found:
            _found[user] = _find(METHODS, fault_of)
        return _found[user]


def _find(methods: Sequence[Method], fault_of: Any) -> Isolation:
    if sys.platform != "linux":
        raise SandboxUnavailable(
            f"no sandbox on {sys.platform}: programs are isolated by means of Linux; use a Linux machine"
        )
    if platform.machine() not in MACHINES:
        raise SandboxUnavailable(f"no sandbox on {platform.machine()}: it is written for {' and '.join(MACHINES)}")
    refused: list[str] = []
    for method in methods:
        fault = fault_of(method)
        if fault is None:
            return Isolation(method, "own" if _other_user() is None else "other", tuple(refused))
        refused.append(f"{method}: {fault}")
    raise SandboxUnavailable(
        f"this machine offers no isolation that holds ({'; '.join(refused)}), and programs are not run without; allow "
        "user namespaces, install bubblewrap, or use Linux 6.2 or later with Landlock"
    )
