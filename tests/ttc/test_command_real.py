"""``openzaya rsa`` as a process on an endpoint, interrupted and resumed; and on a model in this process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from openzaya.ttc.journal import Journal
from tests.command import openzaya
from tests.train import miniature
from tests.ttc.scripted_endpoint import serving

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-123456"
SMALL = ("--n", "4", "--c", "2", "--t", "3", "--beta", "60", "--tau", "10", "--final-budget", "80")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(latency_s=0.4, api_key=KEY) as address:
        yield address


def start(folder: Path, url: str, *arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "openzaya.cli", "rsa", "Why?", "--endpoint", url, *SMALL, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def num_generations(url: str) -> int:
    request = urllib.request.Request(f"{url}/requests", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return sum("chat" in str(record.get("path")) for record in json.load(reply))


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(url: str, tmp_path: Path) -> None:
    process = start(tmp_path, url, "--html", "view.html")
    assert process.stderr is not None
    said = ""
    while "round 0/3" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    [line] = [line for line in err.splitlines() if line.startswith("interrupted")]
    [journal] = re.findall(r"--journal (\S+) --resume", line)
    with Journal.open(tmp_path / journal, read_only=True) as kept:
        [run] = kept.runs()
    assert 4 <= run.num_done < 16 and not run.is_finished
    assert "unfinished" in (tmp_path / "view.html").read_text()

    before = num_generations(url)
    process = start(tmp_path, url, "--journal", journal, "--resume", "--json", "--html", "view.html")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    resumed = sum(one["is_resumed"] for round_ in result["rounds"] for one in round_["candidates"])
    assert resumed == run.num_done
    probes = int(re.findall(r"probing took (\d+) requests", err)[0])
    made = sum(
        one["rollout"]["num_calls"]
        for round_ in result["rounds"]
        for one in round_["candidates"]
        if not one["is_resumed"]
    )
    assert made > 0 and 0 < num_generations(url) - before <= made + probes, (
        "nothing that was finished is asked for again"
    )
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in out + err + said


def test_a_key_that_is_refused(url: str, tmp_path: Path) -> None:
    process = start(tmp_path, url, "--api-key", "wrong-key-987")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "401" in line and "wrong-key-987" not in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == [], "nothing is begun"


def test_a_model_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = miniature.write_babbling_model(tmp_path / "model")
    arguments = ("rsa", "Add: 1+2", "--model", model, *SMALL, "--json")
    finished = openzaya(*arguments, "--journal", "j")
    assert finished.code == 0, finished.err
    assert "short aggregation prompts" in finished.err and "model: model (engine)" in finished.err
    result = json.loads(finished.out.splitlines()[-1])
    assert result["config"]["prompt_style"] == "short" and result["capabilities"]["token_counting"] == "tokenizer"
    assert [len(round_["candidates"]) for round_ in result["rounds"]] == [4, 4, 4, 4]
    assert all(one["tail"]["num_tokens"] <= 10 for one in result["rounds"][0]["candidates"])
    again = openzaya(*arguments, "--no-journal")
    other = json.loads(again.out.splitlines()[-1])
    texts = [
        [[one["rollout"]["content"] for one in round_["candidates"]] for round_ in run["rounds"]]
        for run in (result, other)
    ]
    assert texts[0] == texts[1], "the same seed, the same run"
    default = openzaya(
        "rsa", "Add: 1+2", "--model", model, "--n", 1, "--t", 1, "--no-journal", "--max-tokens-total", 2000
    )
    assert default.code == 0 and "budgets are scaled to the model's context of 1,024 tokens" in default.err
