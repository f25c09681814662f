"""Hostile programs, as root and as an ordinary user: all contained, the judge alive, nothing left behind.

Where the machine offers no isolation, these tests fail: they never skip.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox.copies import copy_package, left_over
from tests.sandbox.hostile_programs import PROGRAMS

HERE = Path(__file__).parent
ORDINARY = 65534
USERS = ("root", "ordinary") if os.geteuid() == 0 else ("ordinary",)


def interpreter(user: str) -> str:
    """One that this user may run: that of the tests may lie in root's closed home."""
    own = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    candidates = [own, "/usr/bin/python3", "/usr/local/bin/python3"]
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for candidate in candidates:
        if os.path.exists(candidate) or user == "root":
            try:
                if subprocess.run([candidate, "-c", check], cwd="/", **identity(user)).returncode == 0:
                    return candidate
            except OSError:
                continue
    pytest.fail(f"no Python 3.11 that user {ORDINARY} can run; install one for all users")


def identity(user: str) -> dict[str, Any]:
    if user == "root" or os.geteuid() != 0:
        return {}
    return {"user": ORDINARY, "group": ORDINARY, "extra_groups": []}


@functools.cache
def outcome(user: str, method: str = "") -> dict[str, Any]:
    """All programs in one process of that user, from a copy of the package that anybody may read."""
    with (
        tempfile.TemporaryDirectory(prefix="openzaya-sandbox-") as place,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        os.chmod(place, 0o755)
        copy = copy_package(Path(place))
        for name in ("driver.py", "hostile_programs.py"):
            shutil.copy(HERE / name, place)
        secret, victim = Path(place, "secret"), Path(place, "victim")
        secret.write_text("secret")
        victim.write_text("victim")
        victim.chmod(0o666)
        names = {
            "ABSTRACT": f"\0openzaya-test-{os.getpid()}",
            "LISTENING": tcp.getsockname()[1],
            "HOME": os.path.expanduser("~"),
            "SECRET": str(secret),
            "VICTIM": str(victim),
            "REPOSITORY": str(copy / "errors.py"),
        }
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
            abstract.bind(names["ABSTRACT"])
            command = [interpreter(user), "driver.py", "hostile_programs.py", json.dumps(names), method]
            ran = subprocess.run(
                command,
                cwd=place,
                env={"PYTHONPATH": place, "PATH": os.environ["PATH"]},
                capture_output=True,
                text=True,
                **identity(user),
            )
        if ran.returncode:
            return {"failed": ran.stderr[-2000:]}
        return {**json.loads(ran.stdout), "left": left_over(place), "victim": victim.read_text()}


def check(outcome: dict[str, Any], name: str) -> None:
    assert "failed" not in outcome, outcome["failed"]
    for result in outcome["results"][name]:
        assert "ESCAPED" not in result["stdout"], result
        # On a busy machine the clock may run out before a program has done its worst.
        if "by the clock" not in result["error"] and "not started" not in result["error"]:
            assert result["status"] in PROGRAMS[name][0], result
        assert "sandbox" not in result["error"], f"the supervisor did not survive: {result}"


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_contained(user, name):
    check(outcome(user), name)


@pytest.mark.parametrize("user", USERS)
def test_nothing_is_left(user):
    assert outcome(user).get("left") == []
    assert outcome(user)["victim"] == "victim"
    assert outcome(user)["user"] == (0 if user == "root" else identity(user).get("user", os.geteuid()))


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("method", ["namespaces", "bubblewrap", "landlock"])
def test_contained_by_every_method(user, method):
    if method == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed; another method holds")
    found = outcome(user, method)
    faults = []
    for name in PROGRAMS:
        try:
            check(found, name)
        except AssertionError as fault:
            faults.append(f"{name}: {str(fault).splitlines()[0]}")
    # Where nothing may fork or signal, such programs fail at that instead.
    assert faults == [] and found["left"] == []
