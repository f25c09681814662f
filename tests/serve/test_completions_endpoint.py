"""/v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

import json

import pytest

PATH = "/v1/completions"


def test_text_and_tokens_are_the_same_prompt(ask, tokenizer):
    text = ask("POST", PATH, json={"prompt": "Hello there"})
    tokens = [tokenizer.bos_token_id, *tokenizer.encode("Hello there", add_special_tokens=False)]
    assert text.engine.calls[0].prompt == tokens
    assert ask("POST", PATH, json={"prompt": tokens}).engine.calls[0].prompt == tokens
    assert text.json()["choices"][0]["text"] == "<think>so so</think>Fine."


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_candidates(ask, tokenizer, stream):
    def script(prompt, params, index):
        return tokenizer.decode(prompt[1:]) + f" {params.seed + index}"

    body = {"prompt": ["one", "two"], "n": 2, "seed": 10, "stream": stream, "echo": True}
    response = ask("POST", PATH, json=body, script=script)
    if stream:
        texts = [""] * 4
        for line in response.text.split("\n\n")[:-2]:
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            texts[choice["index"]] += choice["text"]
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
    assert texts == ["oneone 10", "oneone 11", "twotwo 12", "twotwo 13"]


def test_logprobs_in_the_old_form(ask):
    choice = ask("POST", PATH, json={"prompt": "x", "logprobs": 2}, script="Hello there").json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hello there"
    assert logprobs["text_offset"][0] == 0 and len(logprobs["text_offset"]) == len(logprobs["tokens"])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_echo_alone_runs_nothing(ask):
    response = ask("POST", PATH, json={"prompt": "Hello", "echo": True, "max_tokens": 0})
    assert response.json()["choices"][0]["text"] == "Hello" and response.engine.calls == []


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 3},
        {"echo": True, "logprobs": 1},
        {"max_tokens": 0},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [10**6]},
        {"prompt": [-1]},
        {"prompt": ["a", 1]},
        {"prompt": ["a"] * 65, "n": 2},
    ],
)
def test_what_is_refused(ask, fields):
    response = ask("POST", PATH, json={"prompt": "x"} | fields)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_one_prompt_that_is_refused_ends_the_others(serve):
    import httpx

    from .conftest import wait_until

    server = serve("word " * 400, pause_s=0.01)
    server.engine.max_waiting = 1
    response = httpx.post(server.url + PATH, json={"prompt": ["a", "b"]})
    assert response.status_code == 429 and response.headers["Retry-After"]
    wait_until(lambda: server.engine.num_running == 0)


def test_tokenize_and_back(ask, tokenizer):
    text = "Héllo <|im_end|> there"
    answer = ask("POST", "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 2048
    assert answer["tokens"][0] == tokenizer.bos_token_id
    assert ask("POST", "/detokenize", json={"tokens": answer["tokens"][1:]}).json() == {"prompt": text}


def test_tokenize_a_conversation(ask):
    messages = [{"role": "user", "content": "Hello"}]
    answer = ask("POST", "/tokenize", json={"messages": messages}).json()
    chat = ask("POST", "/v1/chat/completions", json={"messages": messages})
    assert answer["tokens"] == chat.engine.calls[0].prompt


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}])
def test_tokenize_wants_one_of_two(ask, body):
    assert ask("POST", "/tokenize", json=body).status_code == 400


def test_detokenize_knows_the_vocabulary(ask, tokenizer):
    assert ask("POST", "/detokenize", json={"tokens": [10**6]}).status_code == 400
    # Ids between the tokenizer's and the model's size have no text.
    assert ask("POST", "/detokenize", json={"tokens": [len(tokenizer) + 1]}).json() == {"prompt": ""}
