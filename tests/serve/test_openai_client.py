"""The official client against a server on a port: nothing about it is changed but the address."""

from __future__ import annotations

import asyncio

import openai
import pytest

USER = {"role": "user", "content": "Hello"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = "<zyphra_tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</zyphra_tool_call>"


@pytest.fixture
def client_of():
    return lambda server, **settings: openai.OpenAI(
        base_url=server.url + "/v1", api_key="s3cret", **({"max_retries": 0} | settings)
    )


def test_models(serve, client_of):
    client = client_of(serve(api_key="s3cret", model_names=("zaya", "owner/zaya")))
    assert [model.id for model in client.models.list()] == ["zaya", "owner/zaya"]
    assert client.models.retrieve("owner/zaya").id == "owner/zaya"


def test_chat(serve, client_of):
    client = client_of(serve())
    answer = client.chat.completions.create(model="zaya", messages=[USER], logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == "Fine."
    assert answer.choices[0].message.reasoning_content == "so so"
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5


def test_chat_stream(serve, client_of):
    client = client_of(serve())
    stream = client.chat.completions.create(
        model="zaya", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Fine."
    assert chunks[-1].usage.total_tokens > 0


def test_chat_stream_helper_gathers_calls(serve, client_of):
    client = client_of(serve(f"<think>so</think>Wait.\n{CALL}"))
    with client.chat.completions.stream(model="zaya", messages=[USER], tools=[TOOL]) as stream:
        final = [event for event in stream][-1] and stream.get_final_completion()
    choice = final.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Wait."
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}'


def test_a_parsed_answer(serve, client_of):
    from pydantic import BaseModel

    class Reply(BaseModel):
        value: int

    server = serve('<think></think>{"value": 5}')
    answer = client_of(server).chat.completions.parse(model="zaya", messages=[USER], response_format=Reply)
    assert answer.choices[0].message.parsed == Reply(value=5)
    assert server.engine.calls[0].params.json_schema["properties"]["value"]["type"] == "integer"


def test_a_round_with_a_tool(serve, client_of):
    server = serve(lambda prompt, params, index: "It is sunny." if len(server.engine.calls) > 1 else CALL)
    client = client_of(server)
    messages = [USER]
    first = client.chat.completions.create(model="zaya", messages=messages, tools=[TOOL]).choices[0].message
    messages += [first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}]
    second = client.chat.completions.create(model="zaya", messages=messages, tools=[TOOL])
    assert second.choices[0].message.content == "It is sunny."


def test_completions(serve, client_of):
    client = client_of(serve("and so on"))
    answer = client.completions.create(model="zaya", prompt=["a", "b"], logprobs=1, echo=False)
    assert [choice.text for choice in answer.choices] == ["and so on"] * 2
    stream = client.completions.create(model="zaya", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "and so on"


def test_responses(serve, client_of):
    client = client_of(serve())
    answer = client.responses.create(model="zaya", input="Hello", reasoning={"effort": "low"})
    assert answer.output_text == "Fine." and answer.output[0].content[0].text == "so so"


def test_responses_stream_helper(serve, client_of):
    client = client_of(serve(f"<think>so</think>Wait.\n{CALL}"))
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
    with client.responses.stream(model="zaya", input="Hello", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.reasoning_text.delta" in kinds and kinds[-1] == "response.completed"
    assert final.output_text == "Wait." and final.output[-1].name == "weather"


def test_errors_have_their_types(serve, client_of):
    server = serve(api_key="s3cret")
    client = client_of(server)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=[USER])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="zaya", messages=[USER], temperature=-1)
    assert bad.value.param == "temperature"
    server.engine.max_waiting = 0
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="zaya", messages=[USER])
    server.engine.max_waiting = 10
    server.engine.breaks_after = 1
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="zaya", messages=[USER], stream=True))


def test_a_request_that_took_too_long_is_not_sent_again(serve, client_of):
    server = serve("word " * 100, pause_s=0.02, request_timeout_s=0.1)
    with pytest.raises(openai.APIStatusError) as late:
        client_of(server, max_retries=2).chat.completions.create(model="zaya", messages=[USER])
    assert late.value.status_code == 408 and len(server.engine.calls) == 1


def test_many_at_once_with_the_asynchronous_client(serve):
    server = serve(lambda prompt, params, index: f"seed {params.seed}", pause_s=0.002)

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:

            async def ask(seed):
                stream = await client.chat.completions.create(model="zaya", messages=[USER], stream=True, seed=seed)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(seed) for seed in range(20)))

    assert asyncio.run(ask_all()) == [f"seed {seed}" for seed in range(20)]


def test_closing_a_stream_ends_the_request(serve, client_of):
    from .conftest import wait_until

    server = serve("word " * 500, pause_s=0.01)
    stream = client_of(server).chat.completions.create(model="zaya", messages=[USER], stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: server.engine.num_running == 0, 3)
