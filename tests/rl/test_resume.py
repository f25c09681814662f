"""The same run, to the last bit: with rollout processes and without, interrupted and not."""

from __future__ import annotations

import signal

import pytest

from openzaya.rl.samples import read_lines
from tests.rl.letters import ROOT, children, is_alive, last_step, learner, run, same_course, stop, trained, wait_until

SYNCHRONOUS = {"publish_every": 2, "max_staleness": 0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stages") / "01-rl"
    run(directory, pipeline={"workers": 0, **SYNCHRONOUS})
    return directory


@pytest.mark.parametrize("workers", [1, 2])
def test_rollout_processes_change_no_bit_at_staleness_0(workers, undisturbed, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    directory = undisturbed.with_name(f"02-workers-{workers}")
    run(directory, pipeline={"workers": workers, **SYNCHRONOUS})
    assert len(trained(directory)) == 24
    assert same_course(directory) == same_course(undisturbed)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGKILL, 0), (signal.SIGINT, 1)])
def test_interrupted_run_goes_on_bit_for_bit(number, workers, undisturbed):
    directory = undisturbed.with_name(f"03-{signal.Signals(number).name}-{workers}")
    pipeline = {"workers": workers, **SYNCHRONOUS}
    with learner(directory, pipeline=pipeline) as process:
        assert wait_until(lambda: last_step(directory) >= 3, process)
        processes = children(process.pid)
        assert len(processes) == workers
        process.send_signal(number)
        process.wait(timeout=240)
    assert not any(map(is_alive, processes))
    assert 3 <= last_step(directory) < 6
    run(directory, pipeline={"workers": 0, **SYNCHRONOUS})
    assert same_course(directory) == same_course(undisturbed)


def test_asynchronous_run_goes_on_without_training_anything_twice(tmp_path):
    values = {"pipeline": {"workers": 1, "publish_every": 1, "max_staleness": 2}, "steps": 14, "checkpoint_every": 3}
    directory = tmp_path / "01-rl"
    with learner(directory, **values) as process:
        assert wait_until(lambda: last_step(directory) >= 4, process)
        stop(process)
    interrupted_at = last_step(directory)
    assert 4 <= interrupted_at < 14
    with learner(directory, **values) as process:
        assert wait_until(lambda: last_step(directory) >= 14, process)
        assert process.wait(timeout=240) == 0
    numbers = trained(directory)
    assert len(numbers) == len(set(numbers)) == 14 * 4
    staleness = [entry["rl/staleness_max"] for entry in read_lines(directory / "metrics.jsonl")]
    assert max(staleness) <= 2
