"""The system calls that a tested program may use, as a seccomp filter (seccomp(2), BPF).

An allowlist: everything that the standard library needs for computing, threads and files; nothing that reaches other
processes, the network, or rarely used parts of the kernel. What is not listed fails with EPERM; a call under another
architecture's numbering kills the process. Arguments are looked at where the call alone says too little:

* ``clone`` may make no namespaces, and no processes where none are allowed; ``clone3`` (whose flags lie in memory,
  out of the filter's sight) answers ENOSYS, so that the C library falls back to ``clone``;
* ``ioctl``, ``fcntl``, ``prctl``: a few harmless requests; ``prlimit64``: only for oneself;
* ``socketpair`` works (event loops need it), ``socket`` does not; ``sendto`` only without an address.
"""

from __future__ import annotations

import functools
import struct

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = tuple(_AUDIT)

# name: number on x86_64, on aarch64; None where the architecture has no such call.
_ALWAYS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "futex": (202, 98), "mmap": (9, 222), "munmap": (11, 215), "brk": (12, 214),
    "clock_gettime": (228, 113), "fstat": (5, 80), "newfstatat": (262, 79), "lseek": (8, 62), "openat": (257, 56),
    "close": (3, 57), "open": (2, None), "stat": (4, None), "lstat": (6, None), "poll": (7, None),
    "mprotect": (10, 226), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "sendfile": (40, 71),
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205),
    "socketpair": (53, 199), "setsockopt": (54, 208), "getsockopt": (55, 209), "exit": (60, 93), "wait4": (61, 260),
    "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163),
    "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "getpriority": (140, 141), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "arch_prctl": (158, None),
    "gettid": (186, 178), "time": (201, None), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21),
    "waitid": (247, 95), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20),
    "dup3": (292, 24), "pipe2": (293, 59), "preadv": (295, 69), "pwritev": (296, 70), "getcpu": (309, 168),
    "getrandom": (318, 278), "membarrier": (324, 283), "copy_file_range": (326, 285), "statx": (332, 291),
    "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439), "epoll_pwait2": (441, 441),
}  # fmt: skip
# Only where a mount namespace holds nothing that could be changed: Landlock does not watch over all of these.
_FILES: dict[str, tuple[int | None, int | None]] = {
    "truncate": (76, 45), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "creat": (85, None),
    "link": (86, None), "unlink": (87, None), "symlink": (88, None), "chmod": (90, None), "fchmod": (91, 52),
    "mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38), "linkat": (265, 37), "symlinkat": (266, 36),
    "fchmodat": (268, 53), "utimensat": (280, 88), "fallocate": (285, 47), "renameat2": (316, 276),
    "statfs": (137, 43), "fstatfs": (138, 44),
}  # fmt: skip
# Only where a process namespace holds nobody else: the program may then signal itself and its children.
_SIGNALS: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tgkill": (234, 131), "setpgid": (109, 154), "setsid": (112, 157),
}  # fmt: skip
_FORKS: dict[str, tuple[int | None, int | None]] = {"fork": (57, None), "vfork": (58, None)}
_ENOSYS: dict[str, tuple[int | None, int | None]] = {"clone3": (435, 435)}
# name: (numbers, argument looked at, values allowed)
_CHOSEN: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX, FIONBIO
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421)),
    # F_DUPFD, GETFD, SETFD, GETFL, SETFL, GETLK, SETLK, SETLKW, DUPFD_CLOEXEC, GETPIPE_SZ (F_SETOWN sends signals)
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)),
    # PR_SET_NAME, PR_GET_NAME
    "prctl": ((157, 167), 0, (15, 16)),
    "prlimit64": ((302, 261), 0, (0,)),
    "sendto": ((44, 206), 4, (0,)),
}
_CLONE = (56, 220)
_CLONE_THREAD = 0x00010000
# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, and CLONE_PTRACE, CLONE_PARENT, CLONE_IO
_CLONE_NEVER = 0x00000080 | 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000
_CLONE_NEVER |= 0x40000000 | 0x00002000 | 0x00008000 | 0x80000000

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _EPERM, _NO_CALL, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


@functools.cache
def filter_program(machine: str, *, threads: bool, processes: bool, files: bool, signals: bool) -> bytes:
    """The filter for ``machine`` (``platform.machine()``), as an array of ``struct sock_filter`` (8 bytes each).

    ``threads``, ``processes``: it may start some. ``files``: it may change files (where it sees only its own).
    ``signals``: it may send signals (where it sees only its own processes). KeyError for a machine not in MACHINES.
    """
    column = MACHINES.index(machine) if machine in MACHINES else None
    if column is None:
        raise KeyError(machine)
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _AUDIT[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    tables = [(_ALWAYS, _ALLOW), (_ENOSYS, _NO_CALL)]
    tables += [(_FILES, _ALLOW)] * files + [(_SIGNALS, _ALLOW)] * signals + [(_FORKS, _ALLOW)] * processes
    for table, answer in tables:
        for numbers in table.values():
            number = numbers[column]
            if number is not None:
                code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    for numbers, argument, values in _CHOSEN.values():
        check = [(_LOAD, 0, 0, 20 + 8 * argument), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM)]
        check.append((_LOAD, 0, 0, 16 + 8 * argument))
        for value in values:
            check += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        check.append((_RETURN, 0, 0, _EPERM))
        code += [(_EQUAL, 0, len(check), numbers[column]), *check]
    check = [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _CLONE_NEVER), (_RETURN, 0, 0, _EPERM)]
    check += [(_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW if threads else _EPERM)]
    check.append((_RETURN, 0, 0, _ALLOW if processes else _EPERM))
    code += [(_EQUAL, 0, len(check), _CLONE[column]), *check, (_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("=HBBI", *step) for step in code)
