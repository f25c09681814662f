"""The cascade's table: paired numbers on scripted scores, parts that make the whole, and a run on small models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from openzaya.environments.instructions import solve
from openzaya.errors import CheckpointError, ConfigError
from openzaya.eval import cascade
from openzaya.eval.benchmarks import Score, draw_problems
from openzaya.eval.cascade import (
    CascadeConfig,
    InstructionTest,
    RSATest,
    compare,
    evaluate_cascade,
    evenly,
    instruction_tasks,
    write_cascade,
)
from openzaya.eval.cascade_jobs import Outcome, RSAScore, instruction_score, rollout_reward, run_jobs
from openzaya.eval.report import write_report
from openzaya.model import hf
from openzaya.model.transformer import Zaya
from openzaya.problems import NEVER_TRAINED, get_family
from openzaya.problems.split import split_of
from openzaya.stages import run_stage
from openzaya.ttc.completer import Rollout, Usage
from tests.model.reference import perturb
from tests.train import miniature

TINY = {"families": ["sorting"], "difficulties": (0, 1), "per_cell": 2, "k": 2, "max_new_tokens": 5, "max_rows": 8}


def worth(average: float, *, greedy: float = 0.0, right_tokens: float | None = None) -> Score:
    return Score(greedy, average, float(average > 0.5), float(average > 0), 0.0, right_tokens, 0, 10)


# --- numbers --------------------------------------------------------------------------------------


def test_rows_are_compared_problem_by_problem() -> None:
    before = [worth(0.25, right_tokens=40.0), worth(0.5, right_tokens=60.0), worth(0.0)]
    after = [worth(0.5, right_tokens=30.0), worth(0.75, right_tokens=50.0), worth(0.25, greedy=1.0, right_tokens=99.0)]
    found = compare(before, after)
    assert found["avg_at_k"] == [0.25, 0.25, 0.25], "every problem gained the same"
    assert found["greedy"] is not None and found["greedy"][0] == pytest.approx(1 / 3)
    # The third problem was never solved before: its length says nothing about getting shorter.
    assert found["length_right_tokens"] == [-10.0, -10.0, -10.0]


def scripted(monkeypatch: pytest.MonkeyPatch, averages: list[float]) -> None:
    """Jobs of row i find ``averages[i]`` for every problem."""

    def run(jobs, num_processes):
        for job in reversed(list(jobs)):
            if job.kind == "rsa":
                yield job, Outcome([RSAScore((0.5, 0.9), 1.0, 1.0, 0.0, 100)] * len(job.questions))
            else:
                yield job, Outcome([worth(averages[job.row], right_tokens=20.0)] * len(job.questions))

    monkeypatch.setattr(cascade, "run_jobs", run)


def test_the_table_has_a_row_a_model_and_the_comparisons_that_matter(monkeypatch) -> None:
    scripted(monkeypatch, [0.25, 0.5, 0.75, 0.375])
    config = CascadeConfig(
        models=["a", "b", "c"], baselines=["clean"], labels={"a": "SFT"}, rsa=RSATest(problems=3, t=1), per_cell=2
    )
    lines: list[str] = []
    result, samples, problems = evaluate_cascade(
        config, {m: m for m in ("a", "b", "c", "clean")}, progress=lines.append
    )
    assert [(row["label"], row["role"]) for row in result["rows"]] == [
        *(("SFT", "cascade"), ("b", "cascade"), ("c", "cascade"), ("clean", "baseline"))
    ]
    assert [row["avg_at_k"][0] for row in result["rows"]] == [0.25, 0.5, 0.75, 0.375]
    pairs = {(entry["before"], entry["after"]): entry["avg_at_k"][0] for entry in result["comparisons"]}
    assert pairs == {("SFT", "b"): 0.25, ("b", "c"): 0.25, ("SFT", "c"): 0.5, ("clean", "c"): 0.375}
    rsa = result["rsa"]
    assert (rsa["label"], rsa["n"]) == ("c + Markovian RSA", 3)
    assert rsa["single"]["n"] == 3 and rsa["gain"][0] == pytest.approx(0.15) and rsa["majority_gain"][0] == 0.0
    assert [(band["single_right"], band["n"]) for band in rsa["bands"]] == [
        *(("below 30 %", 0), ("30 to 70 %", 0), ("above 70 %", 3), ("all", 0))
    ]
    assert rsa["bands"][2]["gain"][0] == pytest.approx(0.4) and rsa["bands"][0]["gain"] is None
    assert [line["rsa"]["rounds"] for line in problems if "rsa" in line] == [[0.5, 0.9]] * 3
    assert result["n"] == len(problems) == 9 * 8 * 2
    assert problems[0]["rows"]["clean"]["average"] == 0.375
    assert lines[-1].endswith("ETA 0:00") and any("parts left" in line for line in lines)
    json.dumps([result, samples, problems], allow_nan=False)


def test_the_problems_of_rsa_are_spread_over_the_table() -> None:
    assert evenly(8, 4) == [0, 2, 4, 6]
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(3, 9) == [0, 1, 2]
    problems = draw_problems(CascadeConfig(models=["a"], per_cell=2).questions())
    chosen = [problems[index] for index in evenly(len(problems), len(problems) // 2)]
    assert len({(problem.family, problem.difficulty) for problem in chosen}) == len(problems) // 2


def test_the_default_asks_enough_problems_and_all_of_them_held_out() -> None:
    problems = draw_problems(CascadeConfig(models=["a"]).questions())
    assert len(problems) >= 500
    assert {split_of(problem.canonical) for problem in problems} == {"heldout"}


# --- questions ------------------------------------------------------------------------------------


def test_instructions_are_held_out_and_judged_with_and_without_the_answer() -> None:
    tasks = instruction_tasks(InstructionTest(tasks=8, difficulties=(0, 3)), seed=3)
    assert [task.difficulty for task in tasks] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert {split_of(task.data["canonical"]) for task in tasks} == {"heldout"}
    task = tasks[0]
    right = solve(task)
    found = instruction_score(task, [f"<think>{right.trace}</think>{right.answer}", "<think>no</think>nonsense"], 7)
    assert (found.strict, found.num_tokens) == (0.5, 7) and (found.followed or 0) >= 0.5


def test_a_rollout_of_rsa_that_never_closed_its_reasoning_is_wrong() -> None:
    problem = draw_problems(CascadeConfig(models=["a"], per_cell=1).questions())[0]
    answer = get_family(problem.family).solve(problem).answer
    closed = Rollout("hm", answer, True, "stop", Usage())
    assert rollout_reward(problem, closed) == 1.0
    assert rollout_reward(problem, Rollout(f"</think>{answer}<think>", "", False, "length", Usage())) == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": []}, "at least 1"),
        ({"models": ["a", "b"], "baselines": ["a"]}, "name one twice"),
        ({"models": ["a"], "labels": {"b": "x"}}, "labels for b"),
        ({"models": ["a"], "families": ["sorting", NEVER_TRAINED]}, "ask it alone"),
    ],
    ids=str,
)
def test_settings_that_do_not_agree_are_refused(values, message) -> None:
    with pytest.raises(ValidationError, match=message):
        CascadeConfig(**values)


def test_difficulties_that_ask_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="lowest, highest"):
        instruction_tasks(InstructionTest(difficulties=(3, 1)), seed=0)


# --- on small models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    miniature.write_babbling_model(run / "04-sft" / "model")
    model = Zaya(miniature.config(max_position_embeddings=1024), seed=1)
    perturb(model, torch.Generator().manual_seed(1))
    hf.save(model, run / "05-warmup" / "model", layout="native", tokenizer=miniature.tokenizer())
    return run


def recipe(stages: Path, **changes: object) -> Path:
    path = stages / "20-cascade.toml"
    values = {"models": ["04-sft", "05-warmup"], **TINY, **changes}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    tables = ["[instructions]", "tasks = 2", "k = 2", "[rsa]", "problems = 2", "n = 2", "c = 2", "t = 1", "beta = 6"]
    tables += ["tau = 4", "final_budget = 8", "answer_budget = 4"]
    path.write_text("\n".join(['kind = "cascade"', *lines, *tables]))
    return path


@pytest.fixture(scope="module")
def evaluated(stages: Path) -> Path:
    run_stage(recipe(stages, processes=1), stages / "20-cascade")
    return stages / "20-cascade"


def test_a_stage_leaves_table_samples_problems_and_a_report(evaluated: Path) -> None:
    result = json.loads((evaluated / "cascade.json").read_text(), parse_constant=pytest.fail)
    assert [row["n"] for row in result["rows"]] == [4, 4]
    assert result["rows"][0]["instructions"]["n"] == 2 and result["rsa"]["n"] == 2
    assert len(result["rsa"]["rounds"]) == 2 and result["rsa"]["settings"]["beta"] == 6
    assert len((evaluated / "problems.jsonl").read_text().splitlines()) == 4
    samples = [json.loads(line) for line in (evaluated / "samples.jsonl").read_text().splitlines()]
    assert {sample["model"] for sample in samples} == {"04-sft", "05-warmup"}
    for family in ("sorting", "instructions"):
        assert any(sample["truncated"] for sample in samples if sample["family"] == family), "five tokens are few"
    paths = write_report(evaluated)
    text = paths.markdown.read_text()
    assert "| 04-sft | " in text and "| 04-sft → 05-warmup | " in text and "Markovian RSA (n=2, c=2" in text
    assert "held-out avg@2" in text.split("## ")[0], "facts come first"
    assert {path.stem for path in paths.plots} == {"cascade", "cascade_by_difficulty", "cascade_by_family"}


def test_processes_and_parts_do_not_change_a_number(stages: Path, evaluated: Path) -> None:
    run_stage(recipe(stages, processes=2), stages / "21-cascade")
    first, second = (json.loads((path / "cascade.json").read_text()) for path in (evaluated, stages / "21-cascade"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert (evaluated / "problems.jsonl").read_text() == (stages / "21-cascade" / "problems.jsonl").read_text()


def test_a_model_that_is_not_there_is_found_before_anything_is_asked(stages: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError), match="06-missing"):
        run_stage(recipe(stages, models=["04-sft", "06-missing"]), stages / "22-cascade")
    (stages / "07-begun").mkdir()
    with pytest.raises(ConfigError, match=r"07-begun: .* holds no checkpoint; let that stage finish first"):
        run_stage(recipe(stages, models=["04-sft", "07-begun"]), stages / "22-cascade")
    assert not (stages / "22-cascade" / "cascade.json").exists()


def test_few_samples_are_kept_of_each_model_and_family(tmp_path: Path) -> None:
    samples = [{"model": "a", "family": "sorting", "reward": reward} for reward in (1.0, 0.0, None)] * 9
    write_cascade(tmp_path, {}, samples, [])
    kept = [json.loads(line)["reward"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sorted(kept) == [0.0] * cascade.SAMPLES_KEPT + [1.0] * cascade.SAMPLES_KEPT


def test_one_process_works_in_this_one() -> None:
    assert list(run_jobs([], 1)) == []


def test_processes_end_with_the_one_that_asks_however_it_ends() -> None:
    code = (
        "import multiprocessing, os, signal\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from openzaya.eval.cascade_jobs import _begin_process\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, initializer=_begin_process)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert asked.returncode == -signal.SIGKILL, asked.stderr
    child, until = int(asked.stdout), time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and b"Z" not in Path(f"/proc/{child}/stat").read_bytes().split()[2:3]:
        assert time.monotonic() < until, os.kill(child, signal.SIGKILL) or "it outlived the process that asks"
        time.sleep(0.05)
