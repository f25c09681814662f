"""Rollout processes and learner are killed again and again in one run; it ends as if nothing had happened.

The reward curve is compared by its mean over the last third of the steps. Asynchronous runs of one recipe differ by
what happened to finish first; the undisturbed runs (of several seeds, in the long test) say by how much.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from itertools import pairwise

import pytest

from openzaya.rl.samples import read_lines
from tests.rl.letters import children, is_alive, last_step, learner, lines, run, trained, wait_until

PIPELINE = {"workers": 1, "publish_every": 1, "max_staleness": 2}


def run_with_kills(directory, worker_kills, learner_kills, **values):
    """Run to the end; a kill is due when ``groups.jsonl`` has that many lines. Returns what was killed when."""
    due = sorted([(step, "worker") for step in worker_kills] + [(step, "learner") for step in learner_kills])
    done = []
    while True:
        with learner(directory, **values) as process:
            while due and wait_until(lambda: last_step(directory) >= due[0][0], process):
                step, what = due[0]
                if what == "learner":
                    due.pop(0)
                    processes = children(process.pid)
                    process.kill()
                    process.wait()
                    done.append(due_at := (what, last_step(directory)))
                    assert due_at[1] < values["steps"], "it was over before the kill"
                    break
                found = children(process.pid)
                if found:
                    due.pop(0)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(random.Random(step).choice(found), signal.SIGKILL)
                        done.append((what, last_step(directory)))
            else:
                processes = []
                code = process.wait(timeout=280)
                assert code == 0, directory.with_suffix(".log").read_text()[-3000:]
                break
        wait_until_gone(processes)
    return done


def wait_until_gone(processes):
    until = time.monotonic() + 60
    while any(map(is_alive, processes)):
        assert time.monotonic() < until, "a rollout process outlived its learner"
        time.sleep(0.05)


def rewards(directory):
    return [entry["rl/reward"] for entry in read_lines(directory / "metrics.jsonl")]


def end_reward(directory):
    """Mean reward of the last third of the steps."""
    values = rewards(directory)
    return statistics.mean(values[-len(values) // 3 :])


def assert_whole(directory, steps, prompts_per_step):
    """Every step is there once, with all its groups, and none is there twice."""
    entries = lines(directory)
    assert [entry["step"] for entry in entries] == list(range(1, steps + 1))
    numbers = trained(directory)
    assert len(numbers) == steps * prompts_per_step
    assert len(set(numbers)) == len(numbers)
    drawn = [group["number"] for entry in entries for group in entry["groups"]]
    assert len(set(drawn)) == len(drawn)


def test_three_worker_kills_and_two_learner_kills(tmp_path):
    values = {"steps": 24, "checkpoint_every": 4, "pipeline": PIPELINE}
    undisturbed, disturbed = tmp_path / "01-undisturbed", tmp_path / "02-disturbed"
    run(undisturbed, **values | {"pipeline": {"workers": 0}})
    kills = run_with_kills(disturbed, [2, 9, 17], [5, 14], **values)
    assert [what for what, _ in kills].count("worker") == 3 and [what for what, _ in kills].count("learner") == 2
    for directory in (undisturbed, disturbed):
        assert_whole(directory, 24, 4)
        assert end_reward(directory) > rewards(directory)[0] + 0.1
    assert abs(end_reward(undisturbed) - end_reward(disturbed)) < 0.25


@pytest.mark.slow
def test_twenty_worker_kills_and_ten_learner_kills(tmp_path):
    """Within noise: the disturbed run's end reward is no further from the mean of four undisturbed seeds than
    three standard deviations of the difference, s * sqrt(1 + 1/4), with s at least 0.02."""
    steps = 80
    pipeline = {"workers": 2, "publish_every": 2, "max_staleness": 2}
    values = {"steps": steps, "checkpoint_every": 3, "prompts_per_step": 8, "pipeline": pipeline}
    # Slow enough that nothing is solved for good before the end; groups without signal count as trained on here.
    values["optimizer"] = {"muon_learning_rate": 4e-3, "adamw_learning_rate": 1e-3, "momentum": 0, "warmup_steps": 1}
    values["algorithm"] = {"drop_equal_groups": False}
    ends = []
    for seed in range(4):
        directory = tmp_path / f"01-undisturbed-{seed}"
        with learner(directory, seed=seed, **values) as process:
            assert wait_until(lambda: False, process, limit_s=1800) is False
            assert process.returncode == 0
        assert_whole(directory, steps, 8)
        ends.append(end_reward(directory))
    rng = random.Random(5)
    points = rng.sample(range(1, steps - 5), 30)
    disturbed = tmp_path / "02-disturbed"
    kills = run_with_kills(disturbed, points[:20], points[20:], seed=0, **values)
    assert [what for what, _ in kills].count("worker") == 20 and [what for what, _ in kills].count("learner") == 10
    assert_whole(disturbed, steps, 8)
    print(f"end reward: disturbed {end_reward(disturbed):.3f}, undisturbed {ends}; killed {kills}")
    bound = 3 * max(statistics.stdev(ends), 0.02) * (1 + 1 / len(ends)) ** 0.5
    assert abs(end_reward(disturbed) - statistics.mean(ends)) <= bound, (end_reward(disturbed), ends)


def test_steps_of_a_synchronous_run_follow_each_other(tmp_path):
    """The measure itself: it sees a step that is missing and a group that is there twice."""
    directory = tmp_path / "01-rl"
    run(directory, steps=2, pipeline={"workers": 0})
    assert_whole(directory, 2, 4)
    assert all(after == before + 1 for before, after in pairwise(entry["step"] for entry in lines(directory)))
    first = (directory / "groups.jsonl").read_text().splitlines()[0]
    (directory / "groups.jsonl").write_text(first + "\n" + first.replace('"step": 1', '"step": 2') + "\n")
    with pytest.raises(AssertionError):
        assert_whole(directory, 2, 4)
