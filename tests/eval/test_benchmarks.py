"""The evaluation's numbers on scripted answers, its problems, and the files that the report reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from openzaya.errors import DataError
from openzaya.eval import benchmarks
from openzaya.eval.benchmarks import (
    Answered,
    EvalConfig,
    answer,
    draw_problems,
    evaluate,
    judge,
    keep_samples,
    score,
    summarise,
)
from openzaya.eval.plots_evaluation import never_trained_families
from openzaya.eval.report import write_report
from openzaya.infer.generate import Completion
from openzaya.model.transformer import Zaya
from openzaya.problems import NEVER_TRAINED, TRAINED_FAMILIES, Problem, Verdict, get_family, make_problem
from openzaya.problems.split import split_of
from openzaya.stages import write_evaluation
from tests.train import miniature


class ScriptedTokenizer:
    """Decodes a completion's tokens to a text of a list."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def decode(self, tokens: list[int]) -> str:
        return self.texts[tokens[0]]


def right(problem: Problem) -> str:
    solution = get_family(problem.family).solve(problem)
    return f"<think>{solution.trace}</think>{solution.answer}"


def answered(problem: Problem, greedy: str, samples: list[str], *, cut: tuple[int, ...] = ()) -> Answered:
    """What ``judge`` makes of these texts; the samples numbered in ``cut`` reached the token limit."""
    texts = [greedy, *samples]
    completions = [Completion([index], "length" if index - 1 in cut else "stop") for index in range(len(texts))]
    return judge(problem, completions[0], completions[1:], ScriptedTokenizer(texts))  # type: ignore[arg-type]


def problem(index: int, family: str = "sorting", difficulty: int = 1) -> Problem:
    return make_problem(family, difficulty, 0, index, "heldout")


WRONG = "<think>hm</think>nonsense"


def test_greedy_average_pass_and_majority_on_scripted_answers() -> None:
    p, q, r = problem(0), problem(1), problem(2)
    items = [
        answered(p, right(p), [right(p), right(p), WRONG, WRONG]),
        answered(q, WRONG, [WRONG, right(q), WRONG, "<think>h</think>else"]),
        answered(r, WRONG, [WRONG] * 4, cut=(0, 2)),
    ]
    result = summarise(items, EvalConfig(k=4), 1.0)
    group = result["groups"]["easy"]
    assert group["n"] == 3
    assert group["greedy"][0] == pytest.approx(1 / 3)
    assert group["avg_at_k"][0] == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert group["pass_at_k"][0] == pytest.approx(2 / 3)
    # Two right against two wrong: the earlier answer wins the tie.
    assert group["majority_at_k"][0] == pytest.approx(1 / 3)
    assert group["truncation_rate"] == pytest.approx(2 / 12)
    cell = result["families"]["sorting"]["1"]
    assert (cell["n"], cell["truncated"]) == (3, pytest.approx(2 / 12))
    assert cell["avg"] == group["avg_at_k"][0] and cell["pass_k"] == group["pass_at_k"][0]
    assert result["generated_tokens"] == 15 and result["no_verdict"] == 0


def test_the_score_of_a_problem() -> None:
    p = problem(0)
    item = answered(p, right(p), [WRONG, right(p), right(p), WRONG], cut=(0,))
    item.samples[1].tokens.extend([0] * 9)
    item.samples[2].tokens.extend([0] * 3)
    found = score(item)
    assert (found.greedy, found.average, found.passed, found.truncated) == (1.0, 0.5, 1.0, 0.25)
    assert found.majority == 0.0, "the earlier of two answers wins the tie"
    assert found.right_tokens == (10 + 4) / 2 and found.num_tokens == 5 + 12 and found.num_no_verdict == 0
    assert score(answered(p, WRONG, [WRONG])).right_tokens is None


def test_the_majority_counts_answers_only() -> None:
    p = problem(0)
    solution = get_family(p.family).solve(p)
    unfinished = "<think>and then and then"
    items = [answered(p, WRONG, [unfinished, unfinished, unfinished, WRONG, right(p), solution.answer])]
    assert summarise(items, EvalConfig(k=6), 0.0)["groups"]["easy"]["majority_at_k"][0] == 1.0
    nothing = [answered(p, WRONG, [unfinished, "<think>x</think>"])]
    assert summarise(nothing, EvalConfig(k=2), 0.0)["groups"]["easy"]["majority_at_k"][0] == 0.0


def test_answers_without_a_verdict_are_left_out_and_counted(monkeypatch) -> None:
    p, q = problem(0), problem(1)
    family = get_family("sorting")
    plain = type(family).verify

    def verify(self, problem, response, *, strict=False):
        if "unjudged" in response:
            return Verdict(None, "no idea")
        return plain(self, problem, response, strict=strict)

    monkeypatch.setattr(type(family), "verify", verify)
    items = [
        answered(p, "unjudged", [right(p), "unjudged", "unjudged", WRONG]),
        answered(q, right(q), ["unjudged"] * 4),
    ]
    result = summarise(items, EvalConfig(k=4), 0.0)
    group = result["groups"]["easy"]
    assert result["no_verdict"] == 7
    assert group["n"] == 2
    assert group["greedy"] == [1.0, 1.0, 1.0], "only one greedy answer could be judged"
    assert group["avg_at_k"][0] == 0.5 and group["pass_at_k"][0] == 1.0
    assert all(sample["reward"] is not None for sample in keep_samples(items, EvalConfig()))

    unjudged = summarise([answered(q, "unjudged", ["unjudged"])], EvalConfig(k=1), 0.0)
    assert unjudged["groups"]["easy"]["avg_at_k"] is None and unjudged["families"]["sorting"]["1"]["greedy"] is None
    json.dumps(unjudged, allow_nan=False)


def test_groups_split_by_difficulty_and_keep_the_unseen_family_apart() -> None:
    config = EvalConfig(per_cell=1, easy=(0, 1), hard=(2, 3))
    items = [answered(p, right(p), [right(p)] if p.difficulty < 2 else [WRONG]) for p in draw_problems(config)]
    groups = summarise(items, config, 0.0)["groups"]
    num_trained = len(TRAINED_FAMILIES)
    assert {name: group["n"] for name, group in groups.items()} == {
        "easy": 2 * num_trained,
        "hard": 2 * num_trained,
        "all": 4 * num_trained,
        "never_trained": 4,
    }
    assert groups["easy"]["avg_at_k"][0] == 1 and groups["hard"]["avg_at_k"][0] == 0
    assert groups["easy"]["difficulties"] == [0, 1] and groups["hard"]["difficulties"] == [2, 3]
    assert NEVER_TRAINED not in groups["all"]["families"]
    assert groups["never_trained"]["families"] == [NEVER_TRAINED]


def test_problems_are_held_out_never_repeat_and_are_those_of_the_seed() -> None:
    config = EvalConfig(per_cell=5)
    drawn = draw_problems(config)
    assert {split_of(p.canonical) for p in drawn} == {"heldout"}
    assert len({p.canonical for p in drawn if p.difficulty == 3}) == len([p for p in drawn if p.difficulty == 3])
    assert [p.canonical for p in draw_problems(config)] == [p.canonical for p in drawn]
    other = {p.canonical for p in draw_problems(config.model_copy(update={"seed": 1}))}
    assert other != {p.canonical for p in drawn}
    # What training draws, at any seed, is in the other split.
    assert {
        split_of(make_problem("sorting", 1, seed, i, "train").canonical) for seed in range(3) for i in range(50)
    } == {"train"}
    assert len(draw_problems(EvalConfig(per_cell=8))) >= 500, "the main evaluation asks 500 problems or more"


def test_kept_samples_are_few_and_of_both_kinds() -> None:
    p = problem(0)
    items = [answered(p, WRONG, [right(p)] * 9 + [WRONG] * 9) for _ in range(3)]
    kept = keep_samples(items, EvalConfig(k=18))
    assert len([sample for sample in kept if sample["reward"] == 1]) == benchmarks.SAMPLES_KEPT
    assert len([sample for sample in kept if sample["reward"] == 0]) == benchmarks.SAMPLES_KEPT
    assert kept[0]["temperature"] == 0.0 and kept[0]["gold"] == get_family("sorting").solve(p).answer


@pytest.fixture(scope="module")
def evaluated() -> tuple[dict, list[dict], EvalConfig]:
    config = EvalConfig(
        families=["sorting", NEVER_TRAINED], easy=(0, 1), hard=(2, 2), per_cell=2, k=3, max_new_tokens=6, max_rows=8
    )
    model = Zaya(miniature.config(max_position_embeddings=1024), seed=0)
    result, samples = evaluate(model, miniature.tokenizer(), config)
    return result, samples, config


def test_a_model_is_evaluated_the_same_way_twice(evaluated) -> None:
    result, samples, config = evaluated
    calls: list[tuple[str, int, int]] = []
    model = Zaya(miniature.config(max_position_embeddings=1024), seed=0)
    again, again_samples = evaluate(
        model, miniature.tokenizer(), config, progress=lambda what, done, total: calls.append((what, done, total))
    )
    assert {**again, "seconds": 0} == {**result, "seconds": 0} and again_samples == samples
    assert calls[-1] == ("3 samples", 12, 12) and ("greedy", 12, 12) in calls
    assert result["groups"]["all"]["n"] == 6 and result["groups"]["never_trained"]["n"] == 6
    # Six tokens never hold an answer with its reasoning.
    assert result["groups"]["all"]["truncation_rate"] > 0.9


def test_parts_of_an_evaluation_give_what_the_whole_gives(evaluated) -> None:
    *_, config = evaluated
    model, tokenizer = Zaya(miniature.config(max_position_embeddings=1024), seed=0), miniature.tokenizer()
    problems = draw_problems(config)[:5]
    whole = answer(model, tokenizer, problems, config)
    parts = answer(model, tokenizer, problems[:2], config) + answer(model, tokenizer, problems[2:], config, first=2)
    assert parts == whole
    assert answer(model, tokenizer, problems[2:], config) != whole[2:], "the seeds follow from the problem's number"


def test_eval_json_is_what_the_report_reads(evaluated, tmp_path: Path) -> None:
    result, samples, _ = evaluated
    stage = tmp_path / "run" / "05-eval"
    write_evaluation(stage, result, samples)
    stored = json.loads((stage / "eval.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert stored.keys() >= {"model", "k", "seed", "temperature", "max_new_tokens", "split", "groups", "families"}
    for group in stored["groups"].values():
        assert group.keys() >= {"n", "avg_at_k", "greedy", "pass_at_k", "majority_at_k", "truncation_rate", "families"}
        for key in ("avg_at_k", "greedy", "pass_at_k", "majority_at_k"):
            mean, low, high = group[key]
            assert 0 <= low <= mean <= high <= 1
    assert never_trained_families(stored) == [NEVER_TRAINED]
    for line in (stage / "samples.jsonl").read_text().splitlines():
        assert json.loads(line).keys() >= {"family", "difficulty", "prompt", "gold", "response", "reward", "truncated"}
    report = write_report(tmp_path / "run").markdown.read_text()
    assert re.search(rf"{NEVER_TRAINED.replace('_', ' ')} \*", report), "the unseen family is not marked in the report"


def test_a_report_without_any_verdict_can_be_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(type(get_family("sorting")), "verify", lambda self, *args, **kwargs: Verdict(None, "no idea"))
    config = EvalConfig(k=1)
    items = [answered(problem(0), "x", ["y"])]
    write_evaluation(tmp_path / "05-eval", summarise(items, config, 0.0), keep_samples(items, config))
    assert "sorting" in write_report(tmp_path / "05-eval").markdown.read_text()


def test_a_model_too_short_for_the_prompts_is_refused() -> None:
    model = Zaya(miniature.config(max_position_embeddings=16))
    with pytest.raises(DataError, match=r"a prompt has .* tokens, the model 16 positions; ask lower"):
        evaluate(model, miniature.tokenizer(), EvalConfig(families=["sorting"], per_cell=1, k=1))


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(DataError, match="unknown problem family 'sort'"):
        draw_problems(EvalConfig(families=["sort"]))


@pytest.mark.parametrize("nothing", [{"families": []}, {"easy": (3, 0), "hard": (7, 4)}], ids=str)
def test_an_evaluation_that_asks_nothing_is_refused(nothing: dict) -> None:
    with pytest.raises(DataError, match="ask nothing"):
        draw_problems(EvalConfig(**nothing))
