"""The run directory: each step once across kills and resumes, states, versions, privacy, the display."""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from openzaya.errors import DataError
from openzaya.runlog import ProgressDisplay, RunLog, format_duration, read_metrics


def quiet(directory: Path, **settings) -> RunLog:
    return RunLog(directory, **({"total_steps": 10, "stream": io.StringIO(), "tensorboard": False} | settings))


def status(directory: Path) -> dict:
    return json.loads((directory / "status.json").read_text())


def test_a_run_leaves_its_files(tmp_path):
    with quiet(tmp_path / "run", phase="pretrain", resolved_toml="seed = 1\n") as log:
        assert status(log.directory)["state"] == "running"
        log.log(1, {"loss/ce_nats": 2.5, "route/load_entropy": [0.9, 1.0], "route/expert_load": [[0.5, 0.5]]})
        log.set_final(final_loss_nats=2.5)
    run = tmp_path / "run"
    assert sorted(file.name for file in run.iterdir()) == [
        *("environment.json", "metrics.jsonl", "resolved.toml", "run.json", "status.json")
    ]
    (record,) = read_metrics(run / "metrics.jsonl")
    assert record.pop("time_unix_s") > 0
    assert record == {
        "step": 1,
        "loss/ce_nats": 2.5,
        "route/load_entropy": [0.9, 1.0],
        "route/expert_load": [[0.5, 0.5]],
    }
    final = status(run)
    assert (final["state"], final["step"], final["total_steps"], final["final_loss_nats"]) == ("done", 1, 10, 2.5)
    assert (run / "resolved.toml").read_text() == "seed = 1\n"
    assert json.loads((run / "run.json").read_text()) == {"openzaya_run_format": 1}


def test_resuming_leaves_each_step_once(tmp_path):
    with quiet(tmp_path) as log:
        for step in range(1, 8):
            log.log(step, {"loss/ce_nats": float(step)})
    with quiet(tmp_path, resume_step=4) as log:
        log.log(5, {"loss/ce_nats": 50.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss/ce_nats"]) for record in records] == [
        *((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0))
    ]


def test_a_half_written_last_line_is_skipped_and_removed_on_resume(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "loss/ce')
    assert [record["step"] for record in read_metrics(metrics)] == [1, 2]
    with quiet(tmp_path, resume_step=2) as log:
        log.log(3, {})
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{not json", "[1]", '{"loss": 1}', '{"step": "x"}', "null"])
def test_a_malformed_line_elsewhere_is_an_error(tmp_path, line):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(metrics)


def test_missing_metrics_are_an_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_steps_must_increase(tmp_path):
    with quiet(tmp_path, resume_step=4) as log:
        with pytest.raises(ValueError, match="step 4 was logged after step 4"):
            log.log(4, {})
        log.log(5, {})


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with quiet(tmp_path) as log:
        log.log(1, {"loss/ce_nats": float("nan"), "residual/rms": [1.0, float("inf")]})
        log.set_final(loss_nats=float("nan"))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["loss/ce_nats"], record["residual/rms"]) == (None, [1.0, None])
    assert status(tmp_path)["loss_nats"] is None


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("out of luck"), "failed")]
)
def test_an_exception_decides_the_state(tmp_path, error, state):
    with pytest.raises(type(error)), quiet(tmp_path) as log:
        log.log(3, {})
        raise error
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == (state, 3)
    assert status(tmp_path).get("error") == ("RuntimeError: out of luck" if state == "failed" else None)


def test_a_newer_run_directory_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"openzaya_run_format": 2}')
    with pytest.raises(DataError, match="run format 2"):
        quiet(tmp_path)


def test_a_killed_process_leaves_readable_files(tmp_path):
    script = textwrap.dedent(
        f"""
        import io
        from openzaya.runlog import RunLog
        log = RunLog({str(tmp_path)!r}, total_steps=10**9, tensorboard=False, stream=io.StringIO())
        step = 0
        while True:
            step += 1
            log.log(step, {{"loss/ce_nats": 1.0, "residual/rms": [1.0] * 200}})
            if step == 50:
                print("ready", flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(steps) >= 50
    assert steps == list(range(1, len(steps) + 1))
    assert status(tmp_path)["state"] == "running"


def test_the_environment_names_no_host_user_or_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "argv", ["/home/someone/bin/openzaya", "train", "/home/someone/recipe.toml"])
    with quiet(tmp_path, tensorboard=True) as log:
        log.log(1, {})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["arguments"] == ["openzaya", "train", "~/recipe.toml"]
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["torch"]
    assert environment["processor"]
    names = [str(file) for file in (tmp_path / "tensorboard").iterdir()]
    assert names
    everything = json.dumps(environment) + "".join(names)
    assert "someone" not in everything
    assert platform.node() not in everything
    assert os.sep + "home" + os.sep not in json.dumps(environment)


def test_tensorboard_reads_the_events_and_forgets_steps_that_were_redone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.log(
                step, {"loss/ce_nats": float(step), "route/load_entropy": [0.5, 0.25], "route/expert_load": [[1.0]]}
            )
    with quiet(tmp_path, tensorboard=True, resume_step=2) as log:
        log.log(3, {"loss/ce_nats": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/ce_nats")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.value for event in events.Scalars("route/load_entropy/layer_01")] == [0.25, 0.25]
    assert not [tag for tag in events.Tags()["scalars"] if "expert_load" in tag]


def test_plain_lines_come_every_ten_seconds_with_rate_and_eta():
    now = [0.0]
    stream = io.StringIO()
    display = ProgressDisplay("sft", 100, 20, stream=stream, clock=lambda: now[0])
    metrics = {"loss/ce_nats": 1.23456, "time/tokens_per_s": 12345.6, "route/load_entropy_min": 0.987}
    for step in range(21, 101):
        now[0] += 4.0
        display.update(step, metrics)
    lines = stream.getvalue().splitlines()
    # 4 s a step: every third step is the first at or past ten seconds; the last step always shows.
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [*range(23, 100, 3), 100]
    assert lines[0] == "sft 23/100  loss 1.235 nats  load entropy 0.987  12,346 tokens/s  ETA 5:08"
    assert lines[-1].endswith("ETA 0:00")


def test_a_terminal_gets_a_live_line():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = ProgressDisplay("pretrain", 10, 0, stream=stream, clock=iter([0.0, 2.0]).__next__)
    display.update(1, {"loss/ce_nats": 3.0})
    display.close()
    assert "pretrain" in stream.getvalue()
    assert "1/10" in stream.getvalue()
    assert "ETA 0:18" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (75, "1:15"), (59.6, "1:00"), (3675, "1:01:15"), (90000, "25:00:00")]
)
def test_durations(seconds, shown):
    assert format_duration(seconds) == shown
