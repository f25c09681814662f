"""Whether a method of isolation holds here: a program tries what it must not be able to do, and what it must."""

from __future__ import annotations

import json
import os

from openzaya.errors import OpenZayaError
from openzaya.sandbox import linux
from openzaya.sandbox.methods import Method
from openzaya.sandbox.records import Limits, Test
from openzaya.sandbox.run import run_batch

_PROBE = """
import json, os, random, socket, sys

def succeeds(action):
    try:
        action()
    except OSError:
        return False
    return True

def held(secrets, outside):
    escaped = []
    for path in secrets:
        if succeeds(lambda: open(path, "rb").read(1)):
            escaped.append("reads " + path)
    for path in outside:
        if succeeds(lambda: open(path, "w").close()):
            escaped.append("writes " + path)
    if succeeds(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)):
        escaped.append("opens sockets")
    if succeeds(lambda: os.fork() or os._exit(0)):
        escaped.append("starts processes")
    if succeeds(lambda: os.execv("/bin/true", ["true"])):
        escaped.append("executes files")
    for parent in {os.getppid(), 1}:
        if os.getppid() > 1 and succeeds(lambda: os.kill(parent, 0)):
            escaped.append("signals others")
    if os.getuid() == 0:
        escaped.append("is root")
    if len(os.environ) > 0:
        escaped.append("sees the environment")
    return escaped
"""


def fault_of(method: Method) -> str | None:
    """None if it holds, else why not, in a few words."""
    if method == "landlock" and linux.landlock_abi() < linux.LANDLOCK_MINIMUM:
        return f"Landlock ABI {linux.landlock_abi()}, {linux.LANDLOCK_MINIMUM} needed"
    secrets = ["/etc/passwd", "/proc/self/status", "/proc/1/environ", __file__, os.path.expanduser("~/.bashrc")]
    outside = ["/openzaya-probe", "/var/tmp/openzaya-probe", "/dev/shm/openzaya-probe"]
    test = Test(function="held", arguments=[secrets, outside])
    try:
        result = run_batch(method, _PROBE, [test], Limits(cpu_s=10, wall_s=30))[0]
    except (OSError, OpenZayaError, json.JSONDecodeError) as error:
        return str(error)
    if result.status != "ok":
        return result.error or result.status
    return None if result.value == [] else f"a program {' and '.join(map(str, result.value))}"
