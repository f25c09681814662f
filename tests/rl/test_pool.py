"""Judging: each rollout by its own source's environment, and nothing that goes wrong there ends a run."""

from __future__ import annotations

import pytest

from openzaya.environments.base import Environment, Task
from openzaya.environments.registry import ProblemsSpec
from openzaya.infer.outputs import Completion
from openzaya.problems import Verdict
from openzaya.rl.pool import GroupJudge
from openzaya.rl.rollout import Order, RolloutConfig, VersionLog
from openzaya.rl.worker import WorkerSetup, make_engine
from tests.rl.letters import ROOT, make_model, tokenizer


class Says(Environment):
    """Right is one word; some text breaks it."""

    name = "says"

    def __init__(self, word: str) -> None:
        self._word = word

    def task(self, difficulty: int, number: int) -> Task:
        return Task(self.name, difficulty, number, [{"role": "user", "content": "?"}], None)

    def verify(self, task: Task, response: str) -> Verdict:
        if response == "!":
            raise RuntimeError("planted")
        return Verdict(float(response == self._word), "")


def completion(text: str) -> Completion:
    return Completion(0, [], text, "stop")


@pytest.mark.parametrize(("source", "wanted"), [("first", [1.0, 0.0, None]), ("second", [0.0, 1.0, None])])
def test_environments_of_one_name_judge_their_own_sources(source, wanted):
    judge = GroupJudge({"first": {"says": Says("yes")}, "second": {"says": Says("no")}}, None, RolloutConfig())
    order = Order(0, source, "plain", Says("").task(0, 0), 3, 0)
    log = VersionLog()
    log.add(0, 0)
    rollouts = judge(order, [completion(text) for text in ("yes", "no", "!")], [log] * 3)
    assert [rollout.verdict for rollout in rollouts] == wanted


def test_a_rollout_process_takes_sources_that_share_a_family():
    model = make_model()
    specs = {name: [ProblemsSpec(families=["sorting"], seed=seed)] for seed, name in enumerate(("plain", "ttc"))}
    setup = WorkerSetup(model.config, tokenizer(), specs, RolloutConfig(), behaviour=None, stages=ROOT, threads=1)
    make_engine(setup, 0, model.state_dict()).close()
