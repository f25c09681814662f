"""An OpenAI-compatible endpoint that answers by a script: for tests of test-time compute, in process or as a server.

What it writes is in scripted_model.py, a function of the conversation, the seed and the settings (`Script`).
``max_tokens`` and usage count tokens of its small tokenizer. Faults are drawn by a hash of the request and its attempt:
a call that is retried often enough succeeds, and a run of the same calls meets the same faults.

In process:   endpoint = ScriptedEndpoint(Script(fail=0.2)); client = endpoint.client()     (an httpx.AsyncClient)
As a server:  python -m tests.ttc.scripted_endpoint --port 0 --fail 0.2     prints {"url": ...}, then serves;
              with serving(fail=0.2) as url: ...                            the same from a test
GET /stats gives counts and sums, GET /requests one record a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.ttc.scripted_model import Script, cut, hash_of, num_tokens, piece_of, render, small_tokenizer, write


class Dropped(Exception):
    """The connection is to break."""


class Drop(Response):
    """Begins an answer and breaks the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"choices"', "more_body": True})
        raise Dropped


@dataclass
class ScriptedEndpoint:
    """The server; ``app`` is the ASGI application."""

    script: Script = field(default_factory=Script)
    requests: list[dict[str, Any]] = field(default_factory=list)
    """One record a request to a generating path, in order of arrival."""
    counts: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    max_in_flight: int = 0
    _attempts: Counter[str] = field(default_factory=Counter)
    _draws: int = 0

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._generate, methods=["POST"]),
                Route("/v1/completions", self._generate, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/apply-template", self._apply_template, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
                Route("/stats", self._stats),
                Route("/requests", self._requests),
            ]
        )

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=_InProcess(self.app), base_url="http://scripted", timeout=None, trust_env=False
        )

    def stats(self) -> dict[str, Any]:
        """Counts of requests and sums of the usage that was delivered."""
        sums: Counter[str] = Counter()
        for record in self.requests:
            sums.update(record["usage"] or {})
        return {
            "requests": len(self.requests),
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            **{name: self.counts[name] for name in ("done", "failed", "hung", "left", "refused", "tokenize")},
            **{name: sums[name] for name in ("prompt_tokens", "completion_tokens", "reasoning_tokens")},
        }

    # --- requests ------------------------------------------------------------------------------------

    def _refused(self, request: Request) -> Response | None:
        if self.script.api_key and request.headers.get("authorization") != f"Bearer {self.script.api_key}":
            self.counts["refused"] += 1
            return _error(401, "wrong key " + request.headers.get("authorization", ""))
        return None

    async def _models(self, request: Request) -> Response:
        one = {"id": self.script.model, "object": "model", "max_model_len": self.script.max_model_len}
        return self._refused(request) or JSONResponse({"object": "list", "data": [one]})

    async def _stats(self, request: Request) -> Response:
        return JSONResponse(self.stats() | {"script": asdict(self.script)})

    async def _requests(self, request: Request) -> Response:
        return JSONResponse(self.requests)

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        self.counts["tokenize"] += 1
        if self.script.tokenize == "none":
            return _error(404, "not found")
        if self.script.tokenize == "llama":
            if "content" not in body:
                return _error(400, "content is missing")
            encoding = small_tokenizer().encode(body["content"], add_special_tokens=False)
            if not body.get("with_pieces"):
                return JSONResponse({"tokens": encoding.ids})
            return JSONResponse({"tokens": [{"id": token, "piece": piece_of(token)} for token in encoding.ids]})
        if "messages" in body:
            text = render(body["messages"], body.get("tools"))
        elif "prompt" in body:
            text = body["prompt"]
        else:
            return _error(400, "prompt is missing")
        ids = small_tokenizer().encode(text, add_special_tokens=False).ids
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.script.max_model_len})

    async def _apply_template(self, request: Request) -> Response:
        body = await request.json()
        if self.script.tokenize != "llama":
            return _error(404, "not found")
        return JSONResponse({"prompt": render(body["messages"], body.get("tools"))})

    async def _detokenize(self, request: Request) -> Response:
        body = await request.json()
        if self.script.tokenize == "none":
            return _error(404, "not found")
        text = small_tokenizer().decode(body["tokens"], skip_special_tokens=False)
        return JSONResponse({"content" if self.script.tokenize == "llama" else "prompt": text})

    async def _generate(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        body = await request.json()
        digest = hash_of(body)
        record = {
            "digest": digest,
            "body": body,
            "path": request.url.path,
            "state": "open",
            "usage": None,
            "text": None,
        }
        self.requests.append(record)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            return await self._answered(request, body, record)
        except asyncio.CancelledError:
            self._close(record, "left")
            raise
        finally:
            if record["state"] == "open":
                self._close(record, "failed")
            self.in_flight -= 1

    def _close(self, record: dict[str, Any], state: str) -> None:
        record["state"] = state
        self.counts[state] += 1

    async def _answered(self, request: Request, body: dict[str, Any], record: dict[str, Any]) -> Response:
        fault = self._fault(record["digest"])
        if fault == "hang":
            while not await request.is_disconnected():
                await asyncio.sleep(0.05)
            self._close(record, "hung")
            return Response(status_code=499)
        if self.script.latency_s:
            await asyncio.sleep(self.script.latency_s)
        if fault in ("500", "429"):
            headers = {"Retry-After": "0"} if fault == "429" else {}
            return _error(int(fault), "planned failure", headers)
        if fault == "drop":
            return Drop()
        if fault == "garbage":
            return Response('{"choices": [{"mess', media_type="application/json")
        if fault == "empty":
            return JSONResponse({"choices": []})
        if await request.is_disconnected():
            self._close(record, "left")
            return Response(status_code=499)
        try:
            answer = self._answer(body, is_chat=request.url.path.endswith("chat/completions"))
        except ValueError as error:
            self._close(record, "refused")
            return _error(400, str(error))
        record["usage"] = _flat(answer["usage"])
        record["text"] = [choice.get("message", choice) for choice in answer["choices"]]
        self._close(record, "done")
        if not self.script.usage:
            del answer["usage"]
        if body.get("stream"):
            return StreamingResponse(_chunks(answer), media_type="text/event-stream")
        return JSONResponse(answer)

    def _fault(self, digest: str) -> str | None:
        attempt = self._attempts[digest]
        self._attempts[digest] += 1
        draw = hash_of("fault", self.script.fault_seed, digest, attempt)
        place = int(draw[:8], 16) / 0xFFFFFFFF
        if place < self.script.hang:
            return "hang"
        if place < self.script.hang + self.script.fail:
            kinds = self.script.faults.split(",")
            return kinds[int(draw[8:16], 16) % len(kinds)]
        return None

    def _answer(self, body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
        prompt = self._prompt(body, is_chat)
        num_prompt = num_tokens(prompt)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 10_000
        if num_prompt + limit > self.script.max_model_len:
            raise ValueError(f"{num_prompt} + {limit} tokens are above the context of {self.script.max_model_len}")
        seed = body.get("seed") if self.script.honours_seed else None
        if seed is None:
            self._draws += 1
            seed = -self._draws
        budget = body.get(self.script.thinking_field) if self.script.thinking_field else None
        choices, generated, reasoned = [], 0, 0
        for index in range(body.get("n", 1) if self.script.n else 1):
            choice, counts = self._choice(body, prompt, seed + index, limit, budget, is_chat)
            choices.append(choice | {"index": index})
            generated, reasoned = generated + counts[0], reasoned + counts[1]
        usage = {"prompt_tokens": num_prompt, "completion_tokens": generated, "total_tokens": num_prompt + generated}
        usage["prompt_tokens_details"] = {"cached_tokens": 0}
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoned}
        kind = "chat.completion" if is_chat else "text_completion"
        return {"id": "x", "object": kind, "model": self.script.model, "choices": choices, "usage": usage}

    def _prompt(self, body: dict[str, Any], is_chat: bool) -> str:
        if not is_chat:
            if not self.script.completions:
                raise ValueError("completions are not served")
            prompt = body["prompt"]
            return prompt if isinstance(prompt, str) else small_tokenizer().decode(prompt, skip_special_tokens=False)
        messages = body["messages"]
        if not messages:
            raise ValueError("messages is empty")
        tools = body.get("tools")
        if messages[-1]["role"] != "assistant":
            return render(messages, tools) + ("<think>\n" if self.script.opened else "")
        if self.script.continues == "refuse":
            raise ValueError("assistant prefill is not possible")
        wanted = self.script.continues == "assistant" or (
            self.script.continues == "continue_final_message" and body.get("continue_final_message")
        )
        if wanted:
            return render(messages[:-1], tools) + str(messages[-1].get("content") or "")
        return render(messages, tools)

    def _choice(
        self, body: dict[str, Any], prompt: str, seed: int, limit: int, budget: int | None, is_chat: bool
    ) -> tuple[dict[str, Any], tuple[int, int]]:
        started = prompt.rpartition("<|im_start|>assistant\n")[2]
        choice = body.get("tool_choice")
        forced = choice == "required" or isinstance(choice, dict)
        wants_json = (body.get("response_format") or {}).get("type", "text") != "text"
        reasoning, answer = write(prompt, seed, self.script, budget, wants_json)
        opening = "" if "<think>" in started or not reasoning else "<think>\n"
        closing = "" if "</think>" in started or self.script.reasoning == "none" else "\n</think>\n\n"
        whole = opening + reasoning + closing + answer
        text, generated = cut(whole, limit)
        finish = "stop" if text == whole else "length"
        num_before = num_tokens(opening + reasoning + closing)
        counts = generated, min(generated, num_before)
        if not is_chat:
            return {"text": text, "finish_reason": finish, "logprobs": None}, counts
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.script.reasoning not in ("inline", "none"):
            head, closed, tail = text.removeprefix(opening).partition(closing or "\0")
            inside = bool(closing)
            # Like a reasoning parser: what follows an open block is reasoning until its end.
            message[self.script.reasoning] = head if inside else None
            message["content"] = (tail or None) if inside else text
            if inside and not closed:
                message["content"] = None
        if forced and finish == "stop":
            name = body["tools"][0]["function"]["name"] if not isinstance(choice, dict) else choice["function"]["name"]
            function = {"name": name, "arguments": json.dumps({"value": answer})}
            message["tool_calls"] = [{"id": f"call_{seed}", "type": "function", "function": function}]
            message["content"], finish = None, "tool_calls"
        return {"message": message, "finish_reason": finish}, counts


def _flat(usage: dict[str, Any]) -> dict[str, int]:
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
    }


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


async def _chunks(answer: dict[str, Any]) -> AsyncIterator[str]:
    """A whole answer as a stream: one piece of each text in four, then the finish reason, then usage."""
    head = {"id": answer["id"], "object": answer["object"] + ".chunk", "model": answer["model"]}

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

    for choice in answer["choices"]:
        index, message = choice["index"], choice.get("message")
        for name, text in (message or {"text": choice.get("text")}).items():
            for start in range(0, len(text), 40) if isinstance(text, str) and name != "role" else ():
                piece = {name: text[start : start + 40]}
                yield event([{"index": index, "finish_reason": None} | ({"delta": piece} if message else piece)])
                await asyncio.sleep(0)
        calls = [{"index": i, **call} for i, call in enumerate((message or {}).get("tool_calls", []))]
        last: dict[str, Any] = {"delta": {"tool_calls": calls} if calls else {}} if message else {"text": ""}
        yield event([{"index": index, "finish_reason": choice["finish_reason"], **last}])
    if "usage" in answer:
        yield event([], usage=answer["usage"])
    yield "data: [DONE]\n\n"


class _InProcess(httpx.ASGITransport):
    """The application without a network; a dropped connection is seen as over one."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except Dropped:
            raise httpx.RemoteProtocolError("the endpoint closed the connection", request=request) from None


@contextmanager
def serving(**settings: Any) -> Iterator[str]:
    """A server process with these settings of `Script`; gives its URL, and ends it afterwards."""
    options = [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]
    command = [sys.executable, "-m", "tests.ttc.scripted_endpoint", "--port", "0", *options]
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def main() -> None:
    """Serve on 127.0.0.1; a port of 0 takes a free one."""
    import uvicorn

    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible endpoint for tests")
    parser.add_argument("--port", type=int, default=0)
    defaults = Script()
    for one in fields(Script):
        default = getattr(defaults, one.name)
        kind = (lambda text: text in ("1", "true", "True")) if isinstance(default, bool) else type(default)
        parser.add_argument("--" + one.name.replace("_", "-"), type=kind, default=default)
    values = vars(parser.parse_args())
    listener = socket.create_server(("127.0.0.1", values.pop("port")))
    endpoint = ScriptedEndpoint(Script(**values))
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
    config = uvicorn.Config(endpoint.app, log_level="critical", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
