"""``openzaya calibrate`` and ``openzaya rl``: a small model asked for real, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import error_line, openzaya
from tests.train import miniature

MODEL = '[model]\nstart_from = "04-sft"\n'
ROLLOUTS = "[rollout]\ngroup_size = 2\nmax_new_tokens = 6\n[prior]\nqueries = 2\nrollouts = 2\n"
ENVIRONMENTS = 'environments = [{ kind = "problems", families = ["sorting", "addition"] }]\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    miniature.write_babbling_model(directory / "04-sft" / "model")
    return directory


def write(run: Path, name: str, text: str) -> str:
    (run / name).write_text(text)
    return str(run / name)


def test_environments_are_calibrated_with_progress_a_table_and_a_report(run: Path) -> None:
    far = "model = { prior_mean = 30.0, prior_deviation = 0.5 }\n"
    recipe = write(run, "own.toml", 'kind = "calibrate"\nmax_difficulty = 3\n' + ENVIRONMENTS + MODEL + ROLLOUTS + far)
    finished = openzaya("calibrate", recipe, "--out", str(run / "own"), "--json")
    assert finished.code == 0, finished.err
    assert "calibrate: 2 environments, 2 groups of 2 rollouts each" in finished.err
    assert "calibrate: 4 of 4 groups" in finished.err and "ETA 0:00" in finished.err
    result = json.loads(finished.out.splitlines()[-1])
    assert json.loads((run / "own" / "calibration.json").read_text()) == result
    fits = result["calibration"]["environments"]
    assert set(fits) == {"sorting", "addition"}
    for fit in fits.values():
        assert len(fit["observed"]) == 2 and all(level <= 3 for level, _, _ in fit["observed"])
        assert fit["difficulty"] == 3 < fit["middle"], "where a stage would begin, beside the estimate"
    assert (run / "own" / "plots" / "calibration_environments.svg").exists()


def test_of_a_stage_of_rl_the_online_sources_are_calibrated(run: Path) -> None:
    sources = '[[sources]]\nname = "fixed"\n' + ENVIRONMENTS + '[[sources]]\nname = "gym"\ncurriculum = "online"\n'
    recipe = write(run, "rl.toml", 'kind = "rl"\n' + MODEL + sources + ENVIRONMENTS + ROLLOUTS)
    finished = openzaya("calibrate", recipe, "prior.queries=1", "--out", str(run / "gym"))
    assert finished.code == 0, finished.err
    assert finished.out.splitlines()[0].split()[:3] == ["environment", "source", "start"]
    assert {line.split()[1] for line in finished.out.splitlines()[1:3]} == {"gym"}
    stored = json.loads((run / "gym" / "calibration.json").read_text())
    assert list(stored["calibration"]) == ["gym"]


@pytest.mark.parametrize(
    ("verb", "text", "message"),
    [
        ("calibrate", 'kind = "rl"\n' + MODEL + '[[sources]]\nname = "a"\n' + ENVIRONMENTS, "curriculum 'online'"),
        ("calibrate", 'kind = "calibrate"\n' + ENVIRONMENTS + "[model]\n", "start_from is not set"),
        ("calibrate", 'kind = "calibrate"\nenvironments = []\n' + MODEL, "environments"),
        ("calibrate", 'kind = "eval"\n', "give a recipe of kind 'rl' or 'calibrate'"),
        ("rl", 'kind = "eval"\n', "is of kind 'eval', not 'rl'"),
        ("rl", 'kind = "rl"\n[model]\nstart_from = "nothing/here"\n', "sources"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run: Path, verb: str, text: str, message: str) -> None:
    finished = openzaya(verb, write(run, "bad.toml", text), "--out", str(run / "bad"))
    assert finished.code == 1
    assert message in error_line(finished)


def test_a_trained_stage_is_not_written_over(run: Path) -> None:
    stage = run / "06-trained"
    (stage / "checkpoints").mkdir(parents=True)
    (stage / "metrics.jsonl").write_text('{"step": 1}\n')
    recipe = write(run, "own.toml", 'kind = "calibrate"\n' + ENVIRONMENTS + MODEL)
    finished = openzaya("calibrate", recipe, "--out", str(stage))
    assert finished.code == 1 and "name another directory" in error_line(finished)
    assert (stage / "metrics.jsonl").read_text() == '{"step": 1}\n'
