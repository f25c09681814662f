"""Clients that many people use, by what they send: lm-eval's API client, a chat interface, a schema-driven fuzzer."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from openzaya.serve.server import create_app
from openzaya.serve.settings import ServerSettings

from .conftest import wait_until
from .fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


def test_a_chat_interface(serve):
    """The sequence of an Open WebUI-like page: models, a streamed chat with fields of its own, a title, a stop."""
    server = serve(lambda prompt, params, index: "<think>hm</think>" + "word " * 300, pause_s=0.005, api_key="s3cret")
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer s3cret"}) as client:
        models = client.get("/v1/models").json()["data"]
        body = {
            "stream": True,
            "model": models[0]["id"],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            "params": {},
            "features": {"web_search": False, "image_generation": False},
            "variables": {"{{USER_NAME}}": "x"},
            "model_item": {"id": models[0]["id"], "info": None, "actions": []},
            "session_id": "s",
            "chat_id": "c",
            "id": "m",
            "background_tasks": {"title_generation": True},
            "stream_options": {"include_usage": True},
            "max_tokens": 5,
            "tools": None,
            "stop": None,
        }
        lines = [line for line in client.post(CHAT, json=body).text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["usage"]["completion_tokens"] == 5
        title = {
            "model": models[0]["id"],
            "messages": [{"role": "user", "content": "### Task: give a title"}],
            "stream": False,
            "max_completion_tokens": 20,
            "metadata": {"task": "title_generation", "chat_id": "c"},
            "reasoning_effort": "none",
        }
        answer = client.post(CHAT, json=title).json()["choices"][0]
        assert answer["finish_reason"] == "length"
        del body["max_tokens"]
        with client.stream("POST", CHAT, json=body) as stream:
            next(stream.iter_lines())
            assert server.engine.num_running == 1
    wait_until(lambda: server.engine.num_running == 0, 3)


def test_lm_eval(serve, tmp_path, monkeypatch):
    """lm-eval's own client asks two questions of a task that is read from a file."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    server = serve(lambda prompt, params, index: "<think>so</think>4" if prompt.count(0) == 0 else "")
    rows = [{"question": "2+2", "answer": "4"}, {"question": "2+3", "answer": "5"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['Q:']\n  max_gen_toks: 16\n  temperature: 0\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = simple_evaluate(
        model="local-chat-completions",
        model_args=f"model=zaya,base_url={server.url}{CHAT},num_concurrent=2,max_retries=1,tokenized_requests=False",
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found["results"]["sums"]["exact_match,none"] == 0.5
    assert all(call.params.temperature == 0 and call.params.stop == ("Q:",) for call in server.engine.calls)


def test_every_operation_of_the_schema(tokenizer):
    """Schemathesis draws requests from the application's own OpenAPI schema."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error

    app = create_app(FakeEngine(tokenizer), ServerSettings())
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:

        @settings(max_examples=15, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            response = case.call()
            case.validate_response(response, checks=(not_a_server_error,))
            assert response.status_code < 400 or "error" in response.json()

        check()
