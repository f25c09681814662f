"""Rollouts from servers: ours behind a real port, and one that answers in SGLang's form from our engine.

No real SGLang takes part: what it is asked and how it answers is written down here, as its documentation has it.
"""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest

from openzaya.errors import ConfigError, TrainingError
from openzaya.infer.engine import Engine
from openzaya.infer.sampling import SamplingParams
from openzaya.model import hf
from openzaya.rl.adapters import remote, servers
from openzaya.rl.adapters.remote import RemotePool
from openzaya.rl.pool import LocalPool, RolloutEngine
from openzaya.rl.rollout import Order, RolloutConfig
from openzaya.serve.settings import ServerSettings
from tests.rl.letters import LettersEnvironment, make_model, run, tokenizer, trained
from tests.rl.test_processes import assert_same, collect_all
from tests.serve.conftest import LiveServer

WITH_EXPERTS = RolloutConfig(group_size=4, max_new_tokens=48, max_running=8)
WITHOUT = WITH_EXPERTS.model_copy(update={"replay_experts": False})


def make_orders(num):
    environment = LettersEnvironment()
    return [Order(number, "a", "plain", environment.task(0, number), 4, 100 * number) for number in range(num)]


def local_groups(config, num=8, scale=1.0, step=0):
    model = make_model()
    engine = RolloutEngine(model, tokenizer(), {"a": {"letters": LettersEnvironment()}}, config, step=step)
    engine.update_weights(step, {name: tensor * scale for name, tensor in model.state_dict().items()})
    pool = LocalPool(engine)
    pool.submit(make_orders(num))
    groups = {group.order.number: group for group in pool.collect()}
    pool.close()
    return groups


def make_pool(urls, directory, config=WITHOUT, **settings):
    model = make_model()
    environments = {"a": {"letters": LettersEnvironment()}}
    settings = {"step": 0, "weights": model.state_dict(), "directory": directory} | settings
    return RemotePool(urls, model.config, tokenizer(), environments, config, **settings)


# --- our own server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours():
    with Engine(make_model(), tokenizer(), max_running=8) as engine:
        server = LiveServer(engine, ServerSettings())
        yield server.url
        server.close()


def test_our_server_gives_the_very_same_groups_with_experts(ours, tmp_path):
    pool = make_pool([ours, ours + "/v1"], tmp_path, WITH_EXPERTS, fixed_weights=True)
    pool.submit(make_orders(8))
    groups = collect_all(pool, 8)
    assert pool.outstanding() == [] and pool.collect() == []
    pool.close()
    expected = local_groups(WITH_EXPERTS)
    assert_same(groups, expected)
    # Some end by themselves: that token is there, with its log probability.
    endings = {rollout.is_truncated for group in groups.values() for rollout in group.rollouts}
    assert endings == {True, False}


def test_run_with_fixed_weights(ours, tmp_path):
    pipeline = {"pool": "remote", "endpoints": [ours], "max_staleness": 2, "publish_every": 1}
    run(tmp_path / "01-rl", steps=2, pipeline=pipeline, max_engine_trainer_kl=1.0)
    assert len(trained(tmp_path / "01-rl")) == 8


def test_what_a_server_cannot_do_is_refused_at_the_beginning(ours, tmp_path):
    with pytest.raises(ConfigError, match="takes no weights while it runs"):
        make_pool([ours], tmp_path)
    with pytest.raises(ConfigError, match="endpoints is empty"):
        make_pool([], tmp_path)
    with pytest.raises(TrainingError, match=r"no rollout server answers at http://127\.0\.0\.1:1 "):
        make_pool(["http://127.0.0.1:1"], tmp_path)
    with pytest.raises(ConfigError, match="is no URL"):
        make_pool(["nonsense"], tmp_path)
    with pytest.raises(ConfigError, match="neither SGLang nor a server of completions"):
        make_pool([ours + "/nothing"], tmp_path)


def test_end_token_is_told_to_those_who_ask_for_logprobs(ours):
    body = {"prompt": [5, 6], "max_tokens": 40, "top_p": 1, "seed": 0, "n": 16, "return_token_ids": True}
    plain = httpx.post(f"{ours}/v1/completions", json=body, timeout=60).json()["choices"]
    asked = httpx.post(f"{ours}/v1/completions", json=body | {"logprobs": 0}, timeout=60).json()["choices"]
    assert all("end_token" not in choice for choice in plain)
    ended = [choice for choice in asked if choice["finish_reason"] == "stop"]
    assert ended and all(choice["end_token"]["id"] == tokenizer().eos_token_id for choice in ended)
    assert all(choice["end_token"]["logprob"] < 0 for choice in ended)
    assert all("end_token" not in choice for choice in asked if choice["finish_reason"] == "length")


# --- a server in SGLang's form ------------------------------------------------------------------------


class ScriptedSGLang:
    """/get_model_info, /generate and /update_weights_from_disk.

    ``trouble`` and ``load_trouble`` hold status codes to answer with first; while ``gate`` is closed nothing is
    generated.
    """

    def __init__(self):
        self.engine = Engine(make_model(), tokenizer(), max_running=8)
        self.version, self.trouble, self.load_trouble, self.loaded, self.asked = "default", [], [], [], []
        self.keeps_end = True
        self.gate = threading.Event()
        self.gate.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                self.answer(200 if self.path == "/get_model_info" else 404, {"model_path": "x"})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(self.path)
                if self.path == "/generate":
                    outer.gate.wait(60)
                trouble = outer.trouble if self.path == "/generate" else outer.load_trouble
                if trouble:
                    self.answer(trouble.pop(), {"error": {"message": "planted"}})
                elif self.path == "/generate":
                    self.answer(200, outer.generate(body))
                else:
                    self.answer(200, outer.load(body))

            def answer(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def generate(self, body):
        assert body["return_logprob"] is True
        replies = []
        for prompt, asked in zip(body["input_ids"], body["sampling_params"], strict=True):
            params = SamplingParams(
                temperature=asked["temperature"],
                top_p=asked["top_p"],
                max_new_tokens=asked["max_new_tokens"],
                seed=asked["sampling_seed"],
                logprobs=0,
            )
            found = self.engine.generate([prompt], params)[0].completions[0]
            chosen = [*found.logprobs, *([found.end_token] if found.end_token and self.keeps_end else [])]
            meta = {
                "finish_reason": {"type": found.finish_reason},
                "output_token_logprobs": [[one.logprob, one.token, None] for one in chosen],
                "weight_version": self.version,
            }
            replies.append({"text": found.text, "meta_info": meta})
        return replies

    def load(self, body):
        self.engine.update_weights(hf.load(body["model_path"]).state_dict())
        self.version = body["weight_version"]
        self.loaded.append(body["model_path"])
        return {"success": True, "message": "loaded"}

    def start_anew(self):
        """As after a crash: with the weights that it was launched with."""
        self.engine.update_weights(make_model(seed=1).state_dict())
        self.version = "default"

    def close(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.engine.close()


@pytest.fixture
def sglang():
    server = ScriptedSGLang()
    yield server
    server.close()


def test_sglang_form_with_weights_and_trouble(sglang, tmp_path):
    pool = make_pool([sglang.url], tmp_path / "published", retry_limit_s=60)
    sglang.trouble = [503, 429, 500]
    pool.submit(make_orders(8))
    assert_same(collect_all(pool, 8), local_groups(WITHOUT))
    assert pool.metrics() == {"rollout/retries": 3}
    for step in (2, 4):
        pool.publish(step, {name: tensor * 1.01 for name, tensor in make_model().state_dict().items()})
    pool.submit(make_orders(8))
    assert_same(collect_all(pool, 8), local_groups(WITHOUT, scale=1.01, step=4))
    pool.close()
    assert [path.rpartition("-")[2] for path in sglang.loaded] == ["00000000", "00000002", "00000004"]
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == ["step-00000002", "step-00000004"]
    found = SimpleNamespace(pulled=pool._transport.pull(3))
    assert found.pulled[0] == 4 and pool._transport.pull(4) is None


def test_run_with_sglang_form_at_staleness_0_is_the_local_run(sglang, tmp_path):
    """Rewards and weights go their course; not to the last bit, for replay is off there and seeds are shorter."""
    pipeline = {"pool": "remote", "endpoints": [sglang.url], "max_staleness": 0}
    rollout = {"group_size": 4, "max_new_tokens": 8, "replay_experts": False}
    run(tmp_path / "01-rl", steps=3, pipeline=pipeline, rollout=rollout)
    assert len(trained(tmp_path / "01-rl")) == 12
    assert len(sglang.loaded) == 4


def test_server_that_takes_weights_gets_them_though_fixed_ones_would_do(sglang, tmp_path):
    """A short trial: all of its steps are within ``max_staleness``, and the policy is the recipe's all the same."""
    sglang.start_anew()
    pipeline = {"pool": "remote", "endpoints": [sglang.url], "max_staleness": 2, "publish_every": 1}
    rollout = {"group_size": 4, "max_new_tokens": 8, "replay_experts": False}
    run(tmp_path / "01-rl", steps=2, pipeline=pipeline, rollout=rollout, max_engine_trainer_kl=1.0)
    assert len(trained(tmp_path / "01-rl")) == 8
    assert [path.rpartition("-")[2] for path in sglang.loaded] == ["00000000", "00000001", "00000002"]


def test_fixed_weights_beside_published_ones(sglang, ours, tmp_path):
    """After a resume too, what a server made with the weights that it began with is not of the learner's step."""
    with pytest.raises(ConfigError, match="takes no weights while it runs"):
        make_pool([sglang.url, ours], tmp_path)
    pool = make_pool([sglang.url, ours], tmp_path, step=7, fixed_weights=True)
    pool.submit(make_orders(8))
    versions = {group.oldest_version for group in collect_all(pool, 8).values()}
    pool.close()
    assert versions == {0, 7} and len(sglang.loaded) == 1


def test_server_that_was_started_anew_gets_the_newest_weights(sglang, tmp_path):
    pool = make_pool([sglang.url], tmp_path)
    pool.publish(3, {name: tensor * 1.01 for name, tensor in make_model().state_dict().items()})
    sglang.start_anew()
    pool.submit(make_orders(8))
    # Not one token of the launch's weights, and one load, however many requests have found them lost.
    assert_same(collect_all(pool, 8), local_groups(WITHOUT, scale=1.01, step=3))
    assert len(sglang.loaded) == 3 and pool.metrics()["rollout/retries"] >= 1
    pool.close()
    # One that keeps its own weights whatever it is told to load.
    pool = make_pool([sglang.url], tmp_path, retry_limit_s=0.5)
    sglang.load = lambda body: {"success": True}
    sglang.start_anew()
    pool.submit(make_orders(1))
    with pytest.raises(TrainingError, match=r"has failed for .*answers with weights 'default'"):
        pool.collect(timeout_s=60)
    pool.close()


def test_weights_are_loaded_though_the_server_is_busy_and_at_times_away(sglang, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CONNECTIONS", 1)
    monkeypatch.setattr(servers, "CONNECT_LIMIT_S", 1.0)
    pool = make_pool([sglang.url], tmp_path, retry_limit_s=2)
    sglang.gate.clear()
    pool.submit(make_orders(2))
    # The only connection for rollouts is taken, and weights do not wait for it.
    sglang.load_trouble = [503, 500]
    pool.publish(1, make_model().state_dict())
    assert len(sglang.loaded) == 2 and sglang.asked.count("/update_weights_from_disk") == 4
    sglang.gate.set()
    assert len(collect_all(pool, 2)) == 2
    sglang.load_trouble = [400]
    with pytest.raises(TrainingError, match=r"HTTP 400: .*planted"):
        pool.publish(2, make_model().state_dict())
    monkeypatch.setattr(pool, "_retry_limit_s", 0.5)
    sglang.load_trouble = [503] * 50
    with pytest.raises(TrainingError, match=r"has failed for .* HTTP 503.*then resume"):
        pool.publish(3, make_model().state_dict())
    pool.close()


def test_checkpoints_of_a_run_that_went_on_from_an_earlier_step(sglang, tmp_path):
    make_pool([sglang.url], tmp_path, step=20).close()
    pool = make_pool([sglang.url], tmp_path, step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert pool._transport.pull(-1)[0] == 4
    pool.close()


def test_refusals_end_the_run_with_the_server_s_words(sglang, tmp_path):
    with pytest.raises(ConfigError, match=r"does not return experts; set rollout\.replay_experts=false"):
        make_pool([sglang.url], tmp_path, WITH_EXPERTS)
    pool = make_pool([sglang.url], tmp_path)
    sglang.trouble = [400]
    pool.submit(make_orders(1))
    with pytest.raises(TrainingError, match=r"order 0 \(letters\): .*HTTP 400: .*planted"):
        pool.collect(timeout_s=60)
    pool.close()
    # A server that keeps the end token to itself: sooner or later a completion ends by itself.
    pool = make_pool([sglang.url], tmp_path)
    sglang.keeps_end = False
    pool.submit(make_orders(8))
    with pytest.raises(TrainingError, match="does not return the log probability of the token that ends"):
        collect_all(pool, 8)
    pool.close()


def test_server_that_never_answers(sglang, ours, tmp_path):
    """Neither the order nor the process waits for it for ever."""
    sglang.gate.clear()
    pool = make_pool([sglang.url, ours], tmp_path, fixed_weights=True, answer_limit_s=1)
    pool.submit(make_orders(2))
    assert len(collect_all(pool, 2)) == 2
    assert pool.metrics()["rollout/retries"] >= 1
    threads = [thread for thread in threading.enumerate() if thread.name == "rollout request"]
    assert threads and all(thread.daemon for thread in threads)
    pool.close()
    pool = make_pool([sglang.url], tmp_path, answer_limit_s=0.2, retry_limit_s=0.2)
    pool.submit(make_orders(1))
    with pytest.raises(TrainingError, match=r"has failed for .*ReadTimeout.*then resume"):
        pool.collect(timeout_s=60)
    pool.close()


def test_connection_tells_when_the_other_machine_is_gone(ours):
    with servers.make_client(5) as client, client.stream("GET", f"{ours}/v1/models") as response:
        sock = response.extensions["network_stream"].get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in servers.KEEPALIVE:
            assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_long_rollouts_do_not_count_as_failures(monkeypatch):
    """A request that fails after hours is made again as any other, and one failure more does not end it."""
    now = 0.0
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now))
    attempts = remote._Attempts(300, lambda pause_s: False)
    server = SimpleNamespace(url="http://server")
    now = 10_000.0
    attempts.failed(server, OSError("away"))
    now = 20_000.0
    attempts.failed(server, OSError("away"))
    with pytest.raises(TrainingError, match=r"http://server has failed for 10000 s \(OSError: away\)"):
        attempts.failed(server, OSError("away"))


def test_server_that_stays_away_ends_the_run(sglang, tmp_path):
    pool = make_pool([sglang.url], tmp_path, retry_limit_s=0.5)
    sglang.trouble = [503] * 50
    pool.submit(make_orders(1))
    with pytest.raises(TrainingError, match=r"has failed for .* HTTP 503.*then resume"):
        pool.collect(timeout_s=60)
    pool.close()
