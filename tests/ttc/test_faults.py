"""A run whose endpoint fails and hangs, and whose process is killed again and again, ends as the undisturbed run.

A fifth of the endpoint's attempts fails in one of five ways, a twentieth never answers. The process is killed with
SIGKILL after a number of finished rollouts that is drawn at random, resumed, and killed again.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from openzaya.errors import RSAError
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.endpoint import EndpointCompleter
from openzaya.ttc.journal import Journal
from openzaya.ttc.rsa import markovian_rsa
from tests.ttc.rsa_process import QUESTION
from tests.ttc.scripted_endpoint import ScriptedEndpoint, serving
from tests.ttc.scripted_model import Script

ROOT = Path(__file__).parent.parent.parent
SMALL = {"n": 6, "c": 3, "t": 2, "beta": 48, "tau": 24, "final_budget": 96, "answer_budget": 48, "seed": 3}
FAULTS: dict[str, Any] = {"fail": 0.2, "hang": 0.05, "reasoning_tokens": 50, "latency_s": 0.02}


def start(url: str, path: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.ttc.rsa_process", url, str(path), json.dumps(settings)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def done_seeds(path: Path) -> list[int]:
    """Seeds of the rollouts that stand in the journal; each (round, slot, attempt) has its own."""
    try:
        with Journal.open(path, read_only=True) as journal:
            rounds = journal.load("run")["rounds"]
    except RSAError:  # nothing has begun
        return []
    return [one["seed"] for each in rounds for one in each["candidates"] if one["status"] == "done"]


def requests_by_seed(url: str) -> Counter[int]:
    return Counter(one["body"].get("seed") for one in httpx.get(url + "/requests", timeout=60).json())


def essence(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on faults: all but times, retries, and what they cost."""
    rounds = [
        [
            (
                one["slot"],
                one["parents"],
                one["status"],
                one["seed"],
                one["rollout"]["reasoning"],
                one["rollout"]["content"],
                one["rollout"]["finish_reason"],
                one["tail"],
                one["answer"],
            )
            for one in each["candidates"]
        ]
        for each in result["rounds"]
    ]
    return {"rounds": rounds, "selected": result["selected"], "answer": result["answer"]}


def run_undisturbed(settings: dict[str, Any]) -> dict[str, Any]:
    endpoint = ScriptedEndpoint(Script(reasoning_tokens=FAULTS["reasoning_tokens"]))
    completer = EndpointCompleter("http://scripted", client=endpoint.client(), concurrency=8)
    result = asyncio.run(markovian_rsa(QUESTION, completer, RSAConfig(**settings)))
    values: dict[str, Any] = json.loads(json.dumps(result.to_dict()))
    return values


def check_kills(directory: Path, settings: dict[str, Any], num_kills: int) -> None:
    """Kills after numbers of finished rollouts that are drawn from all of the run, then lets the run end."""
    rng = random.Random(num_kills)
    points = sorted(rng.choices(range(RSAConfig(**settings).num_rollouts), k=num_kills))
    path, asked_at_kill = directory / "killed.sqlite", {}
    with serving(**FAULTS) as url:
        for point in points:
            process = start(url, path, settings)
            while len(done_seeds(path)) < point and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.05)
            process.kill()
            process.communicate()
            asked = requests_by_seed(url)
            for seed in done_seeds(path):
                asked_at_kill.setdefault(seed, asked[seed])
        resumed = finish(start(url, path, settings))
        asked = requests_by_seed(url)
        stats = httpx.get(url + "/stats").json()
    assert essence(resumed) == essence(run_undisturbed(settings))
    repeated = {seed: asked[seed] - before for seed, before in asked_at_kill.items() if asked[seed] != before}
    assert not repeated, "a rollout that was finished was asked for again"
    assert len(asked_at_kill) >= max(points)
    assert stats["failed"] and stats["hung"], "the faults were there"
    assert sum(one["is_resumed"] for each in resumed["rounds"] for one in each["candidates"]) >= max(points)


def test_a_killed_run_is_resumed_without_repeating_anything(tmp_path):
    check_kills(tmp_path, SMALL, num_kills=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"n": 16, "c": 4},
        {"asynchronous": True},
        {"c": 1, "continuation": "prefill", "kept_head": 8, "t": 3},
        {"carry": "both", "select": "aggregate"},
        {"widths": (8, 3, 1), "c": 8, "carry": "answer_or_reasoning"},
    ],
    ids=["default", "asynchronous", "delethink", "aggregate", "hybrid"],
)
def test_twenty_kills(tmp_path, changes):
    check_kills(tmp_path, SMALL | changes, num_kills=20)
