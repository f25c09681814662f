"""/v1/responses: items in, items out, and the events of a stream."""

from __future__ import annotations

import json

import pytest

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
CALL = "<zyphra_tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</zyphra_tool_call>"


def events(response) -> list[dict]:
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_output_items(ask):
    whole = ask("POST", PATH, json={"input": "Hello"}).json()
    assert whole["object"] == "response" and whole["status"] == "completed"
    reasoning, message = whole["output"]
    assert reasoning["type"] == "reasoning" and reasoning["content"][0]["text"] == "so so"
    assert message["content"][0] == {"type": "output_text", "text": "Fine.", "annotations": [], "logprobs": []}
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_the_stream_builds_the_same_items(ask):
    body = {"input": "Hello", "tools": [WEATHER], "stream": True}
    found = events(ask("POST", PATH, json=body, script=f"<think>so so</think>Let me see.\n{CALL}"))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    assert "error" not in kinds
    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    assert output[2]["arguments"] == '{"city": "Paris"}' and output[2]["name"] == "weather"
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert done == output
    deltas = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert deltas == output[1]["content"][0]["text"] == "Let me see."
    added = [event["item"] for event in found if event["type"] == "response.output_item.added"]
    assert all(item["status"] == "in_progress" for item in added)


def test_an_answer_that_was_cut_is_incomplete(ask):
    whole = ask("POST", PATH, json={"input": "Hello", "max_output_tokens": 3}).json()
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][-1]["status"] == "incomplete"
    found = events(ask("POST", PATH, json={"input": "Hello", "max_output_tokens": 3, "stream": True}))
    assert found[-1]["type"] == "response.incomplete"


def test_items_become_a_conversation(ask, tokenizer):
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "SECRET"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    response = ask("POST", PATH, json={"input": items, "instructions": "Be brief.", "tools": [WEATHER]})
    prompt = tokenizer.decode(response.engine.calls[0].prompt, skip_special_tokens=False)
    assert "<|im_start|>system\nBe brief.\n\nBe kind." in prompt and "SECRET" not in prompt
    assert f"<think></think>Let me see.\n{CALL}<|im_end|>" in prompt
    assert "<zyphra_tool_response>\nsunny\n</zyphra_tool_response>" in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": []}, None),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_refused(ask, fields, param):
    response = ask("POST", PATH, json={"input": "Hello"} | fields)
    assert response.status_code == 400
    if param is not None:
        assert response.json()["error"]["param"] == param


def test_settings_reach_the_engine(ask):
    schema = {"type": "object"}
    fields = {
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}},
        "reasoning": {"effort": "low"},
        "temperature": 0.5,
        "max_output_tokens": 20,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    response = ask("POST", PATH, json={"input": "Hello"} | fields)
    params = response.engine.calls[0].params
    assert (params.json_schema, params.thinking_budget, params.temperature) == (schema, 1024, 0.5)
    assert (params.max_new_tokens, params.logprobs) == (20, 2)
    records = response.json()["output"][-1]["content"][0]["logprobs"]
    assert "".join(record["token"] for record in records) == "Fine."


def test_no_log_probability_is_lost_with_a_character_of_several_tokens(ask):
    text = "A \U0001f600 or \u65e5\u672c."
    body = {"input": "Hello", "top_logprobs": 1}
    for script in (text, f"<think>so</think>{text}"):
        piece = ask("POST", PATH, json=body, script=script).json()["output"][-1]["content"][0]
        assert piece["text"] == text
        assert b"".join(bytes(record["bytes"]) for record in piece["logprobs"]).decode() == text
