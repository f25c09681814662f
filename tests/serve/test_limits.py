"""Clients that leave, queues that are full, answers that take too long, servers that stop."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest

from .conftest import wait_until

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}
LONG = "word " * 500


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(serve, path, stream):
    server = serve(LONG, pause_s=0.02)
    asked = {CHAT: BODY, "/v1/completions": {"prompt": "Hello"}, "/v1/responses": {"input": "Hello"}}[path]
    body = asked | {"stream": stream}
    payload = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + payload)
        wait_until(lambda: server.engine.num_running == 1)
        if stream:
            assert b"200 OK" in connection.recv(1000)
    wait_until(lambda: server.engine.num_running == 0, 3)
    assert server.engine.cancelled == {"request-0"}
    wait_until(lambda: not server.service.jobs and server.service.num_requests == 0)


def test_a_body_that_never_ends_holds_nothing(serve):
    server = serve(body_timeout_s=0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"mess')
        assert b"408" in connection.recv(1000)


def test_a_client_that_leaves_in_its_body(serve):
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"mess')
        wait_until(lambda: server.service.num_requests == 1)
    wait_until(lambda: server.service.num_requests == 0)
    assert server.engine.calls == []


def test_a_full_queue(serve):
    server = serve()
    server.engine.max_waiting = 0
    for stream in (False, True):
        response = httpx.post(server.url + CHAT, json=BODY | {"stream": stream})
        assert response.status_code == 429 and response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "queue_full"
    assert not server.service.jobs


def test_an_answer_that_takes_too_long(serve):
    server = serve(LONG, pause_s=0.02, request_timeout_s=0.2)
    response = httpx.post(server.url + CHAT, json=BODY)
    assert response.status_code == 408 and response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["type"] == "timeout_error"
    stream = httpx.post(server.url + CHAT, json=BODY | {"stream": True})
    assert '"type":"timeout_error"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
    wait_until(lambda: server.engine.num_running == 0)


def test_silence_is_filled_with_comments(serve):
    server = serve("Hi", pause_s=0.25, keepalive_s=0.05)
    text = httpx.post(server.url + CHAT, json=BODY | {"stream": True}).text
    assert text.count(": still working\n\n") >= 3 and text.endswith("data: [DONE]\n\n")


def test_a_server_that_drains(serve):
    server = serve("word " * 30, pause_s=0.02)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(httpx.post(server.url + CHAT, json=BODY)))
    thread.start()
    wait_until(lambda: server.engine.num_running == 1)
    server.service.draining = True
    refused = httpx.post(server.url + CHAT, json=BODY)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert httpx.get(server.url + "/ready").status_code == 503
    assert httpx.get(server.url + "/health").status_code == 200
    assert httpx.get(server.url + "/metrics").status_code == 200
    thread.join()
    assert answers[0].status_code == 200 and answers[0].json()["choices"][0]["finish_reason"] == "stop"


def test_what_still_runs_at_the_end_is_told(serve):
    server = serve(LONG, pause_s=0.02)
    with httpx.stream("POST", server.url + CHAT, json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.service.fail_all()
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert rest[-1] == "data: [DONE]"
    wait_until(lambda: server.engine.num_running == 0)


def test_many_streams_at_once_do_not_mix(serve):
    def script(prompt, params, index):
        return f"<think></think>seed {params.seed}. " * 3

    server = serve(script, pause_s=0.001)
    texts = {}

    def ask(seed):
        text = ""
        body = BODY | {"stream": True, "seed": seed}
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=30) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        text += choice["delta"].get("content", "")
        texts[seed] = text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(12):
        assert texts[seed].startswith(f"seed {seed}. ") and texts[seed].count(f"seed {seed}. ") == 3
    end_s = time.monotonic() + 5
    while server.service.jobs and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not server.service.jobs
