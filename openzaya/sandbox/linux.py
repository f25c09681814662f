"""The Linux calls that Python does not offer, through ctypes. Standard library only: this runs inside the sandbox.

Sources: unshare(2), mount_setattr(2), pivot_root(2), capabilities(7), landlock(7), seccomp(2), prctl(2) of the Linux
manual pages. Every function raises OSError with the call's name where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 2, 5, 6, 7, 21

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP = 1, 4, 8, 22
_PR_SET_NO_NEW_PRIVS = 38
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
# The same numbers on every architecture; pivot_root and capset differ.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}

_LANDLOCK_READ = (1 << 2) | (1 << 3)
_LANDLOCK_FILES = (13, 14, 15, 15, 16)
"""Kinds of access to files that ABI 1, 2, ... knows, as a number of bits; the last holds for all later ones."""
_LANDLOCK_EXECUTE = 1 << 0
LANDLOCK_MINIMUM = 3
"""From this ABI on (Linux 6.2) a file cannot be truncated past the rules."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def unmount(target: str) -> None:
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")


def restrict_mounts(target: str, attributes: int) -> None:
    """Add ``attributes`` (ATTR_*) to the mount at ``target`` and all below it."""
    block = ctypes.create_string_buffer(struct.pack("=QQQQ", attributes, 0, 0, 0), 32)
    call = (ctypes.c_long(_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD), os.fsencode(target), ctypes.c_uint(_AT_RECURSIVE))
    _check(_libc.syscall(*call, block, ctypes.c_size_t(32)), f"mount_setattr {target}")


def pivot_root(new_root: str, old_root: str) -> None:
    number = _PIVOT_ROOT[os.uname().machine]
    _check(_libc.syscall(ctypes.c_long(number), new_root.encode(), old_root.encode()), "pivot_root")


def _prctl(option: int, value: int, call: str) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), call)


def die_with_parent() -> None:
    """Be killed when the thread that made this process ends. A change of user id takes it back."""
    _prctl(_PR_SET_PDEATHSIG, 9, "prctl(PDEATHSIG)")


def forbid_inspection() -> None:
    """No ptrace, no /proc/PID/mem or fd by others of this user, no core dump; children inherit it."""
    _prctl(_PR_SET_DUMPABLE, 0, "prctl(DUMPABLE)")


def forbid_new_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "prctl(NO_NEW_PRIVS)")


def outlive_change_of_user() -> None:
    """Capabilities of root stay permitted when it becomes another user; ``keep_capabilities`` then chooses."""
    _prctl(_PR_SET_KEEPCAPS, 1, "prctl(KEEPCAPS)")


def keep_capabilities(kept: tuple[int, ...]) -> None:
    """Give up all other capabilities; with ``forbid_new_privileges`` and no exec, for good."""
    mask = sum(1 << number for number in kept)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = ctypes.create_string_buffer(struct.pack("=IIIIII", low, low, 0, high, high, 0), 24)
    _check(_libc.syscall(ctypes.c_long(_CAPSET[os.uname().machine]), header, data), "capset")


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter for this process and all it will start. Needs ``forbid_new_privileges``."""
    code = ctypes.create_string_buffer(program, len(program))
    block = _Filter(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    mode, pointer = ctypes.c_ulong(2), ctypes.byref(block)
    arguments = (ctypes.c_int(_PR_SET_SECCOMP), mode, pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _check(_libc.prctl(*arguments), "prctl(SECCOMP)")


def landlock_abi() -> int:
    """The version that this kernel offers; 0 for none."""
    numbers = (ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(_libc.syscall(*numbers), 0)


def file_rules(readable: list[str], writable: list[str], listed: list[str]) -> int | None:
    """Landlock rules as a descriptor: only what is below these paths can be read, changed, or listed. None without it.

    Also no TCP (ABI 4), no abstract sockets of others and no signals to others (ABI 6). Missing paths are skipped.
    """
    abi = landlock_abi()
    if abi == 0:
        return None
    every = (1 << _LANDLOCK_FILES[min(abi, len(_LANDLOCK_FILES)) - 1]) - 1
    attributes = struct.pack("=QQQ", every, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    block = ctypes.create_string_buffer(attributes, len(attributes))
    call = (ctypes.c_long(_LANDLOCK_CREATE), block, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    rules = _check(_libc.syscall(*call), "landlock_create_ruleset")
    for paths, access in ((readable, _LANDLOCK_READ), (listed, 1 << 3), (writable, every & ~_LANDLOCK_EXECUTE)):
        for path in paths:
            _allow_below(rules, path, access & every)
    return rules


def obey(rules: int) -> None:
    """From now on, this process and its children are held to ``rules``. Needs ``forbid_new_privileges``."""
    arguments = (ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_int(rules), ctypes.c_uint(0))
    _check(_libc.syscall(*arguments), "landlock_restrict_self")


def _allow_below(rules: int, path: str, access: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            access &= 0b111 | 1 << 14  # only what can be done to a file: execute, write, read, truncate
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, beneath), 12)
        numbers = (ctypes.c_long(_LANDLOCK_ADD), ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0))
        _check(_libc.syscall(*numbers), f"landlock_add_rule {path}")
    finally:
        os.close(beneath)
