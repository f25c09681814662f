"""The process between the caller and the tested programs: isolates itself, then supervises. Runs as its own program.

With the method ``namespaces`` it enters new namespaces for mounts, processes, network, IPC, host name and cgroups (as
an ordinary user: inside a user namespace of its own), builds a root directory in memory that holds the interpreter's
library and nothing else, and forks: the child is process 1 of the new namespace, and when it ends, by whatever means,
the kernel kills all processes in there. With ``bubblewrap`` all this was done already by bwrap; with ``landlock`` there
are no namespaces and the tested program is confined by its system calls and Landlock alone.

Standard library only. Messages to it are 8 bytes of length, then ``marshal`` by the same interpreter; a result comes
back as fields of bytes, so that the caller decodes nothing but text.
"""

from __future__ import annotations

import _signal  # `signal` would import enum: a third of the whole start
import marshal
import os

from openzaya.sandbox import linux, supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` is slow to import too
    from typing import Any

INNER_USER = 1000


def main() -> None:
    """Serve one batch: a header and then tests on standard input, one result for each on standard output."""
    # Process 1 is spared every signal from its namespace that it has no handler for.
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    requests, results = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)
    message = supervisor.read_message(requests)
    if message is None:
        return
    header: dict[str, Any] = marshal.loads(message)
    linux.die_with_parent()
    with open("/proc/self/statm" if header["method"] != "bubblewrap" else "/dev/null") as file:
        header["base_bytes"] = int((file.read().split() or ["20000"])[0]) * os.sysconf("SC_PAGE_SIZE")
    if header["method"] == "namespaces":
        _enter_namespaces(header, (requests, results))
    linux.forbid_inspection()
    os.environ.clear()
    if header["with_values"]:
        import json  # noqa: F401  # once for all tests that are to give a value
    supervisor.supervise(header, requests, results)


def _enter_namespaces(header: dict[str, Any], ours: tuple[int, int]) -> None:
    """Returns in process 1 of the new namespaces only; the process that called it waits for that one and exits."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
    flags |= linux.CLONE_NEWCGROUP
    user, group = os.geteuid(), os.getegid()
    if header["user"] is None:
        linux.unshare(flags | linux.CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_USER} {user} 1"),
            ("gid_map", f"{INNER_USER} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    else:
        linux.unshare(flags)
    child = os.fork()
    if child:
        for descriptor in ours:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        os._exit(1 if status else 0)
    linux.die_with_parent()
    _build_root(header["binds"], header["masks"])
    linux.keep_capabilities((linux.CAP_SYS_ADMIN, linux.CAP_SETUID, linux.CAP_SETGID, linux.CAP_KILL))


def _build_root(binds: list[tuple[str, str]], masks: list[str]) -> None:
    """A root directory in memory with ``binds`` (source, target) below it, read-only, and empty ``masks`` over some."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    base = next(path for path in ("/tmp", "/mnt", "/var", "/usr") if os.path.isdir(path))
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", base, "tmpfs", flags, "size=4m,nr_inodes=4096,mode=755")
    old = f"{base}/.old"
    os.mkdir(old)
    linux.pivot_root(base, old)
    os.chdir("/")
    for source, target in binds:
        source = f"/.old{source}"
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT))
        linux.mount(source, target, None, linux.MS_BIND | linux.MS_REC)
        attributes = linux.ATTR_RDONLY | linux.ATTR_NOSUID
        linux.restrict_mounts(target, attributes if target.startswith("/dev/") else attributes | linux.ATTR_NODEV)
    for mask in masks:
        linux.mount("tmpfs", mask, "tmpfs", flags | linux.MS_RDONLY, "size=4k,nr_inodes=2,mode=755")
    linux.unmount("/.old")
    os.rmdir("/.old")
    os.makedirs(supervisor.SCRATCH, exist_ok=True)
    linux.restrict_mounts("/", linux.ATTR_RDONLY | linux.ATTR_NOSUID)
