"""Who may ask, who is told what: keys, host names, origins, request ids, logs and metrics."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re

import pytest

from openzaya.serve.logs import JsonFormatter, request_id

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "a private matter"}]}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        ("Basic s3cret", 401),
        ("Bearer s3cret-and-more", 401),
        ("Bearer é", 401),
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
    ],
)
def test_the_key(ask, header, status):
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    response = ask("POST", CHAT, json=BODY, headers=headers, settings={"api_key": "s3cret"})
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_probes_and_the_page_need_no_key(ask):
    settings = {"api_key": "s3cret"}
    assert ask("GET", "/health", settings=settings).status_code == 200
    assert ask("GET", "/ready", settings=settings).status_code == 200
    assert ask("GET", "/", settings=settings).status_code in (200, 404)
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nope"):
        assert ask("GET", path, settings=settings).status_code == 401


def test_the_page_may_run_its_own_script_and_nothing_else(ask):
    response = ask("GET", "/")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", response.text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert scripts and policy["script-src"] == " ".join(f"'sha256-{value}'" for value in hashes)


def test_host_names(ask):
    settings = {"allowed_hosts": ("localhost", "::1")}
    for host, status in [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("", 403),
    ]:
        assert ask("GET", "/v1/models", headers={"host": host}, settings=settings).status_code == status


def test_origins(ask):
    origin = {"origin": "https://app.example"}
    assert "access-control-allow-origin" not in ask("GET", "/v1/models", headers=origin).headers
    settings = {"cors_origins": ("https://app.example",), "api_key": "s3cret"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = ask("OPTIONS", CHAT, headers=preflight, settings=settings)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    # A page can read why it was refused.
    refused = ask("POST", CHAT, json=BODY, headers=origin, settings=settings)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"
    other = ask("GET", "/health", headers={"origin": "https://other.example"}, settings=settings)
    assert "access-control-allow-origin" not in other.headers


def test_request_ids(ask):
    assert ask("GET", "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert ask("GET", "/nope").headers["x-request-id"].startswith("req_")
    for evil in ("a b", "x" * 200, 'x"y', "", "ü"):
        assert request_id(evil).startswith("req_")


def log_lines(caplog) -> list[dict]:
    return [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == "openzaya.serve"]


def test_a_request_is_one_line_of_json_without_its_text(ask, caplog):
    caplog.set_level(logging.INFO, "openzaya.serve")
    ask("POST", CHAT, json=BODY, headers={"x-request-id": "abc"})
    (line,) = log_lines(caplog)
    assert line["request_id"] == "abc" and line["path"] == CHAT and line["status"] == 200
    assert line["prompt_tokens"] > 3 and line["completion_tokens"] > 3 and line["ms"] > 0
    assert "private" not in json.dumps(line) and "Fine" not in json.dumps(line)


def test_prompts_are_logged_where_the_operator_wants_it(ask, caplog):
    caplog.set_level(logging.INFO, "openzaya.serve")
    ask("POST", CHAT, json=BODY, settings={"log_prompts": True})
    assert log_lines(caplog)[0]["prompt"] == [{"role": "user", "content": "a private matter"}]


def test_a_path_cannot_forge_a_log_line(ask, caplog):
    caplog.set_level(logging.INFO, "openzaya.serve")
    ask("GET", '/v1/models/x%0a{"event":"forged"}' + "y" * 500)
    text = JsonFormatter().format(caplog.records[-1])
    assert "\n" not in text and len(text) < 1000


def test_metrics(serve):
    import httpx

    server = serve()
    httpx.post(server.url + CHAT, json=BODY)
    httpx.post(server.url + CHAT, json={})
    httpx.get(server.url + "/made/up")
    text = httpx.get(server.url + "/metrics").text
    assert 'openzaya_http_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
    assert 'openzaya_http_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0' in text
    assert 'openzaya_http_requests_total{endpoint="other",status="404"} 1.0' in text
    assert "openzaya_time_to_first_token_seconds_count 1.0" in text
    assert "openzaya_cache_blocks_free 0.0" in text and "openzaya_generated_tokens_total 0.0" in text
