"""What a person sees while a run goes on, with a clock of its own."""

from __future__ import annotations

import io

import pytest

from openzaya.ttc.completer import Rollout, Usage
from openzaya.ttc.config import make_config
from openzaya.ttc.display import RSADisplay, leading_answers, one_line
from openzaya.ttc.results import Candidate, Event, Round

CONFIG = make_config("default", {"n": 4, "t": 1, "beta": 100, "tau": 10, "final_budget": 100})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ended(index: int, slot: int, answer: str | None = "42", tokens: int = 50, resumed: bool = False) -> Event:
    rollout = Rollout("", "", True, "stop", Usage(completion=tokens))
    candidate = Candidate(index, slot, (), "done", 0, rollout, answer=answer, is_resumed=resumed)
    return Event("candidate", index, slot, candidate=candidate)


def failed(index: int, slot: int) -> Event:
    return Event("candidate", index, slot, candidate=Candidate(index, slot, (), "failed", 0, error="x"))


def round_end(index: int) -> Event:
    return Event("round", index, round=Round(index, (), False, 2.0))


def test_plain_lines_say_where_a_run_is() -> None:
    clock, stream = Clock(), io.StringIO()
    with RSADisplay(["only"], CONFIG, stream=stream, clock=clock) as display:
        listen = display.listener("only")
        listen(Event("started"))
        for slot in range(4):
            listen(Event("launched", 0, slot))
        clock.now = 1.0
        listen(ended(0, 0))
        assert stream.getvalue() == "", "nothing is due yet"
        clock.now = 10.0
        listen(ended(0, 1, "17"))
        first = stream.getvalue()
        assert first.startswith("round 0/1  2 of 4 done, 2 under way  100 tokens  10 tokens/s  ETA 0:30  0:10 gone")
        assert first.rstrip().endswith("42 (1), 17 (1)")
        listen(failed(0, 2))
        listen(ended(0, 3))
        listen(round_end(0))
        last = stream.getvalue().splitlines()[-1]
        assert "3 of 4 done, 1 failed" in last and "42 (2), 17 (1)" in last
        assert "ETA 0:10" in last, "four rollouts of round 1 are left, four took 10 s"
        display.ended("only", "42\nmore")
    assert stream.getvalue().splitlines()[-1].startswith("42 more  15 tokens/s  0:10 gone")


def test_resumed_rollouts_count_as_done_and_not_as_speed() -> None:
    clock, stream = Clock(), io.StringIO()
    with RSADisplay(["only"], CONFIG, stream=stream, clock=clock) as display:
        listen = display.listener("only")
        for slot in range(4):
            listen(ended(0, slot, resumed=True))
        clock.now = 2.0
        listen(round_end(0))
        assert "4 of 4 done  200 tokens  0:02 gone" in stream.getvalue()


def test_many_problems_are_named_and_counted() -> None:
    stream = io.StringIO()
    with RSADisplay(["a", "b"], CONFIG, stream=stream, clock=Clock()) as display:
        display.listener("a")(ended(0, 0))
        display.ended("a", "failed: no answer")
        display.ended("b", "42")
    assert stream.getvalue().splitlines()[0].startswith("[1/2] a: failed: no answer")
    assert stream.getvalue().splitlines()[1].startswith("[2/2] b: 42")


@pytest.mark.parametrize("names", [["only"], [f"p{i}" for i in range(40)]], ids=["one", "many"])
def test_a_terminal_gets_a_table_and_no_markup_of_the_model(names: list[str]) -> None:
    stream = Terminal()
    with RSADisplay(names, CONFIG, stream=stream, clock=Clock()) as display:
        for name in names:
            listen = display.listener(name)
            listen(Event("launched", 0, 1))
            listen(ended(0, 0, "[red]\x1b]0;taken\x07[/nonsense]"))
    shown = stream.getvalue()
    assert "[red]" in shown and "leading answers" in shown and "1/4" in shown
    assert "\x1b]0;" not in shown and "\x07" not in shown


def test_text_for_one_line() -> None:
    assert one_line("a\n\tb\x1b[31m\u202ec  d", 40) == "a b [31m c d"
    assert one_line("x" * 1_000_000, 5) == "xxxx…"
    assert leading_answers({"a": 1, "b": 5, "c": 2, "d": 2, "e": 1}) == "b (5), c (2), d (2), a (1), …"
    assert leading_answers({}) == ""


def test_strange_events_do_no_harm() -> None:
    stream = io.StringIO()
    with RSADisplay(["only"], CONFIG, stream=stream, clock=Clock()) as display:
        listen = display.listener("only")
        for event in (Event("started"), Event("selected"), Event("candidate", 99, 3), Event("round", 0)):
            listen(event)
    assert stream.getvalue() == ""
