"""The proxy before a scripted endpoint: runs of RSA, requests that are passed on, faults, keys, clients that leave."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from openzaya.serve import proxy as proxy_module
from openzaya.serve.proxy import ProxyService, create_proxy
from openzaya.serve.settings import ServerSettings
from openzaya.ttc.endpoint import EndpointCompleter
from openzaya.ttc.journal import Journal
from tests.command import openzaya
from tests.serve.conftest import wait_until
from tests.ttc.scripted_endpoint import Script, ScriptedEndpoint

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "What is 17 + 25?"}
SMALL = {"n": 4, "c": 2, "t": 1, "beta": 64, "tau": 16, "final_budget": 160}
KEY = "sk-upstream-9f3b"


class Running:
    """An application on a port of this machine, in a thread."""

    def __init__(self, app):
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


class Proxy(Running):
    def __init__(self, upstream: str, settings: ServerSettings, **options):
        self.service = ProxyService(upstream, settings, **options)
        super().__init__(create_proxy(self.service))

    def chat(self, **body) -> httpx.Response:
        return httpx.post(self.url + CHAT, json={"messages": [USER]} | body, timeout=30)

    def stream(self, **body) -> list[str]:
        return self.chat(stream=True, **body).text.split("\n\n")


@pytest.fixture(autouse=True)
def retries_come_soon(monkeypatch):
    monkeypatch.setattr(proxy_module, "EndpointCompleter", functools.partial(EndpointCompleter, retry_wait_s=0.01))


@pytest.fixture
def begin():
    """``begin(Script(...), **settings)`` gives an endpoint and a proxy in front of it."""
    running = []

    def start(script=None, *, app=None, options=None, **settings):
        endpoint = ScriptedEndpoint(script or Script())
        upstream = Running(app or endpoint.app)
        proxy = Proxy(upstream.url, ServerSettings(**settings), **(options or {}))
        running.extend((proxy, upstream))
        return endpoint, proxy

    yield start
    for one in running:
        one.close()


def events(pieces: list[str]) -> list[dict]:
    assert pieces[-2:] == ["data: [DONE]", ""], pieces[-3:]
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces if piece.startswith("data: {")]


def test_a_run_is_an_answer_with_its_whole_account(begin):
    endpoint, proxy = begin()
    answer = proxy.chat(rsa=SMALL, seed=5).json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop" and "boxed" in choice["message"]["content"]
    assert choice["message"]["reasoning_content"].startswith("mark-")
    rsa, usage = answer["rsa"], answer["usage"]
    assert [one["done"] for one in rsa["rounds"]] == [4, 4] and rsa["config"]["n"] == 4 and len(rsa["selected"]) == 1
    assert answer["model"] == "scripted" and rsa["deviations"] == [] and rsa["token_counting"] == "server"
    finals = [one for one in endpoint.requests if one["state"] == "done" and _is_rollout(one)]
    assert len(finals) == 8
    assert usage["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in finals) == rsa["tokens"]
    assert usage["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in finals)
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0
    assert proxy.chat(rsa=SMALL, seed=5).json()["choices"] == answer["choices"], "the same seed, the same run"


def _is_rollout(request) -> bool:
    """Not a probe of what the endpoint can do."""
    return "17 + 25" in json.dumps(request["body"])


def test_a_stream_tells_of_the_run_and_ends_with_the_same_answer(begin):
    _, proxy = begin()
    whole = proxy.chat(rsa=SMALL, seed=5).json()
    options = {"include_usage": True, "include_rsa": True}
    chunks = events(proxy.stream(rsa=SMALL, seed=5, stream_options=options))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    content = "".join(delta.get("content", "") for delta in deltas)
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    message = whole["choices"][0]["message"]
    assert content == message["content"] and reasoning.endswith("\n\n" + message["reasoning_content"])
    assert "round 1 of 2: 1/4 done" in reasoning and "round 2 of 2 ended: 4/4 done" in reasoning
    told = [chunk["rsa"] for chunk in chunks if "rsa" in chunk]
    kinds = [one["event"] for one in told]
    assert kinds[0] == "started" and kinds[-2:] == ["selected", "finished"]
    assert kinds.count("launched") == kinds.count("candidate") == 8 and kinds.count("round") == 2
    assert all(len(one["parents"]) == 2 for one in told if one["event"] == "candidate" and one["round"] == 1)
    timeless = {"seconds", "rounds", "event"}
    assert {k: v for k, v in told[-1].items() if k not in timeless} == {
        k: v for k, v in whole["rsa"].items() if k not in timeless
    }
    plain = events(proxy.stream(rsa=SMALL, seed=5))
    assert [chunk["rsa"]["event"] for chunk in plain if "rsa" in chunk] == ["finished"], "only for who asks"


def test_conversation_tools_and_format_are_kept(begin):
    endpoint, proxy = begin()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [_call("a")]},
        {"role": "tool", "tool_call_id": "a", "content": "12"},
        {"role": "assistant", "content": "12."},
        USER,
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = proxy.chat(messages=messages, tools=[tool], tool_choice="required", rsa=SMALL, seed=1).json()
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
    bodies = [one["body"] for one in endpoint.requests if _is_rollout(one)]
    assert all(body["messages"][:5] == messages[:5] and body["tools"] == [tool] for body in bodies)
    assert sum("tool_choice" in body for body in bodies) == 4, "the final round's"
    stream = events(proxy.stream(messages=messages, tools=[tool], tool_choice="required", rsa=SMALL, seed=1))
    assert [c for c in stream if c["choices"][0]["delta"].get("tool_calls")]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    answer = proxy.chat(response_format=form, rsa=SMALL, seed=1).json()
    assert "answer" in json.loads(answer["choices"][0]["message"]["content"])
    formats = [one["body"].get("response_format") for one in endpoint.requests if _is_rollout(one)]
    assert formats.count(form) == 4


def _call(identity: str) -> dict:
    return {"id": identity, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_without_rsa_requests_go_through_unchanged(begin):
    endpoint, proxy = begin(Script(api_key=KEY), api_key="ours", options={"api_key": KEY})
    headers = {"Authorization": "Bearer ours"}
    body = {"model": "scripted", "messages": [USER], "seed": 3, "max_tokens": 30, "own_field": {"a": [1]}}
    with httpx.Client(base_url=proxy.url, headers=headers) as client:
        answer = client.post(CHAT, json=body)
        assert answer.status_code == 200 and answer.headers["x-request-id"]
        assert endpoint.requests[-1]["body"] == body
        stream = client.post(CHAT, json=body | {"stream": True, "rsa": False, "stream_options": {"include_rsa": True}})
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert events(stream.text.split("\n\n"))
        assert endpoint.requests[-1]["body"] == body | {"stream": True, "stream_options": {}}
        assert client.get("/v1/models").json()["data"][0]["id"] == "scripted"
        assert client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4}).json()["choices"]
        assert client.post("/tokenize", json={"prompt": "Hello"}).json()["count"] > 0
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert "openzaya_jobs 0.0" in client.get("/metrics").text
        for path in ("/v1/files", "/v1/../stats", "/stats", "/v1/models/x/y"):
            assert client.get(path).status_code == 404, "only what is listed is passed on"
    assert httpx.post(proxy.url + CHAT, json=body).status_code == 401
    assert httpx.get(proxy.url + "/").status_code == 200
    assert httpx.post(proxy.url + CHAT, json=body, headers={"Authorization": f"Bearer {KEY}"}).status_code == 401


def test_the_upstream_key_is_never_shown(begin, caplog):
    caplog.set_level(logging.DEBUG)
    _, proxy = begin(Script(api_key="another"), options={"api_key": KEY})
    texts = [proxy.chat().text, proxy.chat(rsa=SMALL).text, *proxy.stream(rsa=SMALL)]
    assert "OPENZAYA_UPSTREAM_KEY" in texts[0] and "error" in texts[1]
    texts += [httpx.get(proxy.url + path).text for path in ("/metrics", "/openapi.json", "/ready", "/v1/models")]
    assert KEY not in "".join(texts) and KEY not in caplog.text and KEY not in repr(vars(proxy.service.settings))


def _answers(status: int, content: bytes, kind: str = "application/json", **headers):
    async def reply(request) -> Response:
        return Response(content, status, {"content-type": kind, **headers})

    return Starlette(routes=[Route("/{path:path}", reply, methods=["GET", "POST"])])


@pytest.mark.parametrize(
    ("app", "status", "text"),
    [
        (_answers(400, b'{"error": {"message": "bad seed", "param": "seed", "code": "x"}}'), 400, "bad seed"),
        (_answers(429, b'{"detail": "slow down"}', **{"retry-after": "7"}), 429, "slow down"),
        (_answers(500, b"<html>oops</html>", "text/html"), 500, "oops"),
        (_answers(503, b""), 503, "Service Unavailable"),
        (_answers(401, b'{"error": {"message": "wrong key sk-upstream-9f3b"}}'), 401, "OPENZAYA_UPSTREAM_KEY"),
    ],
)
def test_errors_of_the_upstream_are_errors_in_our_form(begin, app, status, text):
    _, proxy = begin(app=app, options={"api_key": KEY})
    for stream in (False, True):
        answer = proxy.chat(stream=stream)
        assert answer.status_code == status and KEY not in answer.text
        assert text in answer.json()["error"]["message"]
    if status == 429:
        assert answer.headers["retry-after"] == "7"


def test_an_upstream_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    proxy = Proxy(f"http://127.0.0.1:{port}", ServerSettings())
    try:
        for body in ({}, {"stream": True}, {"rsa": SMALL}, {"rsa": SMALL, "stream": True}):
            answer = proxy.chat(**body)
            assert answer.status_code == 502 and answer.json()["error"]["type"] == "server_error", answer.text
        assert httpx.get(proxy.url + "/health").status_code == 200 and not proxy.service.jobs
    finally:
        proxy.close()


def test_an_upstream_that_breaks_off_or_hangs(begin):
    async def half(request) -> Response:
        async def pieces():
            yield b'data: {"choices": []}\n\n'
            yield b'data: {"choi'
            raise RuntimeError("gone")

        if (await request.json()).get("stream"):
            return StreamingResponse(pieces(), media_type="text/event-stream")
        await asyncio.sleep(60)
        return PlainTextResponse("")

    app = Starlette(routes=[Route(CHAT, half, methods=["POST"])])
    _, proxy = begin(app=app, request_timeout_s=0.5)
    answer = proxy.chat()
    assert answer.status_code in (408, 504) and answer.json()["error"]["message"]
    *_, error, done, end = proxy.stream()
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "upstream_broken"
    assert (done, end) == ("data: [DONE]", "")
    wait_until(lambda: not proxy.service.jobs)


@pytest.mark.parametrize("rsa", [None, SMALL])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_upstream(begin, rsa, stream):
    endpoint, proxy = begin()
    assert proxy.chat(rsa=SMALL).status_code == 200, "probed before anybody leaves"
    object.__setattr__(endpoint.script, "hang", 1.0)
    body = json.dumps({"messages": [USER], "rsa": rsa, "stream": stream, "seed": 9}).encode()
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        wait_until(lambda: endpoint.in_flight == (4 if rsa else 1))
        assert len(proxy.service.jobs) == 1
    wait_until(lambda: endpoint.in_flight == 0 and not proxy.service.jobs and proxy.service.num_requests == 0)
    assert endpoint.counts["hung"] + endpoint.counts["left"] == (4 if rsa else 1)


def test_failing_calls_do_not_fail_the_run(begin):
    endpoint, proxy = begin(Script(fail=0.3))
    answer = proxy.chat(rsa=SMALL | {"n": 8}, seed=2)
    assert answer.status_code == 200, answer.text
    assert [one["done"] for one in answer.json()["rsa"]["rounds"]] == [8, 8] and endpoint.counts["failed"] > 0


def test_a_run_that_was_left_goes_on(begin, tmp_path):
    endpoint, proxy = begin()
    proxy.service.journal = Journal.open(tmp_path / "journal.sqlite")
    first = proxy.chat(rsa=SMALL, seed=4).json()
    num = sum(_is_rollout(one) for one in endpoint.requests)
    again = proxy.chat(rsa=SMALL, seed=4).json()
    assert [one["resumed"] for one in again["rsa"]["rounds"]] == [4, 4] and again["choices"] == first["choices"]
    assert sum(_is_rollout(one) for one in endpoint.requests) == num
    other = proxy.chat(rsa=SMALL | {"tau": 8}, seed=4).json()
    assert other["rsa"]["rounds"][0]["resumed"] == 0, "other settings are another run"


def test_models_are_those_of_the_upstream(begin):
    _, proxy = begin()
    assert proxy.chat(model="scripted:rsa-parallel", rsa=None, max_tokens=40).json()["model"] == "scripted"
    assert proxy.chat(model="scripted", rsa=SMALL).status_code == 200
    answer = proxy.chat(model="another", rsa=SMALL)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_messages_with_pictures_and_effort_reach_the_upstream(begin):
    endpoint, proxy = begin(effort_rsa=True, rsa_defaults={"beta": 48, "tau": 8, "final_budget": 64})
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    asked = {"role": "user", "content": [{"type": "text", "text": "What is 17 + 25?"}, picture]}
    assert proxy.chat(messages=[asked], rsa=SMALL).status_code == 200
    assert all(picture in one["body"]["messages"][-1]["content"] for one in endpoint.requests if _is_rollout(one))
    low = proxy.chat(reasoning_effort="low").json()
    assert [one["done"] for one in low["rsa"]["rounds"]] == [4, 4]
    assert "rsa" not in proxy.chat(reasoning_effort="minimal").json()


def test_the_command_says_what_is_wrong():
    assert openzaya("serve").code == 2 and openzaya("serve", "x", "--proxy", "http://localhost:1").code == 2
    finished = openzaya("serve", "--proxy", "localhost:1", "--port", 0)
    assert finished.code == 1 and "http" in finished.err
    finished = openzaya("serve", "--proxy", "http://localhost:1", "--port", 0, "--rsa-set", "width=3")
    assert finished.code == 1 and "no setting 'width'" in finished.err


def test_a_proxy_does_not_wait_for_torch():
    code = "import sys, openzaya.serve.proxy; assert not {'torch', 'transformers'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
