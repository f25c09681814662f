"""``openzaya serve`` as a process: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from openzaya.infer.engine import Engine
from openzaya.infer.sampling import SamplingParams
from openzaya.serve.prepare import prepare
from tests.command import error_line, openzaya
from tests.serve.conftest import wait_until
from tests.train import miniature

BODY = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return miniature.write_babbling_model(tmp_path_factory.mktemp("checkpoint") / "little")


RSA = {"n": 4, "c": 2, "t": 1, "beta": 12, "tau": 6, "final_budget": 20, "answer_budget": 8}


class Process:
    """A server as its operator starts it."""

    def __init__(self, *arguments: object):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "openzaya.cli", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Without kernels there is nothing to compile: the twin is fast enough for so small a model.
            env=os.environ | {"OPENZAYA_KERNELS": "0"},
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        match = re.fullmatch(r"serving (\S+) at (http://\S+)\n", line)
        assert match, (line, self.errors)
        self.name, self.url = match.groups()
        wait_until(self._is_ready, 20)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(self.url + "/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait(self) -> int:
        code = self.process.wait(20)
        self._reader.join(5)
        return code


@pytest.fixture
def begin():
    begun = []

    def start(*arguments, **settings):
        begun.append(Process(*arguments, **settings))
        return begun[-1]

    yield start
    for process in begun:
        process.process.kill()


def test_running_requests_finish_after_the_signal(begin, checkpoint):
    process = begin(checkpoint)
    assert process.name == "little"
    with httpx.stream("POST", process.url + "/v1/chat/completions", json=BODY | {"max_tokens": 400}) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert process.wait() == 0
    text = "".join(process.errors)
    assert "memory" in text and "fits" in text, "the plan comes first"
    records = [json.loads(line) for line in process.errors if line.startswith("{")]
    assert any(record.get("completion_tokens") == 400 for record in records)
    assert "Traceback" not in text


def test_the_drain_has_a_limit_and_a_second_signal_ends_it(begin, checkpoint):
    process = begin(checkpoint, "--drain-timeout", "0.3")
    endless = BODY | {"max_tokens": 100_000, "n": 16}
    with httpx.stream("POST", process.url + "/v1/chat/completions", json=endless) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    # Sixteen texts of a thousand tokens may or may not be written in 0.3 s; either way the stream ends in order.
    assert rest[-1] == "data: [DONE]" and process.wait() == 0
    process = begin(checkpoint)
    with httpx.stream("POST", process.url + "/v1/chat/completions", json=endless) as stream:
        next(stream.iter_lines())
        process.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any(line.startswith("stopping") for line in process.errors))
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() in (0, 128 + signal.SIGTERM)


def test_a_quantised_copy_is_made_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENZAYA_CACHE", str(tmp_path))
    made = []
    copy = prepare(str(checkpoint), "int8", lambda done, total, seconds: made.append(done))
    assert copy.parent == tmp_path / "models" and "int8" in copy.name and made
    with Engine(copy, backend="torch", max_running=2) as engine:
        assert engine.tokenizer is not None
        assert engine.generate(["Hello"], SamplingParams(max_new_tokens=4))[0].completions[0].tokens
    made.clear()
    left = copy.parent / f".{copy.name}.writing-0"
    left.mkdir()
    shutil.rmtree(copy)
    assert prepare(str(checkpoint), "int8", lambda *_: made.append(1)) == copy and made
    assert not left.exists(), "what a killed process left behind is removed"
    made.clear()
    assert prepare(str(checkpoint), "int8", lambda *_: made.append(1)) == copy and not made
    assert prepare(str(checkpoint), None) == checkpoint
    assert prepare(str(checkpoint), "int4") != copy


def test_what_is_refused(checkpoint, tmp_path):
    assert "no API key" in error_line(openzaya("serve", checkpoint, "--host", "0.0.0.0", "--port", 0))
    assert "empty" in error_line(openzaya("serve", checkpoint, "--api-key", " ", "--port", 0))
    assert "effort" in error_line(openzaya("serve", checkpoint, "--effort", "most", "--port", 0))
    assert "cache_dtype" in error_line(openzaya("serve", checkpoint, "--cache-dtype", "int3", "--port", 0))
    assert "tokens" in error_line(openzaya("serve", checkpoint, "--context", "much", "--port", 0))
    assert "at least 2" in error_line(openzaya("serve", checkpoint, "--context", "1", "--port", 0))
    assert "finite" in error_line(openzaya("serve", checkpoint, "--cache-gb", "inf", "--port", 0))
    assert "no address" in error_line(openzaya("serve", checkpoint, "--host", "no.such.host.invalid", "--insecure"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "--port" in error_line(openzaya("serve", checkpoint, "--port", port))
    error_line(openzaya("serve", tmp_path / "nothing", "--port", 0))
    assert openzaya("serve").code == 2 and openzaya("serve", checkpoint, "--port", 70000).code == 2


def rsa_answer(url: str, **more):
    body = {"messages": [{"role": "user", "content": "Add: 24+52"}], "seed": 3, "rsa": RSA} | more
    response = httpx.post(url + "/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_rsa_on_a_server_and_through_a_proxy(begin, checkpoint, tmp_path):
    server = begin(checkpoint, "--effort-rsa", "--rsa-beta", 12, "--rsa-tau", 4, "--rsa-set", "final_budget=16")
    whole = rsa_answer(server.url)
    assert [one["done"] for one in whole["rsa"]["rounds"]] == [4, 4] and whole["model"] == "little"
    low = rsa_answer(server.url, rsa=None, reasoning_effort="low")["rsa"]["config"]
    assert (low["n"], low["t"], low["beta"], low["tau"], low["final_budget"]) == (4, 1, 12, 4, 16)
    journal = tmp_path / "runs.sqlite"
    proxy = begin("--proxy", server.url, "--rsa-journal", journal, "--upstream-key", "sk-0123456789")
    assert proxy.name == "upstream"
    first = rsa_answer(proxy.url)
    assert first["model"] == "little"
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    text = "".join(proxy.errors)
    assert "Traceback" not in text and "sk-0123456789" not in text and b"sk-0123456789" not in journal.read_bytes()
    again = rsa_answer(begin("--proxy", server.url, "--rsa-journal", journal).url)
    assert [one["resumed"] for one in again["rsa"]["rounds"]] == [4, 4] and again["choices"] == first["choices"]
    taken = error_line(openzaya("serve", "--proxy", server.url, "--port", 0, "--rsa-journal", journal))
    assert "journal" in taken or "use" in taken


@pytest.mark.skipif("OPENZAYA_NANO" not in os.environ, reason="OPENZAYA_NANO names no checkpoint of the nano model")
def test_the_nano_model_aggregates(begin):
    server = begin(os.environ["OPENZAYA_NANO"])
    wanted = {"n": 8, "c": 3, "t": 2, "beta": 160, "tau": 48, "final_budget": 200, "answer_budget": 40}
    answer = rsa_answer(server.url, rsa=wanted)
    assert [one["done"] for one in answer["rsa"]["rounds"]] == [8, 8, 8]
    assert "76" in answer["choices"][0]["message"]["content"]
