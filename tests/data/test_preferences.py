"""Preference pairs: read from files, generated, split without overlap, packed whole, resumed exactly."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from openzaya.data.mixture import Example, Mixture
from openzaya.data.preference_problems import FAULTS, ProblemPairSource, good_and_bad
from openzaya.data.preference_recipe import PreferenceConfig, build_pair_mixture, held_out_pairs
from openzaya.data.preferences import (
    PairBatch,
    PairBatches,
    PairExample,
    PairFileSource,
    make_pair,
    pack_conversations,
    scored_form,
)
from openzaya.errors import DataError
from openzaya.problems import FAMILIES, get_family, make_problem
from tests.train import miniature

WINDOW = 160


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def many_records(num: int) -> list[dict]:
    return [
        {"prompt": f"say {i}", "chosen": f"here is {i}", "rejected": "no " * (i % 5 + 1), "kind": f"k{i % 2}"}
        for i in range(num)
    ]


def file_source(path: Path, **settings) -> PairFileSource:
    return PairFileSource(miniature.tokenizer(), WINDOW, paths=str(path), **settings)


def problem_source(**settings) -> ProblemPairSource:
    values = {"families": ["sorting", "counting"], "difficulties": (0, 1)} | settings
    return ProblemPairSource(miniature.tokenizer(), values.pop("context_length", WINDOW), **values)


def draw(source, num: int) -> list[PairExample]:
    found: list[PairExample] = []
    while len(found) < num:
        pair = source.next_example()
        if pair is not None:
            found.append(pair)
    return found


def text_of(tokens: list[int]) -> str:
    return miniature.tokenizer().decode(tokens, skip_special_tokens=False)


# --- files ------------------------------------------------------------------------------------------


def test_all_forms_of_a_record_give_the_same_pair(tmp_path: Path) -> None:
    user = {"role": "user", "content": "2+2?"}
    good, bad = ({"role": "assistant", "content": text} for text in ("4", "5"))
    forms = [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"messages": [user], "chosen": good, "rejected": bad},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "2+2?", "chosen": [user, good], "rejected": [user, bad]},
    ]
    found = set()
    for index, form in enumerate(forms):
        path = write_jsonl(tmp_path / f"{index}.jsonl", [form])
        pair = draw(file_source(path, held_out_share=0.0), 1)[0]
        assert all("2+2?" in text_of(tokens) for tokens in pair.conversations)
        found.add((tuple(pair.tokens), pair.num_chosen))
    assert len(found) == 1


def test_the_scored_tokens_are_the_last_ones() -> None:
    pair = make_pair([5, 6, 7], [8, 9])
    assert pair.conversations == ([5, 6, 7], [8, 9])
    assert pair.loss_mask == [False, False, True, False, True]
    with pytest.raises(DataError, match="give two conversations"):
        make_pair([], [1])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"p.jsonl:1: has no fields 'chosen' and 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "'chosen' answers nothing; give a prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal; remove the record"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "the prompt is int"),
        ({"prompt": "a", "chosen": 7, "rejected": "c"}, "'chosen' is int; give a text"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "give a text or messages"),
        ({"prompt": "a", "chosen": "<think>b", "rejected": "c"}, "p.jsonl:1: 'chosen'.*never closes"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "p.jsonl:1: .*role 'user'"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "p.jsonl:1"),
    ],
    ids=str,
)
def test_a_broken_record_is_named(tmp_path: Path, record: dict, message: str) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [record])
    with pytest.raises(DataError, match=message):
        file_source(path, held_out_share=0.0).next_example()


def test_the_splits_of_a_file_share_no_prompt_and_hold_all(tmp_path: Path) -> None:
    records = many_records(200)
    # Several pairs of one prompt are on one side.
    records += [{"prompt": "say 3", "chosen": f"x{i}", "rejected": f"y{i}"} for i in range(20)]
    path = write_jsonl(tmp_path / "p.jsonl", records)
    prompts = {}
    for split in ("train", "heldout"):
        source = file_source(path, split=split, held_out_share=0.3)
        found = [source.next_example() for _ in records]
        assert source.report()["epoch"] == 0
        texts = [text_of(pair.conversations[0]) for pair in found if pair is not None]
        prompts[split] = {text.split("assistant")[0] for text in texts}
        assert source.report()["other_split"] == len(records) - len(texts)
    assert not prompts["train"] & prompts["heldout"]
    assert len(prompts["train"]) + len(prompts["heldout"]) == 200
    assert 35 <= len(prompts["heldout"]) <= 85


def test_too_long_and_too_few_pairs(tmp_path: Path) -> None:
    long = {"prompt": "a", "chosen": "b " * WINDOW, "rejected": "c"}
    path = write_jsonl(tmp_path / "p.jsonl", [long, {"prompt": "d", "chosen": "e", "rejected": "f"}])
    source = file_source(path, held_out_share=0.0)
    assert sorted((source.next_example() is None) for _ in range(2)) == [False, True]
    assert source.report()["too_long"] == 1
    config = PreferenceConfig.model_validate(
        {"sources": [{"kind": "pairs", "paths": [str(path)], "held_out_share": 0.01}]}
    )
    with pytest.raises(DataError, match="could not be used"):
        held_out_pairs(config, miniature.tokenizer(), WINDOW)


def test_reasoning_is_left_out_where_it_is_not_to_be_seen() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>secret</think>answer"}]
    assert scored_form(messages, with_reasoning=True)[1]["reasoning_content"] == "secret"
    assert scored_form(messages, with_reasoning=False)[1] == {"role": "assistant", "content": "answer"}
    with pytest.raises(DataError, match="end with the assistant"):
        scored_form(messages[:1], with_reasoning=True)


# --- generated pairs --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_good_solution_is_right_and_the_bad_one_has_its_fault(family: str) -> None:
    rng = random.Random(0)
    for index in range(12):
        problem = make_problem(family, index % 4, 0, index, "train")
        for fault in FAULTS:
            good, bad = good_and_bad(problem, fault, rng)
            assert good != bad
            judged = [get_family(family).verify(problem, f"<think>{t}</think>{a}").reward for t, a in (good, bad)]
            assert judged[0] == 1.0
            if fault == "wrong":
                assert judged[1] == 0.0, (problem, bad)
            if fault == "repeated":
                assert len(bad[0]) > len(good[0]) or bad[1] == ""


def test_the_shares_of_faults_are_kept_and_pairs_repeat_by_seed() -> None:
    source = problem_source(shares={"wrong": 3.0, "untidy": 1.0}, context_length=400)
    kinds = [pair.kind for pair in draw(source, 400)]
    assert set(kinds) == {"wrong", "untidy"} and 0.68 < kinds.count("wrong") / 400 < 0.82
    assert source.pair(7) == problem_source(shares={"wrong": 3.0, "untidy": 1.0}).pair(7)
    assert source.pair(7) != problem_source(shares={"wrong": 3.0, "untidy": 1.0}, seed=1).pair(7)


def test_no_problem_is_in_both_splits() -> None:
    prompts = {
        split: {problem_source(split=split).pair(i)[1][0]["content"] for i in range(300)}
        for split in ("train", "heldout")
    }
    assert not prompts["train"] & prompts["heldout"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": []}, "at least one family"),
        ({"difficulties": (3, 1)}, "lowest <= highest"),
        ({"shares": {"wrong": 0.0}}, "give numbers of 0 or more"),
        ({"shares": {"ugly": 1.0}}, "wrong, rambling, repeated, untidy"),
        ({"families": ["sortng"]}, "did you mean 'sorting'"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_says_why(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        problem_source(**settings)


# --- batches ----------------------------------------------------------------------------------------


def batches(windows: int = 3) -> PairBatches:
    config = PreferenceConfig.model_validate(
        {"sources": [{"kind": "problem_pairs", "families": ["sorting"], "difficulties": [0, 1]}]}
    )
    return PairBatches(build_pair_mixture(config, miniature.tokenizer(), WINDOW), WINDOW, windows)


def conversation_at(batch: PairBatch, last: int) -> list[int]:
    """The tokens of the document that ends at ``last``."""
    row, end = divmod(last, WINDOW)
    start = end - int(batch.positions[row, end])
    assert len(set(batch.document_ids[row, start : end + 1].tolist())) == 1
    return batch.tokens[row, start : end + 1].tolist()


def test_every_pair_is_whole_in_one_batch_in_the_mixtures_order() -> None:
    subject, expected = batches(), problem_source(families=["sorting"])
    for _ in range(12):
        batch = next(subject)
        assert 1 <= batch.tokens.shape[0] <= 3
        assert len(batch.chosen_P) == len(batch.rejected_P) >= 1
        assert int(batch.loss_mask.sum()) == 2 * len(batch.chosen_P)
        ends = torch.cat([batch.chosen_P, batch.rejected_P]).tolist()
        assert batch.loss_mask.flatten()[ends].all() and len(set(ends)) == len(ends)
        for chosen, rejected in zip(batch.chosen_P.tolist(), batch.rejected_P.tolist(), strict=True):
            pair = draw(expected, 1)[0]
            assert (conversation_at(batch, chosen), conversation_at(batch, rejected)) == pair.conversations
    assert subject.report()["batches"] == 12 and 0.5 < subject.report()["fill_rate"] <= 1


def test_batches_resume_bit_for_bit_through_json() -> None:
    subject = batches()
    for _ in range(3):
        next(subject)
    state = json.loads(json.dumps(subject.state_dict()))
    wanted = [next(subject) for _ in range(4)]
    again = batches()
    again.load_state_dict(state)
    for left, right in zip(wanted, (next(again) for _ in range(4)), strict=True):
        assert miniature.differences(vars(left), vars(right)) == []
    assert again.report() == subject.report()
    other = PairBatches(subject.mixture, WINDOW + 1, 3)
    with pytest.raises(DataError, match="windows of 160 tokens, these 161"):
        other.load_state_dict(state)


def test_a_file_resumes_in_the_middle_of_a_block(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", many_records(90))
    source = file_source(path)
    draw(source, 41)
    state = json.loads(json.dumps(source.state_dict()))
    wanted = draw(source, 100)
    again = file_source(path)
    again.load_state_dict(state)
    assert draw(again, 100) == wanted and again.report() == source.report()


def test_too_few_windows_and_a_source_of_other_examples() -> None:
    with pytest.raises(DataError, match="give at least 2"):
        batches(windows=1)

    class Texts:
        name = "texts"

        def next_example(self) -> Example:
            return Example([1, 2], [False, True])

        def state_dict(self) -> dict:
            return {}

    with pytest.raises(DataError, match="no pair"):
        next(PairBatches(Mixture([Texts()], [1.0], 0), WINDOW, 2))  # type: ignore[list-item]


def test_packed_conversations_end_where_it_says() -> None:
    rng = random.Random(1)
    conversations = [[rng.randrange(11, 200) for _ in range(rng.randint(1, 60))] for _ in range(30)]
    batch, last = pack_conversations(conversations, 64)
    for tokens, end in zip(conversations, last.tolist(), strict=True):
        assert batch.tokens.flatten()[end] == tokens[-1]
        assert int(batch.positions.flatten()[end]) == len(tokens) - 1


def test_held_out_pairs_differ_and_a_small_file_gives_what_it_has(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", many_records(60))
    sources = [{"kind": "pairs", "paths": [str(path)], "held_out_share": 0.5}]
    config = PreferenceConfig.model_validate({"sources": sources, "held_out_pairs": 50})
    found = held_out_pairs(config, miniature.tokenizer(), WINDOW)
    assert 20 <= len(found) <= 40
    assert len({tuple(pair.tokens) for pair in found}) == len(found)
    assert {pair.kind for pair in found} == {"k0", "k1"}
