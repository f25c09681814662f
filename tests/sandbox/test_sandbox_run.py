"""What ordinary programs get: results in order, limits, fresh state; and what happens to the caller's mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openzaya.errors import SandboxError, SandboxUnavailable
from openzaya.sandbox import Limits, Result, Test, isolation, methods, run_python
from tests.sandbox.copies import copy_package, left_over, running

PATIENT = Limits(cpu_s=10, wall_s=60)


PLAIN = Test()


def one(source: str, test: Test = PLAIN, **limits: float) -> Result:
    return run_python(source, [test], dataclasses.replace(PATIENT, **limits))[0]


def test_results_come_in_order_each_from_a_fresh_process():
    source = "import os, sys\ncalls = []\ndef f(x):\n    calls.append(x)\n    return [len(calls), x, os.listdir('.')]"
    source += "\ndef g(x):\n    open('note', 'w').write('x')\n    return sys.getsizeof(x)"
    tests = [Test(function="f", arguments=[number]) for number in range(3)]
    tests.insert(1, Test(function="g", arguments=[1]))
    results = run_python(source, tests, PATIENT)
    assert [result.status for result in results] == ["ok"] * 4
    assert [results[place].value for place in (0, 2, 3)] == [[1, number, []] for number in range(3)]


def test_standard_input_and_output():
    source = "import sys\nfor line in sys.stdin: print(line.strip()[::-1])"
    results = run_python(source, [Test(stdin="abc\nżółw\n"), Test(stdin=""), Test(stdin="x" * 300_000)], PATIENT)
    assert [result.stdout for result in results[:2]] == ["cba\nwłóż\n", ""]
    assert results[2].status == "output" and len(results[2].stdout) == PATIENT.output_bytes


@pytest.mark.parametrize(
    "value", [None, 0, -1.5, "", "ü\n", [], [1, [2, [3]]], {"a": {"b": []}}, 10**60, True, "\ud800"]
)
def test_values_travel_as_json(value):
    assert one("def f(x): return x", Test(function="f", arguments=[value])) == dataclasses.replace(
        Result("ok", value=value), seconds=pytest.approx(0, abs=60)
    )


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("def f(): return {1, 2}", "TypeError"),
        ("def f(): return float('nan')", "ValueError"),
        ("def f(): return object()", "TypeError"),
        ("def f():\n  x = []\n  x.append(x)\n  return x", "ValueError"),
        ("def f(): raise KeyError('k')", "KeyError: 'k'"),
        ("def g(): pass", "KeyError"),
        ("f = 3", "TypeError"),
        ("def f(): import os; os._exit(0)", "ended without giving a value"),
        ("def f(): raise SystemExit", "ended without giving a value"),
        ("def f(): import os; os.write(3, b'V[1'); os._exit(0)", "no JSON"),
        ("def f(): import os; os.write(3, b'V' + b'[' * 50000); os._exit(0)", "no JSON"),
        ("def f(): import os; os.write(3, b'VNaN'); os._exit(0)", "no JSON"),
        ("def f(: pass", "SyntaxError"),
        ("\0", "null bytes"),
        ("\ud800", "Error"),
    ],
)
def test_no_value(source, error):
    result = one(source, Test(function="f"))
    assert result.status == "error" and error in result.error and result.value is None


def test_a_program_cannot_pass_for_another_test():
    source = "import os, sys\nif sys.stdin.read() == 'a':\n    os.write(1, b'out')\nelse:\n    raise ValueError(7)"
    results = run_python(source, [Test(stdin="b"), Test(stdin="a"), Test(stdin="b")], PATIENT)
    assert [(result.status, result.stdout) for result in results] == [("error", ""), ("ok", "out"), ("error", "")]
    assert results[0].error == "ValueError: 7"


def test_limits_of_time():
    loop = one("print('before', flush=True)\nwhile True: pass", cpu_s=0.3)
    assert (loop.status, loop.stdout) == ("timeout", "before\n") and "processor" in loop.error
    sleepers = run_python("import time; time.sleep(99)", [Test(), Test()], Limits(wall_s=0.8))
    assert [result.status for result in sleepers] == ["timeout"] * 2 and "not started" in sleepers[1].error


def test_limits_of_memory_and_output():
    assert one("x = bytearray(200 << 20)", memory_mb=100).status == "memory"
    assert one("x = bytearray(200 << 20)", memory_mb=400).status == "ok"
    assert one("print('x' * 99)", output_bytes=100).status == "ok"
    assert one("print('x' * 100)", output_bytes=100).status == "output"
    assert one("def f(): return 'x' * 98", Test(function="f"), output_bytes=100).status == "ok"
    assert one("def f(): return 'x' * 99", Test(function="f"), output_bytes=100).status == "output"


def test_what_ordinary_programs_need():
    source = """
import asyncio, atexit, collections, concurrent.futures, dataclasses, decimal, fractions, heapq, io, os, random, re
import sqlite3, string, sys, tempfile, threading, typing
atexit.register(print, "last")
out = open(1, "w", closefd=False)
out.write("unflushed\\n")
@dataclasses.dataclass
class Point:
    x: typing.Optional[int] = None
assert typing.get_type_hints(Point) and __name__ == "__main__" and sys.argv == ["program.py"]
with concurrent.futures.ThreadPoolExecutor(4) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]
async def wait(): await asyncio.sleep(0.001); return 5
assert asyncio.run(wait()) == 5
if SCRATCH:
    with tempfile.NamedTemporaryFile("w+") as file: file.write("x")
assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
assert open("/dev/urandom", "rb").read(3) and open(os.devnull, "w").write("x")
assert {"a", "b", "c", "d"} and hash("a") == HASH
print("first")
"""
    hash_of_a = one("print(hash('a'))").stdout.strip()
    source = f"SCRATCH = {isolation().method == 'namespaces'}\nHASH = {hash_of_a}\n{source}"
    result = one(source)
    assert (result.status, result.error) == ("ok", "")
    assert sorted(result.stdout.split()) == ["first", "last", "unflushed"]


@pytest.mark.parametrize(
    "limit", [{"cpu_s": 0}, {"wall_s": -1}, {"memory_mb": 1.5}, {"num_processes": 0}, {"cpu_s": "1"}]
)
def test_limits_that_make_no_sense(limit):
    with pytest.raises(SandboxError, match=next(iter(limit))):
        Limits(**limit)


def test_tests_that_cannot_travel():
    for arguments in ([{1, 2}], [float("inf")], [object()]):
        with pytest.raises(SandboxError, match="test 0: its arguments"):
            run_python("", [Test(function="f", arguments=arguments)])
    with pytest.raises(SandboxError, match="characters"):
        run_python("#" * (2 << 20), [Test()])
    assert run_python("", []) == []


def test_many_callers_at_once():
    def call(number: int) -> object:
        return one("def f(x): return x * 2", Test(function="f", arguments=[number])).value

    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(24))) == [2 * number for number in range(24)]
    assert threading.active_count() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_caller(number):
    with tempfile.TemporaryDirectory(prefix="openzaya-sandbox-") as place:
        copy_package(Path(place))
        source = "import os\nos.setsid() if os.fork() else None\nwhile True: pass"
        limits = "LIMITS = Limits(cpu_s=99, wall_s=99, num_processes=9)"
        program = f"from openzaya.sandbox import *\n{limits}\nrun_python({source!r}, [Test()], LIMITS)"
        if isolation().method == "landlock":
            program = program.replace("num_processes=9", "num_processes=1").replace("os.fork()", "0")
        caller = subprocess.Popen([sys.executable, "-c", program], env={"PYTHONPATH": place}, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(running(f"'{place}/openzaya'")) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)  # launcher, supervisor, the program and its child
        os.kill(caller.pid, number)
        caller.communicate(timeout=60)
        assert left_over(f"'{place}/openzaya'") == []


def test_a_machine_without_isolation_is_refused(monkeypatch):
    monkeypatch.setattr(methods, "_found", {})
    monkeypatch.setattr("openzaya.sandbox.probe.fault_of", lambda method: "not here")
    with pytest.raises(SandboxUnavailable, match=r"namespaces: not here; .*not run without"):
        run_python("print(1)", [Test()])
    with pytest.raises(SandboxUnavailable, match="win32"):
        monkeypatch.setattr(sys, "platform", "win32")
        isolation()


def test_a_method_that_does_not_hold_is_not_taken(monkeypatch):
    """The probe program finds a launcher that protects from nothing."""
    from openzaya.sandbox import probe

    def unprotected(method, source, tests, limits):
        # Nothing may be written, and executing a file would end the program.
        program = f"{source}\n"
        program = program.replace("    if succeeds(lambda: os.execv", "    if False and succeeds(lambda: os.execv")
        program += f"print(json.dumps(held({tests[0].arguments[0]!r}, [])))"
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return [Result("ok", value=json.loads(ran.stdout))]

    assert probe.fault_of(isolation().method) is None
    monkeypatch.setattr(probe, "run_batch", unprotected)
    fault = probe.fault_of(isolation().method)
    for words in ("reads /etc/passwd", "opens sockets", "starts processes", "environment"):
        assert words in fault
