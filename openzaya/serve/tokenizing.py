"""/tokenize and /detokenize: what the model sees of a text or a conversation, and back."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from openzaya.data.chat import render
from openzaya.data.tokenizer import encode_plain
from openzaya.serve.errors import bad_request
from openzaya.serve.jobs import Service
from openzaya.serve.messages import plain_messages
from openzaya.serve.schemas import DetokenizeRequest, TokenizeRequest


async def tokenize(service: Service, body: TokenizeRequest) -> Response:
    """Token ids; a conversation is rendered as chat completions renders it."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.messages is not None:
        messages = plain_messages(body.messages)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        settings: dict[str, Any] = {
            "add_generation_prompt": body.add_generation_prompt,
            "enable_thinking": body.enable_thinking,
        }
        rendered = await service.in_worker(lambda: render(messages, service.tokenizer, tools=tools or None, **settings))
        tokens = rendered.tokens
    else:
        bos = service.tokenizer.bos_token_id
        tokens = [] if bos is None or not body.add_special_tokens else [bos]
        tokens += (await service.in_worker(encode_plain, service.tokenizer, [body.prompt or ""]))[0]
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": service.context}
    if body.return_token_strs:
        answer["token_strs"] = [service.token_texts.text_of(token) for token in tokens]
    return JSONResponse(answer)


async def detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """Text of token ids, control tokens included."""
    service.check_model(body.model)
    vocabulary = service.engine.config.vocab_size
    if body.tokens and max(body.tokens) >= vocabulary:
        raise bad_request(f"tokens: {max(body.tokens)} is beyond the vocabulary of {vocabulary}", "tokens")

    def decoded() -> str:
        return str(service.tokenizer.decode(body.tokens, skip_special_tokens=False))

    return JSONResponse({"prompt": await service.in_worker(decoded)})
