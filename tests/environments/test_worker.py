"""The worker: results, failures that cost one process, restarts, sharing, and nothing left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openzaya.environments import worker as worker_module
from openzaya.environments.worker import Worker, WorkerFailure

TARGET = "tests.environments.services:Service"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(TARGET, {"start": 5})
    yield made
    made.close()
    assert made.pid is None


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_calls_cross_as_json_and_state_is_kept(worker: Worker) -> None:
    values = [1, 2.5, None, True, "ä\u2028\n\x00\ud800", [{"a": []}]]
    assert worker.call("echo", *values, timeout_s=10) == values
    first = worker.call("next", timeout_s=10)
    assert worker.call("next", timeout_s=10) == first + 1
    assert worker.call("pid", timeout_s=10) == worker.pid != os.getpid()
    assert worker.call("print", timeout_s=10) == "printed", "what libraries print is no reply"
    assert len(worker.call("flood", timeout_s=10)) == 5_000_000
    big = "y" * 3_000_000
    assert worker.call("echo", big, timeout_s=10) == [big]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fail", "fail: ValueError: no such thing"),
        ("no_json", "TypeError"),
        ("eat_memory", "MemoryError"),
        ("recurse", "RecursionError"),
        ("missing", "AttributeError"),
    ],
)
def test_what_is_raised_there_is_a_failure_here_and_the_process_lives(
    worker: Worker, method: str, message: str
) -> None:
    pid = worker.call("pid", timeout_s=10)
    with pytest.raises(WorkerFailure, match=message):
        worker.call(method, timeout_s=10)
    assert worker.call("pid", timeout_s=10) == pid


@pytest.mark.parametrize(
    ("method", "message"), [("hang", "no answer within 0.2 s"), ("die", "exit code 3"), ("leave", "exit code 0")]
)
def test_a_lost_process_is_replaced(worker: Worker, method: str, message: str) -> None:
    pid = worker.call("pid", timeout_s=10)
    with pytest.raises(WorkerFailure, match=message):
        worker.call(method, timeout_s=0.2)
    assert not is_running(pid)
    assert worker.call("next", timeout_s=10) == 6, "a new service"


def test_sleep_is_no_work_but_has_its_end_too(worker: Worker) -> None:
    assert worker.call("sleep", 0.5, timeout_s=0.2) == "awake"
    with pytest.raises(WorkerFailure, match="no answer"):
        worker.call("sleep", 60, timeout_s=0.1)


def test_a_killed_process_is_replaced(worker: Worker) -> None:
    pid = worker.call("pid", timeout_s=10)
    os.kill(pid, 9)
    for _ in range(2):  # the first call may still find the pipe open
        try:
            assert worker.call("pid", timeout_s=10) != pid
            break
        except WorkerFailure as failure:
            assert "died" in str(failure)


def test_threads_wait_for_each_other(worker: Worker) -> None:
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(worker.call("echo", n, timeout_s=10))) for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [[n] for n in range(20)]


def test_what_cannot_start_says_why() -> None:
    for target, message in (
        ("tests.environments.services:Broken", "not today"),
        ("tests.environments.services:Missing", "AttributeError"),
        ("no_such_module:Service", "ModuleNotFoundError"),
    ):
        with pytest.raises(WorkerFailure, match=f"cannot start {target}: .*{message}"):
            Worker(target).call("echo", timeout_s=10)


def test_the_last_holder_ends_the_process() -> None:
    worker = Worker(TARGET)
    other = worker.share()
    pid = worker.call("pid", timeout_s=10)
    worker.close()
    assert other.call("pid", timeout_s=10) == pid
    other.close()
    assert not is_running(pid)
    worker_module._end_all()


def test_a_fork_starts_its_own(worker: Worker) -> None:
    pid = worker.call("pid", timeout_s=10)
    child = os.fork()
    if child == 0:
        try:
            own = worker.call("pid", timeout_s=10)
            worker.restart()
            os._exit(0 if own != pid else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert worker.call("pid", timeout_s=10) == pid


def test_the_process_ends_with_its_caller() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        worker = Worker(TARGET)
        os.write(write, str(worker.call("pid", timeout_s=10)).encode())
        os._exit(0)
    pid = int(os.read(read, 20))
    os.waitpid(child, 0)
    for _ in range(100):
        if not is_running(pid) or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("still running")
