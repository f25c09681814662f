"""``run_python``: a batch of tests of one program in one start of the sandbox.

The caller speaks with the launcher over two pipes, a test and a result at a time. Closing the pipe, or the caller's
death, ends the sandbox. Safe to call from several threads and processes at once.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, cast, get_args

from openzaya.errors import SandboxError
from openzaya.sandbox.methods import Method, isolation, start_of
from openzaya.sandbox.records import MAX_SOURCE_BYTES, MAX_TEST_BYTES, Limits, Result, Status, Test

_START_SECONDS = 20.0
"""Beyond the batch's own time: start and end on a machine that is busy."""
_END_SECONDS = 5.0


_USUAL = Limits()


def run_python(source: str, tests: Sequence[Test], limits: Limits = _USUAL) -> list[Result]:
    """Run the program ``source`` once for each test, isolated; one result a test, in their order.

    Each test has a process, globals and a scratch directory of its own; they run one after another. The interpreter
    is this one, with its standard library and no installed packages, a fixed hash seed and an empty environment.
    SandboxUnavailable where nothing isolates it, SandboxError for a source or test that is too large or cannot travel
    as JSON. Whatever the program does is a result, not an exception.
    """
    return run_batch(isolation().method, source, tests, limits)


def run_batch(method: Method, source: str, tests: Sequence[Test], limits: Limits) -> list[Result]:
    """As ``run_python``, by the method named, whether or not it has been seen to hold."""
    if len(source) > MAX_SOURCE_BYTES:
        raise SandboxError(f"a program of {len(source)} characters; the sandbox takes up to {MAX_SOURCE_BYTES}")
    messages = [_message(number, test) for number, test in enumerate(tests)]
    if not messages:
        return []
    start = start_of(method, source, limits)
    header = {**start.header, "with_values": any(test.function is not None for test in tests)}
    process = subprocess.Popen(
        start.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=start.environment,
        cwd="/",
        start_new_session=True,
    )
    # Pipes block: when all else fails, killing the launcher closes them.
    watchdog = threading.Timer(limits.wall_s + _START_SECONDS, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        return _converse(process, [marshal.dumps(header), *messages], limits)
    finally:
        watchdog.cancel()
        _end(process)


def _converse(process: subprocess.Popen[bytes], messages: list[bytes], limits: Limits) -> list[Result]:
    assert process.stdin is not None and process.stdout is not None
    results: list[Result] = []
    header, *tests = messages
    try:
        _send(process.stdin, header)
        for test in tests:
            _send(process.stdin, test)
            results.append(_result(_receive(process.stdout, limits)))
    except (OSError, EOFError, ValueError, RecursionError) as error:
        reason = f"the sandbox broke down: {_last_words(process) or error}"
        results += [Result("killed", error=reason) for _ in tests[len(results) :]]
    return results


def _message(number: int, test: Test) -> bytes:
    if test.function is not None and not isinstance(test.function, str):
        raise SandboxError(f"test {number}: function is {test.function!r}; it must be a name")
    if not isinstance(test.stdin, str):
        raise SandboxError(f"test {number}: stdin is {type(test.stdin).__name__}; it must be text")
    plain = {"stdin": test.stdin, "function": test.function, "arguments": list(test.arguments)}
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SandboxError(f"test {number}: its arguments cannot be written as JSON: {error}") from None
    if len(text) > MAX_TEST_BYTES:
        raise SandboxError(f"test {number}: {len(text)} bytes as JSON; the sandbox takes up to {MAX_TEST_BYTES}")
    return marshal.dumps(json.loads(text))


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "big") + message)
    stream.flush()


def _receive(stream: IO[bytes], limits: Limits) -> bytes:
    size = int.from_bytes(_exactly(stream, 8), "big")
    if size > 2 * limits.output_bytes + 4096:
        raise ValueError(f"a result of {size} bytes")
    return _exactly(stream, size)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("it ended before its tests did")
    return data


def _result(message: bytes) -> Result:
    fields = []
    while message:
        size = int.from_bytes(message[:8], "big")
        fields.append(message[8 : 8 + size])
        message = message[8 + size :]
    status, error, stdout, value, seconds = (field.decode("utf-8", "replace") for field in fields)
    if status not in get_args(Status):
        raise ValueError(f"a status of {status!r}")
    result = Result(cast(Status, status), stdout, None, error, float(seconds))
    if not value:
        return result
    try:
        return replace(result, value=json.loads(value, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        return replace(result, status="error", error="its value is no JSON")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """The launcher's last line on standard error, which no program can write to."""
    process.kill()
    assert process.stderr is not None
    lines = process.stderr.read(65536).decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the launcher end what it started; it does so at once when its input is closed."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    process.stderr.close()
