"""A stage of RL that a tiny model with random weights learns within seconds, in this process or one of its own.

Rewarded is text with many characters of even code: a third of the random text has them at first. Nothing but this
file is needed in a rollout process: the specification of the environment is pickled by its name here.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openzaya.config import Resolved
from openzaya.environments.base import Environment, Task
from openzaya.environments.registry import ProblemsSpec
from openzaya.problems.base import Verdict
from openzaya.rl.recipe import RLConfig

ROOT = Path(__file__).resolve().parents[2]


class LettersEnvironment(Environment):
    """Write characters of even code."""

    name = "letters"

    def __init__(self, trouble: str = "") -> None:
        self._trouble = trouble

    def task(self, difficulty: int, number: int) -> Task:
        return Task(self.name, difficulty, number, [{"role": "user", "content": f"{number % 7}"}], None)

    def verify(self, task: Task, response: str) -> Verdict:
        if self._trouble == "exit":
            os._exit(7)
        if self._trouble in ("slow", "very slow"):
            time.sleep(0.05 if self._trouble == "slow" else 0.8)
        even = sum(ord(letter) % 2 == 0 for letter in response)
        return Verdict(float(even >= 0.55 * len(response) > 0), "")


class LettersSpec(ProblemsSpec):
    """Passes wherever the built-in families do."""

    trouble: str = ""

    def make(self) -> list[Environment]:
        if self.trouble == "never":
            raise RuntimeError("planted: no environment")
        return [LettersEnvironment(self.trouble)]


@functools.cache
def tokenizer() -> Any:
    from openzaya.data.tokenizer import train_tokenizer

    return train_tokenizer(["abc def ghi jkl mno pqr stu vwx yz 0123456789"] * 4, 300)


def make_model(seed: int = 0) -> Any:
    from openzaya.model.config import preset
    from openzaya.model.transformer import Zaya

    tokens = tokenizer()
    changes = {"vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id, "max_position_embeddings": 64}
    return Zaya(preset("smoke").with_changes(**changes), seed=seed)


def make_start(stages: Path) -> None:
    """The stage that the run goes on from."""
    from openzaya.model import hf

    if not (stages / "00-start").exists():
        hf.save(make_model(), stages / "00-start/model", layout="openzaya", tokenizer=tokenizer())


def make_config(trouble: str = "", **values: Any) -> RLConfig:
    base = {
        "model": {"start_from": "00-start"},
        "steps": 6,
        "prompts_per_step": 4,
        "sources": [{"name": "letters", "environments": [LettersSpec(trouble=trouble)], "difficulties": (0, 1)}],
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "algorithm": {"max_draws": 8},
        "optimizer": {"muon_learning_rate": 1e-2, "adamw_learning_rate": 3e-3, "momentum": 0, "warmup_steps": 1},
        "window_tokens": 48,
        "windows_per_batch": 32,
        "checkpoint_every": 2,
        "samples_every": 100,
        "threads": 1,
    }
    return RLConfig(**(base | values))


def run(directory: Path, **values: Any) -> None:
    """Train in this process."""
    from openzaya.rl.loop import train_rl

    make_start(directory.parent)
    train_rl(Resolved(make_config(**values), directory / "recipe.toml", {}), directory)


def main() -> None:
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))


@contextmanager
def learner(directory: Path, **values: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Train in a process of its own; what it prints goes to ``directory.log``."""
    make_start(directory.parent)
    code = "from tests.rl.letters import main; main()"
    with directory.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(directory), json.dumps(values)], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines(directory: Path) -> list[dict[str, Any]]:
    """``groups.jsonl``, without a last line that is being written."""
    from openzaya.rl.samples import read_lines

    return read_lines(directory / "groups.jsonl")


def last_step(directory: Path) -> int:
    return max((entry["step"] for entry in lines(directory)), default=0)


def trained(directory: Path) -> list[int]:
    """Numbers of the groups that were trained on, in order."""
    return [group["number"] for entry in lines(directory) for group in entry["groups"] if group["trained"]]


def same_course(directory: Path) -> tuple[list[Any], bytes]:
    """What two runs that went the same way have in common, to the last bit."""
    groups = [[{**group, "seconds": 0} for group in entry["groups"]] for entry in lines(directory)]
    return groups, (directory / "model/model.safetensors").read_bytes()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 280) -> bool:
    """True as soon as ``condition`` holds, False if the process ended before."""
    until = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)
    return True


def children(process_id: int) -> list[int]:
    """Rollout processes of a learner."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process_id and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def is_alive(process_id: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> int:
    """Ask it to end as Ctrl-C does."""
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=240)
