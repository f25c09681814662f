"""The report of stages of RL: figures, tables and samples from whole, half-written and hostile files."""

from __future__ import annotations

import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from openzaya.eval.plots_curriculum import max_prior_pass_rates
from openzaya.eval.report import write_report
from openzaya.eval.report_rl import _stage_section, calibration_table
from openzaya.eval.run_directory import read_run
from openzaya.rl.curriculum import kept_levels
from openzaya.runlog import RunLog, write_json
from tests.eval.test_report import Page, write_training_stage

CURVES = {
    *("rl_reward", "rl_solve_rates", "rl_length", "rl_entropy", "rl_agreement", "rl_pipeline", "rl_canaries"),
    *("rl_gradient_norm", "rl_load_entropy"),
}
FIT = {"difficulty": 3, "middle": 3.2, "slope": 0.8, "deviation": 0.4, "observed": [[3, 4, 8], [2, 8, 8], [3, 4, 8]]}


def step_metrics(step: int, source: str) -> dict[str, Any]:
    generator = random.Random(step)
    return {
        "rl/reward": 0.3 + 0.02 * step,
        "rl/solved_groups": 0.8,
        "rl/length_tokens": 80.0 - step,
        "rl/length_right_tokens": 0.0 if step == 2 else 70.0 - step,
        "rl/truncated": 0.01,
        "rl/entropy_nats": 0.06,
        "rl/masked_share_positive": 0.001,
        "rl/masked_share_negative": 0.002,
        "rl/engine_trainer_kl": 1e-4 * generator.random(),
        "rl/engine_trainer_r": 0.9999,
        "rl/on_policy_kl": 0.0 if step % 2 else 5e-13,
        "rl/on_policy_r": 1.0,
        "rl/staleness_mean": 0.5,
        "rl/staleness_max": 1,
        "rl/drawn_groups": 20,
        "rl/dropped_equal": 4,
        "rl/dropped_stale": 1,
        "rl/evicted": 0,
        "rl/repetition_rate": 0.0,
        "rl/long_loop_rate": 0.01,
        "rl/no_verdict": 0.0,
        **{f"rl/rare_tokens_top{part}": 0.001 for part in (10, 5, 2, 1)},
        f"solve_rate/{source}/plain": 0.3,
        f"solve_rate/{source}/tails": 0.4,
        "rl/sampled_tokens": 1000,
        "route/load_entropy": [0.99, 0.98],
        "optim/gradient_norm": 4.0,
        "time/step_s": 2.0,
        "time/rollout_tokens_per_s": 500.0,
    }


def rollout(step: int, environment: str, reward: float | None, **changes: Any) -> dict[str, Any]:
    values = {"difficulty": 2, "form": "plain", "solve_rate": 0.5, "reason": "correct" if reward else "wrong answer"}
    values |= {
        "verdict": reward,
        "num_tokens": 9,
        "is_truncated": False,
        "prompt": f"asked of {environment}",
        "response": "<think>x</think>5",
    }
    return {"step": step, "environment": environment, "reward": reward, **values, **changes}


def write_rl_stage(directory: Path, *, curriculum: str, source: str = "puzzles", steps: int = 12) -> None:
    toml = f'kind = "rl"\n[[sources]]\nname = "{source}"\ncurriculum = "{curriculum}"\nmax_prior_pass_rate = 0.75\n'
    with RunLog(
        *(directory,),
        total_steps=steps,
        phase=directory.name[3:],
        resolved_toml=toml,
        tensorboard=False,
        stream=io.StringIO(),
    ) as log:
        for step in range(1, steps + 1):
            log.log(step, step_metrics(step, source))
    names = ["sorting", "addition"]
    groups = [
        {"source": source, "environment": name, "difficulty": step // 3, "form": "plain", "solve_rate": 0.5}
        for step in range(steps)
        for name in names
    ]
    lines = [{"step": step + 1, "groups": groups[2 * step : 2 * step + 2]} for step in range(steps)]
    (directory / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rollouts = [rollout(step, name, reward) for step in (1, 9) for name in names for reward in (1.0, 0.0)]
    rollouts.append(rollout(9, "logic", None, reason="verifier failed"))
    rollouts.append(rollout(9, "logic", 0.0, reason="verbatim loop", is_truncated=True))
    (directory / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rollouts))
    prior: dict[str, Any] = {"pass_rates": {}, "calibration": {}}
    if curriculum == "online":
        prior["calibration"][source] = dict.fromkeys(names, FIT)
    else:
        prior["pass_rates"][source] = {"sorting": {"0": 1.0, "1": 0.75, "2": 0.2}, "addition": {"0": 1.0, "1": 0.9}}
    write_json(directory / "prior.json", prior)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    write_training_stage(directory / "04-sft", 20, 2.0)
    write_rl_stage(directory / "05-warmup", curriculum="fixed")
    write_rl_stage(directory / "06-curriculum", curriculum="online", source="gym")
    write_report(directory)
    return directory


def test_every_stage_of_rl_has_its_figures(run: Path) -> None:
    drawn = {path.stem for path in (run / "plots").glob("*.svg")}
    own = {"prior_05_warmup_puzzles", "levels_kept", "calibration_06_curriculum_gym", "difficulty_06_curriculum"}
    assert CURVES | own <= drawn
    assert "difficulty_05_warmup" not in drawn, "with a fixed curriculum nothing follows the policy"
    shown = re.findall(r"\(plots/(\w+)\.png\)", (run / "report.md").read_text())
    assert set(shown) == drawn and len(shown) == len(drawn)
    page = Page((run / "report.html").read_text())
    assert page.tags.count("img") == len(drawn)


def test_training_and_rl_do_not_share_an_axis(run: Path) -> None:
    found = read_run(run)
    assert [stage.name for stage in found.training] == ["04-sft"]
    assert [stage.name for stage in found.reinforcement] == ["05-warmup", "06-curriculum"]


def test_tables_hold_the_numbers_of_the_files(run: Path) -> None:
    markdown = (run / "report.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:2] == "| "]
    rows = [row for row in cells if row[0] == "05-warmup"]
    assert rows[0][:4] == ["05-warmup", "done", "12", "12,000"], "tokens are sampled ones"
    assert rows[1] == [
        *("05-warmup", "12", "240", "48", "12", "32.0 → 54.0 %", "79.0 → 68.0", "5.0e-13", "0.0 %", "0:24")
    ]
    assert "reward of rollouts" in markdown.split("## ")[0]


def test_samples_are_good_and_bad_and_of_every_reason(run: Path) -> None:
    text = (run / "report.md").read_text().split("## Rollouts: 05-warmup")[1].split("## Rollouts: 06-")[0]
    right, wrong = text.split("### Right")[1].split("### Not right")
    assert right.count("reward 1: correct") == 4
    assert "**sorting**, difficulty 2, step 9, plain, 9 tokens, 50.0 % of its group right" in right
    assert {"reward 0: wrong answer", "reward 0: verbatim loop", "no verdict: verifier failed"} <= set(
        wrong.splitlines()
    )


def test_right_is_what_the_verifier_says_whatever_it_was_rewarded_with(tmp_path: Path) -> None:
    stage = tmp_path / "11-behaviour"
    write_rl_stage(stage, curriculum="fixed", steps=2)
    entries = [
        rollout(2, "sorting", 0.73, verdict=1.0, reason="scored right"),
        rollout(2, "addition", 0.0, verdict=1.0, reason="verbatim loop"),
        rollout(2, "logic", 0.0, reason="scored wrong"),
    ]
    (stage / "rollouts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    section = _stage_section(read_run(tmp_path).reinforcement[0])
    right, wrong = ([(sample.note_label, sample.note) for sample in part] for part in (section.good, section.bad))
    assert right == [("reward 0", "verbatim loop"), ("reward 0.73", "scored right")], "the latest first"
    assert wrong == [("reward 0", "scored wrong")]


def test_levels_are_kept_as_the_stage_keeps_them(run: Path) -> None:
    stage = read_run(run).reinforcement[0]
    limit = max_prior_pass_rates(stage)["puzzles"]
    rates = stage.prior["pass_rates"]["puzzles"]
    assert {name: kept_levels(by_level, limit) for name, by_level in rates.items()} == {
        "sorting": [1, 2],
        "addition": [1],
    }, "of an environment with nothing left, the hardest level stays"


def test_a_stage_that_is_being_written_can_be_shown(tmp_path: Path) -> None:
    stage = tmp_path / "05-warmup"
    write_rl_stage(stage, curriculum="online", steps=1)
    for name in ("groups.jsonl", "rollouts.jsonl", "metrics.jsonl"):
        with (stage / name).open("a") as file:
            file.write('{"step": 2, "gro')
    (stage / "prior.json").unlink()
    assert "| 05-warmup | 1 | 20 |" in write_report(stage).markdown.read_text()


def test_a_stage_without_a_single_number_can_be_shown(tmp_path: Path) -> None:
    with RunLog(tmp_path / "05-rl", total_steps=2, tensorboard=False, stream=io.StringIO()) as log:
        log.log(1, {"rl/drawn_groups": 0, "rl/dropped_equal": 0, "rl/reward": math.nan})
    (tmp_path / "05-rl" / "resolved.toml").write_text("not [ toml")
    (tmp_path / "05-rl" / "groups.jsonl").write_text('{"step": 1, "groups": []}\n')
    assert "| 05-rl | 1 | 0 |" in write_report(tmp_path).markdown.read_text()


def test_what_a_policy_wrote_cannot_change_the_page(tmp_path: Path) -> None:
    stage = tmp_path / "05-rl"
    write_rl_stage(stage, curriculum="fixed", steps=2)
    hostile = "</pre><script>alert(1)</script> ``` \n# not a heading"
    line = rollout(2, "<b>env", 1.0, response=hostile + "y" * 5000, prompt=hostile, reason=hostile)
    (stage / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    paths = write_report(stage)
    page = Page(paths.html.read_text())
    assert "script" not in page.tags and "b" not in set(page.tags) - {"b"}
    assert page.text.count("<script>alert(1)</script>") == 3 and "<b>env" in page.text
    assert "characters ...]" in page.text


def test_a_calibration_has_a_table_and_a_figure(tmp_path: Path) -> None:
    many = {f"environment_{index:03d}": FIT | {"middle": index / 10} for index in range(70)}
    calibration = {"model": "04-sft", "calibration": {"gym": many, "own": {"logic": FIT | {"observed": []}}}}
    write_json(tmp_path / "calibration.json", calibration)
    assert calibration_table(calibration).rows[-1] == ("logic", "own", "3", "3.20", "0.40", "0.80", "0", "–")
    paths = write_report(tmp_path)
    assert {path.stem for path in paths.plots} == {"calibration_gym", "calibration_own"}
    assert "| environment_069 | gym | 3 | 6.90 | 0.40 | 0.80 | 3 | 66.7 % |" in paths.markdown.read_text()
