"""``openzaya rsa``: what it prints where, its exit codes, its journal, and what it says when something is wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from openzaya.ttc import command
from openzaya.ttc.completer import Call, Rollout
from openzaya.ttc.journal import Journal
from openzaya.ttc.options import RSAOptions, settings_of
from tests.command import Finished, error_line, openzaya
from tests.ttc.fake_completer import FakeCompleter, rollout_of

SMALL = ("--n", 4, "--c", 2, "--t", 2, "--beta", 40, "--tau", 10, "--final-budget", 60)
MODEL = ("--model", "fake")


def answering(answer: str) -> Callable[[Call], Rollout]:
    return lambda call: rollout_of("thought " * 20 + answer, answer, call)


def often_right(call: Call) -> Rollout:
    """Right in a third of the first round and in all later ones."""
    is_first = len(str(call.messages[-1]["content"])) < 40
    return answering("42" if not is_first or random.Random(call.seed).random() < 0.33 else "17")(call)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCompleter:
    """The command in an empty directory, on a completer of ours."""
    completer = FakeCompleter(script=answering("42"))

    async def open_completer(options: RSAOptions, stack: AsyncExitStack) -> FakeCompleter:
        return completer

    monkeypatch.setattr(command, "open_completer", open_completer)
    monkeypatch.chdir(tmp_path)
    return completer


def last_object(finished: Finished) -> dict[str, Any]:
    assert finished.code == 0, finished
    return json.loads(finished.out.splitlines()[-1])


def problems(*records: dict[str, Any]) -> Path:
    path = Path("problems.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- one problem ------------------------------------------------------------------------------------


def test_the_answer_alone_is_on_standard_output(fake: FakeCompleter) -> None:
    finished = openzaya("rsa", "What is 17 + 25?", *MODEL, *SMALL)
    assert finished.code == 0 and finished.out == "42\n"
    for said in ("12 rollouts in 3 rounds", "at most 560 new tokens", "round 2/2  4 of 4 done", "votes: 42 (4)"):
        assert said in finished.err
    [journal] = Path("runs/rsa").glob("*.sqlite")
    assert f"journal: {journal}" in finished.err
    assert finished.err.index("at most") < finished.err.index("round 0/2"), "the estimate comes first"


def test_json_is_one_object_on_the_last_line(fake: FakeCompleter) -> None:
    result = last_object(openzaya("rsa", "-", *MODEL, *SMALL, "--json", "--journal", "j", stdin="Wieviel? ü".encode()))
    assert result["answer"]["content"] == "42" and result["answer"]["normalised"] == "42"
    assert [len(one["candidates"]) for one in result["rounds"]] == [4, 4, 4]
    assert result["rounds"][2]["answers"] == {"42": 4} and result["selected"] == [0]
    assert result["tokens"]["completion"] == sum(one["tokens"]["completion"] for one in result["rounds"]) > 0
    assert result["question"]["messages"] == [{"role": "user", "content": "Wieviel? ü"}]
    assert result["num_failures"] == 0
    assert result["journal"] == "j" and result["html"] is None and result["run_key"].startswith("problem-")
    with Journal.open("j", read_only=True) as journal:
        kept = journal.load(result["run_key"])
    assert {key: result[key] for key in kept} == kept
    unkept = last_object(openzaya("rsa", "Wieviel? ü", *MODEL, *SMALL, "--json", "--no-journal"))
    assert unkept.keys() == result.keys() and unkept["question"] == result["question"]


def test_no_journal_leaves_nothing_behind(fake: FakeCompleter) -> None:
    assert openzaya("rsa", "x", *MODEL, *SMALL, "--no-journal").code == 0
    assert list(Path().iterdir()) == []


def test_the_system_message_is_in_every_round(fake: FakeCompleter) -> None:
    assert openzaya("rsa", "x", *MODEL, *SMALL, "--system", "Be brief.", "--no-journal").code == 0
    assert len(fake.calls) == 12
    assert all(call.messages[0] == {"role": "system", "content": "Be brief."} for call in fake.calls)


def test_all_answers_are_numbered(fake: FakeCompleter) -> None:
    finished = openzaya("rsa", "x", *MODEL, *SMALL, "--select", "all", "--no-journal")
    assert finished.out.splitlines()[:3] == ["--- answer 0 ---", "42", "--- answer 1 ---"]


def test_settings_come_from_preset_options_and_assignments() -> None:
    options = RSAOptions(
        problem="x",
        data=None,
        model="m",
        endpoint=None,
        preset="light",
        settings={"n": 3, "sampling.temperature": 0.5},
        assignments=("rsa_k=2", "final_sampling.top_p=0.9", "sampling.top_k=7", "final_n=none", "early_stop=0.9"),
    )
    config, chosen = settings_of(options)
    assert (config.n, config.c, config.t, config.beta, config.final_n) == (3, 2, 2, 8192, None)
    assert config.sampling.model_dump() == {"temperature": 0.5, "top_p": 1.0, "top_k": 7, "min_p": None}
    assert config.final_sampling is not None and config.final_sampling.model_dump() == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": None,
    }
    assert chosen == {"n", "c", "final_n", "early_stop", "sampling", "final_sampling"}


WRONG = [
    (("--preset", "enormous"), "RSA preset 'enormous' is unknown"),
    (("--n", 0), "RSA settings: n"),
    (("--tau", -1), "RSA settings: tau"),
    (("--temperature", "nan"), "sampling.temperature"),
    (("--set", "widht=3"), "RSA has no setting 'widht'"),
    (("--set", "sampling.temp=1"), "sampling.temp"),
    (("--set", "width.x=3"), "'width.x' is no RSA setting"),
    (("--set", "n"), "'n' is not of the form key=value"),
    (("--set", "rsa_n=3", "--n", 4), "both give n"),
    (("--carry", "all"), "carry"),
    (("--select", "verifier"), "needs a right answer"),
    (("--journal", ".", "--resume"), "there is no journal . to resume"),
    (("--journal", "nowhere.sqlite", "--resume"), "there is no journal nowhere.sqlite to resume"),
    (("--html", "."), "--html . cannot be written"),
    (("--html", "/dev/null/x/view.html"), "--html /dev/null/x/view.html cannot be written"),
    (("--max-tokens-total", 5), "the cap of 5 tokens"),
    (("--price-in", "inf"), "price prompt_usd=inf"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(map(str, row[0])) for row in WRONG])
def test_what_is_wrong_is_one_line(fake: FakeCompleter, arguments: tuple[object, ...], message: str) -> None:
    assert message in error_line(openzaya("rsa", "x", *MODEL, *arguments))


def test_questions_that_cannot_be_asked(fake: FakeCompleter) -> None:
    for problem, stdin in (("", b""), ("-", b""), ("-", b"\xff\xfe"), ("bad \udcff", b"")):
        error_line(openzaya("rsa", problem, *MODEL, stdin=stdin))
    assert "problems.jsonl:1: not JSON" in error_line(_with_bad_file())
    assert not Path("runs").exists() and fake.calls == []


def _with_bad_file() -> Finished:
    Path("problems.jsonl").write_text("{\n")
    return openzaya("rsa", "--data", "problems.jsonl", *MODEL)


# --- cost -------------------------------------------------------------------------------------------


def test_prices_make_an_estimate_in_money(fake: FakeCompleter) -> None:
    finished = openzaya("rsa", "x", *MODEL, *SMALL, "--price-out", 1000, "--price-in", 0)
    assert "at most $0.56" in finished.err


def test_the_cap_ends_a_run_with_what_is_there(fake: FakeCompleter) -> None:
    finished = openzaya("rsa", "x", *MODEL, *SMALL, "--max-tokens-total", 200, "--json")
    result = last_object(finished)
    assert "the cap of 200 tokens is reached" in result["stopped_early"] and len(result["rounds"]) < 3
    assert result["tokens"]["completion"] <= 200 and result["answer"]["content"] == "42"


def test_a_run_that_the_cap_ended_goes_on_under_a_higher_one(fake: FakeCompleter) -> None:
    arguments = ("rsa", "x", *MODEL, *SMALL, "--journal", "j", "--json")
    capped = last_object(openzaya(*arguments, "--max-tokens-total", 200))
    fake.calls.clear()
    assert last_object(openzaya(*arguments)) == capped and fake.calls == []
    whole = last_object(openzaya(*arguments, "--resume"))
    assert whole["stopped_early"] is None and len(whole["rounds"]) == 3
    finished = sum(one["status"] == "done" for round_ in capped["rounds"] for one in round_["candidates"])
    assert len(fake.calls) == 12 - finished < 12


@pytest.mark.parametrize(("reply", "goes_on"), [(b"\n", True), (b"y\n", True), (b"n\n", False), (b"", True)])
def test_on_a_terminal_it_asks(fake: FakeCompleter, monkeypatch, reply: bytes, goes_on: bool) -> None:
    monkeypatch.setattr(command, "has_terminal", lambda: True)
    finished = openzaya("rsa", "x", *MODEL, *SMALL, stdin=reply)
    assert "go on? [Y/n]" in finished.err
    assert bool(fake.calls) == goes_on == (finished.code == 0) == Path("runs").exists()
    assert openzaya("rsa", "x", *MODEL, *SMALL, "--yes", stdin=b"n\n").code == 0


# --- the journal ------------------------------------------------------------------------------------


def test_a_finished_run_is_shown_and_not_repeated(fake: FakeCompleter) -> None:
    arguments = ("rsa", "x", *MODEL, *SMALL, "--journal", "j.sqlite", "--json")
    first = last_object(openzaya(*arguments))
    fake.calls.clear()
    for extra in ((), ("--resume",), ("--html", "deep/view.html")):
        again = openzaya(*arguments, *extra)
        assert "nothing is run" in again.err and fake.calls == []
        assert last_object(again) | {"html": None} == first
    assert "thought" in Path("deep/view.html").read_text()


def test_other_settings_are_refused(fake: FakeCompleter) -> None:
    assert openzaya("rsa", "x", *MODEL, *SMALL, "--journal", "j").code == 0
    fake.calls.clear()
    for extra in ((), ("--resume",)):
        line = error_line(openzaya("rsa", "x", *MODEL, *SMALL, "--seed", 9, "--journal", "j", *extra))
        assert "other settings" in line and "seed=9" in line
    assert "add --resume" in error_line(openzaya("rsa", "another", *MODEL, *SMALL, "--journal", "j"))
    assert fake.calls == []
    assert openzaya("rsa", "another", *MODEL, *SMALL, "--journal", "j", "--resume").code == 0
    assert len(fake.calls) == 12, "a journal holds many runs"


def test_a_run_that_failed_goes_on_with_what_is_left(fake: FakeCompleter) -> None:
    arguments = ("rsa", "x", *MODEL, *SMALL, "--journal", "j", "--set", "max_refills=0")
    fake.fails = lambda call: len(fake.calls) > 4
    assert "all 4 rollouts of round 1 failed" in error_line(openzaya(*arguments))
    assert "1 unfinished; add --resume" in error_line(openzaya(*arguments))
    fake.calls.clear()
    fake.fails = lambda call: False
    finished = openzaya(*arguments, "--resume", "--json")
    result = last_object(finished)
    assert len(fake.calls) == 8 and all(one["is_resumed"] for one in result["rounds"][0]["candidates"])
    plain = last_object(openzaya("rsa", "x", *MODEL, *SMALL, "--set", "max_refills=0", "--no-journal", "--json"))
    assert [one["answers"] for one in result["rounds"]] == [one["answers"] for one in plain["rounds"]]


# --- many problems ----------------------------------------------------------------------------------


def test_many_problems_have_a_table_at_the_end(fake: FakeCompleter) -> None:
    fake.script = often_right
    data = problems(*({"question": f"What is {i}?", "answer": 42, "id": f"p{i}"} for i in range(6)), {"prompt": "?"})
    finished = openzaya("rsa", "--data", data, *MODEL, *SMALL, "--n", 12, "--journal", "j")
    assert finished.code == 0 and "[7/7]" in finished.err
    assert "mean of the final round       100.0%  [100.0%, 100.0%]" in finished.out
    assert "over 6 problems with a verdict" in finished.out and "7 problems, 0 failed" in finished.out
    fake.calls.clear()
    result = last_object(openzaya("rsa", "--data", data, *MODEL, *SMALL, "--n", 12, "--journal", "j", "--json"))
    assert fake.calls == []
    figures = result["summary"]["figures"]
    assert figures["score"][0] == 1.0 and 0.1 < figures["single"][0] < 0.6
    assert figures["gain"][0] == pytest.approx(1 - figures["single"][0])
    assert [one["id"] for one in result["problems"]] == [*(f"p{i}" for i in range(6)), "line-7"]
    assert result["problems"][0]["score"] == 1.0 and result["problems"][6]["score"] is None
    assert result["problems"][0]["expected"] == "42" and len(result["problems"][0]["rounds"]) == 3


def test_one_limit_holds_for_all_problems(fake: FakeCompleter) -> None:
    fake.delay = lambda call: 0.001
    data = problems(*({"question": f"{i}?"} for i in range(5)))
    assert openzaya("rsa", "--data", data, *MODEL, *SMALL, "--no-journal", "--concurrency", 7).code == 0
    assert fake.most_running == 7, "the limit is used, and over more than one problem"


def test_a_problem_that_fails_does_not_stop_the_others(fake: FakeCompleter) -> None:
    fake.fails = lambda call: "bad" in str(call.messages)
    data = problems({"question": "good", "answer": 42}, {"question": "bad"}, {"question": "fine"})
    arguments = ("rsa", "--data", data, *MODEL, *SMALL, "--journal", "j", "--html", "v.html")
    finished = openzaya(*arguments)
    assert "1 of 3 problems have no result; go on with: --journal j --resume" in error_line(finished)
    assert "failed: line-2: all 4 rollouts of round 0 failed" in finished.out and "3 problems, 1 failed" in finished.out
    assert "good" in Path("v.html").read_text()
    fake.calls.clear()
    fake.fails = lambda call: False
    again = openzaya(*arguments, "--resume", "--json")
    assert "2 of 3 problems are finished in the journal" in again.err
    assert last_object(again)["summary"]["num_failed"] == 0 and len(fake.calls) == 12


def test_verdicts_need_an_answer_that_is_there(fake: FakeCompleter) -> None:
    """A rollout that was cut off while it reasoned is wrong, and does not lack a verdict."""
    fake.script = lambda call: rollout_of("42 " * 100, "", call, is_closed=False)
    data = problems({"question": "a", "answer": 42})
    result = last_object(openzaya("rsa", "--data", data, *MODEL, *SMALL, "--no-journal", "--json"))
    assert result["summary"]["figures"]["single"] == result["summary"]["figures"]["score"] == [0.0, 0.0, 0.0]
    assert result["summary"]["truncation_rate"]["round_0"] == 1.0
