"""RSA in the server: what a request asks for and may ask for, and runs on an engine with a small random model."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.infer.engine import Engine
from openzaya.model.transformer import Zaya
from openzaya.serve.errors import ApiError
from openzaya.serve.rsa import fitted, question_of, split_name, wish_of
from openzaya.serve.rsa_run import Progress
from openzaya.serve.schemas import ChatRequest
from openzaya.serve.settings import ServerSettings
from openzaya.ttc.completer import Capabilities
from openzaya.ttc.config import PRESETS, RSAConfig
from openzaya.ttc.results import Candidate, Event
from tests.serve.conftest import wait_until
from tests.train import miniature
from tests.ttc.fake_completer import FakeCompleter

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
SMALL = {"n": 4, "c": 2, "t": 1, "beta": 12, "tau": 6, "final_budget": 20, "answer_budget": 8}


def wish(settings: ServerSettings | None = None, **body):
    return wish_of(ChatRequest.model_validate({"messages": [USER]} | body), settings or ServerSettings())


def config(**body) -> RSAConfig:
    found = wish(seed=0, **body)
    assert found is not None
    return found.config


def refusal(**body) -> str:
    with pytest.raises(ApiError) as caught:
        wish(**body)
    assert caught.value.status_code == 400
    return caught.value.message


# --- what a request asks for ------------------------------------------------------------------------


def test_forms_of_the_wish():
    assert wish() is None and wish(rsa=False) is None and wish(rsa=None, reasoning_effort="high") is None
    assert config(rsa=True) == PRESETS["default"]
    assert config(rsa="light") == PRESETS["light"]
    assert config(rsa={"preset": "light", "t": 1}) == PRESETS["light"].model_copy(update={"t": 1})
    assert config(rsa={"rsa_n": 8, "rsa_k": 2, "rsa_final_n": 0, "use_pacore": True}) == RSAConfig(
        n=8, c=2, carry="answer_or_reasoning"
    )
    assert config(model="zaya:rsa") == PRESETS["default"] and config(model="zaya:rsa-high") == PRESETS["high"]
    assert wish(model="zaya:rsa-light", rsa=False) is None and wish(model="zaya:rsa").model == "zaya"
    assert split_name("a:rsa", ServerSettings(model_names=("a:rsa",))) == ("a:rsa", None), "a name of its own"


def test_ordinary_fields_are_settings_of_the_run():
    found = config(rsa=True, max_tokens=99, temperature=0.5, top_p=0, top_k=-1)
    assert found.final_budget == 99 and found.sampling.temperature == 0.5
    assert 0 < found.sampling.top_p < 1e-6 and found.sampling.top_k == 0
    assert config(rsa=True, max_tokens=99, max_completion_tokens=50).final_budget == 50
    explicit = config(rsa={"final_budget": 7, "sampling": {"temperature": 0.1}}, max_tokens=99, temperature=1, top_k=5)
    assert explicit.final_budget == 7 and explicit.sampling.temperature == 0.1 and explicit.sampling.top_k == 5
    assert wish(rsa=True, seed=3).config.seed == 3 and wish(rsa={"seed": 4}, seed=3).config.seed == 4
    assert wish(rsa=True).config.seed != wish(rsa=True).config.seed


def test_defaults_of_the_server():
    server = ServerSettings(rsa_defaults={"beta": 256, "tau": 64, "sampling": {"temperature": 0.6}})
    found = wish(server, rsa="light", top_p=0.9)
    assert (found.config.beta, found.config.tau, found.config.n) == (256, 64, 8)
    assert (found.config.sampling.temperature, found.config.sampling.top_p) == (0.6, 0.9)
    assert wish(server, rsa={"short_resp_len": 99}).config.beta == 99
    assert {"beta", "tau", "seed"} <= found.chosen


def test_effort_is_width_and_depth_where_the_server_says_so():
    server = ServerSettings(effort_rsa=True)
    sizes = {}
    for effort in ("low", "medium", "high", "xhigh"):
        found = wish(server, reasoning_effort=effort).config
        sizes[effort] = (found.n, found.t)
    assert sizes == {"low": (4, 1), "medium": (8, 2), "high": (16, 2), "xhigh": (32, 2)}
    for plain in ({}, {"reasoning_effort": "none"}, {"reasoning_effort": "minimal"}):
        assert wish(server, **plain) is None
    assert wish(server, reasoning_effort="low", logprobs=True) is None, "it did not ask for RSA"
    assert wish(server, reasoning_effort="low", rsa=True).config.n == 16, "what is said wins"


def test_choices_are_the_final_round():
    assert config(rsa={"select": "all"}, n=3).final_n == 3 and config(rsa={"select": "all", "final_n": 3}, n=3)
    assert "select" in refusal(rsa=True, n=3)
    assert "give one of them" in refusal(rsa={"select": "all", "final_n": 2}, n=3)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"rsa": "best"}, "'best' is unknown"),
        ({"rsa": {"width": 3}}, "no setting 'width'"),
        ({"rsa": {"n": 0}}, "n: Input should be greater"),
        ({"rsa": {"t": None}}, "t: Input should be"),
        ({"rsa": {"widths": 3}}, "widths"),
        ({"rsa": {"preset": 3}}, "preset"),
        ({"rsa": {"events": "yes"}}, "events"),
        ({"rsa": {"rsa_n": 3, "n": 4}}, "both give n"),
        ({"rsa": {"select": "verifier"}}, "no verifier"),
        ({"rsa": {"continuation": "prefill"}}, "c=4"),
        ({"rsa": True, "logprobs": True}, "logprobs"),
        ({"rsa": True, "stop": ["x"]}, "stop"),
        ({"rsa": True, "enable_thinking": False}, "enable_thinking"),
        ({"rsa": True, "max_tokens": 0}, "max_tokens"),
        ({"model": "zaya:rsa-best"}, "unknown"),
    ],
)
def test_what_cannot_be_used_is_named(body, text):
    assert text in refusal(**body)


def test_defaults_that_clients_send_anyway_are_fine():
    assert wish(rsa=True, frequency_penalty=0, presence_penalty=0.0, stop=None, logit_bias={}, repetition_penalty=1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("light"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*RSAConfig.model_fields, "preset", "events", "use_pacore", "rsa_k", "short_resp_len"])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(max_size=8) | st.dictionaries(NAMES, VALUES, max_size=4), st.booleans())
def test_any_settings_are_used_or_refused(rsa, for_effort):
    try:
        wish(ServerSettings(effort_rsa=for_effort), rsa=rsa, reasoning_effort="low")
    except ApiError as error:
        assert error.status_code == 400 and error.message


# --- limits -----------------------------------------------------------------------------------------


class Small(FakeCompleter):
    async def capabilities(self):
        return Capabilities("chat", "small", "tokenizer", "none", context=2000)


def fit(settings=None, completer=None, **body):
    request = ChatRequest.model_validate({"messages": [USER]} | body)
    found = wish_of(request, settings or ServerSettings())
    question = question_of([USER], request)
    return asyncio.run(fitted(found, question, completer or Small(), settings or ServerSettings()))


def test_budgets_fit_the_context():
    assert fit(completer=FakeCompleter(), rsa=True)[0].beta == 16_384, "no context is known"
    found, warnings = fit(rsa=True)
    assert found.beta + 4 * found.tau < 2000 and found.final_budget + 4 * found.tau < 2000 and len(warnings) == 1
    kept, _ = fit(rsa={"beta": 300, "tau": 50})
    assert (kept.beta, kept.tau) == (300, 50) and 300 < kept.final_budget < 2000
    assert fit(rsa={"beta": 300, "tau": 50}, max_tokens=120)[0].final_budget == 120
    assert fit(rsa={"beta": 300, "tau": 50}, max_tokens=10**6)[0].final_budget < 2000
    assert fit(rsa={"beta": 10**6})[0].beta < 2000
    cut, warnings = fit(ServerSettings(max_tokens_limit=100), rsa={"beta": 300, "tau": 50})
    assert cut.beta == cut.final_budget == 100 and "100" in warnings[0]
    with pytest.raises(ApiError, match="context") as caught:
        fit(ServerSettings(context=30), rsa=True)
    assert caught.value.code == "context_length_exceeded"


def test_the_work_of_a_request_is_limited():
    for body, text in (({"n": 600}, "512 a request"), ({"n": 100, "c": 1, "t": 4, "beta": 10**5}, "generated tokens")):
        with pytest.raises(ApiError, match=text):
            fit(completer=FakeCompleter(), rsa=body)


def test_questions_that_cannot_be_asked():
    request = ChatRequest.model_validate({"messages": [USER]})
    for messages in ([], [{"role": "assistant", "content": "x"}], [{"role": "user", "content": " "}]):
        with pytest.raises(ApiError):
            question_of(messages, request)


def test_progress_is_short():
    progress = Progress(RSAConfig(n=100, t=0))
    lines = []
    for slot in range(100):
        candidate = Candidate(0, slot, (), "done", 0, answer="a\n" * 1000 if slot % 2 else "42")
        lines.append(progress.line(Event("candidate", 0, slot, (), candidate)))
    told = [line for line in lines if line]
    assert len(told) < 20 and all("\n" not in line and len(line) < 200 for line in told)
    assert told[-1].startswith("round 1 of 1: 100/100 done; leading: 42 (50), ")


# --- on an engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    import torch

    from tests.model.reference import perturb

    tokenizer = miniature.tokenizer()
    model = Zaya(miniature.config(max_position_embeddings=1024), seed=0)
    perturb(model, torch.Generator().manual_seed(0))
    with Engine(model, tokenizer, max_running=16, max_waiting=64, cache_bytes=2**24) as one:
        yield one


def is_idle(server, engine) -> bool:
    stats = engine.stats()
    quiet = stats.num_running == stats.num_waiting == 0 and stats.blocks_free == stats.blocks_total
    return quiet and not server.service.jobs and server.service.num_requests == 0


def chat(server, **body) -> httpx.Response:
    return httpx.post(server.url + CHAT, json={"messages": [USER], "seed": 1} | body, timeout=60)


def test_a_run_on_the_engine(serve, engine):
    server = serve(engine=engine)
    before = engine.stats().tokens_generated
    answer = chat(server, rsa=SMALL).json()
    used = engine.stats().tokens_generated - before
    # The token that ends a turn is generated and belongs to no completion.
    assert 0 <= used - answer["usage"]["completion_tokens"] <= 8
    rsa = answer["rsa"]
    assert [one["done"] for one in rsa["rounds"]] == [4, 4] and rsa["config"]["prompt_style"] == "short"
    assert rsa["token_counting"] == "tokenizer" and rsa["tokens"] == answer["usage"]["completion_tokens"]
    assert answer["system_fingerprint"].startswith("weights-") and len(answer["choices"]) == 1
    again = chat(server, rsa=SMALL | {"preset": "light"}).json()
    assert again["choices"][0]["message"] == answer["choices"][0]["message"], "seeds are kept"
    every = chat(server, rsa=SMALL | {"select": "all", "final_n": 3}).json()
    assert [choice["index"] for choice in every["choices"]] == [0, 1, 2]
    text = chat(server, rsa=SMALL, stream=True).text
    assert "round 2 of 2 ended: 4/4 done" in text and text.endswith("data: [DONE]\n\n")
    wait_until(lambda: is_idle(server, engine))
    metrics = httpx.get(server.url + "/metrics").text
    assert 'openzaya_rsa_rollouts_total{status="done"} 31.0' in metrics


def test_presets_fit_a_small_model(serve, engine):
    server = serve(engine=engine)
    answer = chat(server, model="zaya:rsa-light", rsa={"n": 2, "t": 1}, max_tokens=30).json()
    assert answer["model"] == "zaya" and "context" in answer["rsa"]["warnings"][0]
    assert answer["rsa"]["config"]["beta"] < 1024


def test_schema_and_tools_hold_for_the_final_call(serve, engine):
    server = serve(engine=engine)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    wanted = SMALL | {"final_budget": 120, "answer_budget": 60, "select": "all"}
    answer = chat(server, response_format=form, rsa=wanted).json()
    ended = [choice for choice in answer["choices"] if choice["finish_reason"] == "stop"]
    assert ended and all(json.loads(choice["message"]["content"])["a"] in (1, 2) for choice in ended)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = chat(server, tools=[tool], tool_choice="required", parallel_tool_calls=False, rsa=wanted).json()
    called = [choice for choice in answer["choices"] if choice["finish_reason"] == "tool_calls"]
    assert called and all(len(choice["message"]["tool_calls"]) == 1 for choice in called)
    for wrong, text in (
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "schema"),
        ({"response_format": form, "tools": [tool], "tool_choice": "required"}, "exclude"),
        ({"tool_choice": "required"}, "no tools"),
    ):
        refused = chat(server, rsa=SMALL, **wrong)
        assert refused.status_code == 400 and text in refused.json()["error"]["message"]


def test_clients_that_leave_free_all_blocks(serve, engine):
    server = serve(engine=engine)

    async def leave_some() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask(seed: int) -> None:
                wanted = SMALL | {"n": 8, "t": 3, "beta": 200, "final_budget": 200}
                body = {"messages": [USER], "seed": seed, "stream": bool(seed % 2), "rsa": wanted}
                try:
                    async with asyncio.timeout(0.1 + 0.1 * seed), client.stream("POST", CHAT, json=body) as stream:
                        async for _ in stream.aiter_lines():
                            pass
                except TimeoutError:
                    pass

            await asyncio.gather(*(ask(seed) for seed in range(8)))

    asyncio.run(leave_some())
    wait_until(lambda: is_idle(server, engine))


LONG = SMALL | {"n": 32, "t": 8, "beta": 300, "final_budget": 300}


def test_only_so_many_run_at_a_time(serve, engine):
    server = serve(engine=engine, rsa_max_running=1)
    with httpx.stream("POST", server.url + CHAT, json={"messages": [USER], "rsa": LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        busy = chat(server, rsa=SMALL)
        assert busy.status_code == 429 and busy.headers["retry-after"] == "5"
    wait_until(lambda: is_idle(server, engine))
    assert chat(server, rsa=SMALL).status_code == 200


def test_a_run_that_takes_too_long(serve, engine):
    server = serve(engine=engine, rsa_timeout_s=0.3)
    late = chat(server, rsa=LONG)
    assert late.status_code == 408 and late.headers["x-should-retry"] == "false"
    wait_until(lambda: is_idle(server, engine))


def test_a_server_that_stops_ends_its_runs(serve, engine):
    server = serve(engine=engine)
    with httpx.stream("POST", server.url + CHAT, json={"messages": [USER], "rsa": LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.service.fail_all()
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    wait_until(lambda: is_idle(server, engine))


def test_silence_is_filled_with_comments(serve, engine):
    server = serve(engine=engine, keepalive_s=0.01)
    assert ": still working\n\n" in chat(server, rsa=SMALL | {"beta": 200}, stream=True).text
    end_s = time.monotonic() + 5
    while server.service.jobs and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not server.service.jobs


def test_bad_requests_are_refused_over_http(ask):
    for rsa in ("best", {"n": "many"}, {"sampling": 3}, {"sampling": {"temperature": "hot"}}, {"preset": []}, 3, []):
        response = ask("POST", CHAT, json={"messages": [USER], "rsa": rsa})
        assert response.status_code == 400 and response.json()["error"]["message"], rsa
    response = ask("POST", CHAT, json={"model": "other:rsa", "messages": [USER]})
    assert response.status_code == 404
