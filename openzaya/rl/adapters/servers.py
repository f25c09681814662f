"""What rollout servers are asked and how they answer: SGLang's own interface, and completions in OpenAI's form.

    SGLang        POST /generate with input_ids and return_logprob; POST /update_weights_from_disk
    completions   POST /v1/completions with token ids, ``logprobs`` and ``return_token_ids``; ours adds the experts and
                  the token that ended a completion, which is not part of it

A rollout needs the log probability of every token that the policy chose, the one that ends it included. A server that
leaves it out is refused: the policy would never learn when to stop.
"""

from __future__ import annotations

import base64
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import numpy as np

from openzaya.errors import ConfigError, TrainingError
from openzaya.infer.outputs import Completion, TokenLogprob
from openzaya.infer.text import visible_text
from openzaya.rl.rollout import Order, RolloutConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOO_BUSY = (408, 409, 425, 429)
"""Refusals that pass."""
LARGEST_SEED = 1 << 31
CONNECT_LIMIT_S = 30.0
ANSWER_LIMIT_S = 4 * 3600.0
"""Rollouts come as a whole, behind all that the server has to do before. A server that hangs is noticed after that."""
LOAD_LIMIT_S = 600.0
KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6))
"""A server whose machine or network is gone is noticed within minutes, while it is waited for."""


class Refused(TrainingError):
    """A server's answer that will not change."""


class LostWeights(Exception):
    """A server answered with weights of its own, not with those that it was given: it has been started anew."""


def make_client(answer_limit_s: float, max_connections: int | None = None) -> httpx.Client:
    """Connections to rollout servers, without a proxy; no answer for ``answer_limit_s`` is an ``httpx.ReadTimeout``."""
    options: list[tuple[int, int, int]] = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in KEEPALIVE:
        if hasattr(socket, name):  # not every system has all of them
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    transport = httpx.HTTPTransport(limits=httpx.Limits(max_connections=max_connections), socket_options=options)
    return httpx.Client(transport=transport, timeout=httpx.Timeout(CONNECT_LIMIT_S, read=answer_limit_s))


class Server(Protocol):
    """One rollout server."""

    url: str
    takes_weights: bool
    returns_experts: bool

    def sample(
        self, prompt: list[int], order: Order, config: RolloutConfig
    ) -> tuple[list[Completion], list[int | None]]:
        """The order's completions, and the learner step whose weights made each, where the server knows.

        Raises:
            Refused: asking again is of no use.
            LostWeights: it has to load weights first.
            httpx.HTTPError: asking again may be of use.
        """

    def load_weights(self, path: Path, step: int) -> None:
        """Take the checkpoint at ``path``, which is that of learner step ``step``.

        Raises:
            Refused, httpx.HTTPError: as :meth:`sample`.
        """


def find_server(client: httpx.Client, url: str, tokenizer: PreTrainedTokenizerFast) -> Server:
    """The kind of server that answers at ``url``.

    Raises:
        ConfigError: no such URL, or a server of neither kind.
        TrainingError: nothing answers.
    """
    base = url.rstrip("/").removesuffix("/v1")
    try:
        if _is_object(client.get(f"{base}/get_model_info", timeout=CONNECT_LIMIT_S), "model_path"):
            return SGLangServer(client, base, tokenizer)
        models = client.get(f"{base}/v1/models", timeout=CONNECT_LIMIT_S)
        if _is_object(models, "data") and models.json()["data"]:
            first = models.json()["data"][0]
            return CompletionsServer(client, base, tokenizer, first["id"], first.get("owned_by") == "openzaya")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"pipeline.endpoints: '{url}' is no URL ({error}); give http://host:port") from None
    except httpx.HTTPError as error:
        raise TrainingError(
            f"no rollout server answers at {url} ({type(error).__name__}: {error}); start it, or correct "
            "pipeline.endpoints"
        ) from None
    raise ConfigError(f"{url} is neither SGLang nor a server of completions; correct pipeline.endpoints")


class SGLangServer:
    """SGLang's own interface."""

    takes_weights, returns_experts = True, False

    def __init__(self, client: httpx.Client, base: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self._client, self.url, self._tokenizer = client, base, tokenizer

    def sample(
        self, prompt: list[int], order: Order, config: RolloutConfig
    ) -> tuple[list[Completion], list[int | None]]:
        # One prompt for each candidate: with its own seed, which n candidates of one prompt would share.
        num = order.num_rollouts
        settings = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "max_new_tokens": config.max_new_tokens}
        params = [settings | {"sampling_seed": (order.seed + index) % LARGEST_SEED} for index in range(num)]
        body = {"input_ids": [prompt] * num, "sampling_params": params, "return_logprob": True, "logprob_start_len": -1}
        replies = _post(self._client, f"{self.url}/generate", body)
        if not isinstance(replies, list) or len(replies) != num:
            raise Refused(f"{self.url} returned {_short(replies)}, expected {num} completions")
        read = [self._read(index, reply, len(prompt), config) for index, reply in enumerate(replies)]
        return [completion for completion, _ in read], [step for _, step in read]

    def _read(
        self, index: int, reply: dict[str, Any], num_prompt_tokens: int, config: RolloutConfig
    ) -> tuple[Completion, int | None]:
        try:
            meta = reply["meta_info"]
            reason = meta["finish_reason"]["type"]
            chosen = [TokenLogprob(int(token), float(logprob)) for logprob, token, *_ in meta["output_token_logprobs"]]
        except (KeyError, TypeError, ValueError):
            raise Refused(f"{self.url} returned no log probabilities: {_short(reply)}") from None
        if reason == "abort":
            # Other weights were loaded meanwhile, or the server is ending: asked again, as any other failure.
            raise httpx.ReadError("the server gave up the request")
        version = meta.get("weight_version")
        if version is not None and not str(version).isdecimal():
            # Weights that the learner publishes have their step's number.
            raise LostWeights(f"it answers with weights '{version}' in place of those that were published")
        completion = _completion(index, chosen, reason, self._tokenizer, self.url)
        return completion, None if version is None else int(version)

    def load_weights(self, path: Path, step: int) -> None:
        body = {"model_path": str(path.resolve()), "weight_version": str(step)}
        # Not over the connections of rollouts, all of which may be taken for long.
        with make_client(LOAD_LIMIT_S) as client:
            reply = _post(client, f"{self.url}/update_weights_from_disk", body)
        if not (isinstance(reply, dict) and reply.get("success")):
            raise Refused(f"{self.url} did not load {path}: {_short(reply)}; does it see that directory?")


class CompletionsServer:
    """Completions in OpenAI's form, with token ids (ours, vLLM)."""

    takes_weights = False

    def __init__(
        self, client: httpx.Client, base: str, tokenizer: PreTrainedTokenizerFast, model: str, is_ours: bool
    ) -> None:
        self._client, self.url, self._tokenizer = client, base, tokenizer
        self._model, self.returns_experts = model, is_ours

    def sample(
        self, prompt: list[int], order: Order, config: RolloutConfig
    ) -> tuple[list[Completion], list[int | None]]:
        body = {
            "model": self._model,
            "prompt": prompt,
            "n": order.num_rollouts,
            "max_tokens": config.max_new_tokens,
            "temperature": 1,
            "top_p": 1,
            "logprobs": 0,
            "seed": order.seed,
            "return_token_ids": True,
            "return_experts": config.replay_experts,
        }
        reply = _post(self._client, f"{self.url}/v1/completions", body)
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or len(choices) != order.num_rollouts:
            raise Refused(f"{self.url} returned {_short(reply)}, expected {order.num_rollouts} choices")
        choices = sorted(choices, key=lambda choice: choice["index"])
        return [self._read(choice) for choice in choices], [None] * len(choices)

    def _read(self, choice: dict[str, Any]) -> Completion:
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if tokens is None or logprobs is None or len(tokens) != len(logprobs):
            raise Refused(f"{self.url} returned no token ids with log probabilities: {_short(choice)}")
        chosen = [TokenLogprob(int(token), float(one)) for token, one in zip(tokens, logprobs, strict=True)]
        end = choice.get("end_token")
        if end is not None:
            chosen.append(TokenLogprob(int(end["id"]), float(end["logprob"])))
        completion = _completion(choice["index"], chosen, choice["finish_reason"], self._tokenizer, self.url)
        experts = choice.get("experts")
        if experts is not None:
            flat = np.frombuffer(base64.b64decode(experts["data"]), dtype=np.uint8)
            completion.experts = flat.reshape(experts["shape"]).copy()
        return completion

    def load_weights(self, path: Path, step: int) -> None:
        raise Refused(f"{self.url} takes no weights while it runs")


def _completion(
    index: int, chosen: list[TokenLogprob], reason: str, tokenizer: PreTrainedTokenizerFast, url: str
) -> Completion:
    """A completion of all tokens that were sampled, that which ended it last."""
    end = None
    if reason == "stop":
        if not chosen or chosen[-1].token != tokenizer.eos_token_id:
            raise Refused(
                f"{url} does not return the log probability of the token that ends a completion; use SGLang, "
                "openzaya serve, or rollout processes"
            )
        end = chosen.pop()
    elif reason != "length":
        raise httpx.ReadError(f"a completion ended with '{reason}'")
    tokens = [entry.token for entry in chosen]
    return Completion(
        index=index,
        tokens=tokens,
        text=visible_text(tokenizer, tokens),
        finish_reason="stop" if reason == "stop" else "length",
        logprobs=chosen,
        versions=[0] * len(tokens),
        end_token=end,
    )


def _post(client: httpx.Client, url: str, body: dict[str, Any]) -> Any:
    """The JSON of an answer. Raises :class:`Refused`, or an ``httpx.HTTPError`` where trying again may help."""
    response = client.post(url, json=body)
    if response.status_code in TOO_BUSY or response.status_code >= 500:
        raise httpx.HTTPStatusError(f"HTTP {response.status_code}", request=response.request, response=response)
    try:
        reply = response.json()
    except ValueError:
        reply = response.text
    if response.status_code != 200:
        raise Refused(f"{url} answered HTTP {response.status_code}: {_short(reply)}")
    return reply


def _is_object(response: httpx.Response, key: str) -> bool:
    try:
        return response.status_code == 200 and key in response.json()
    except (ValueError, TypeError):
        return False


def _short(reply: Any) -> str:
    text = str(reply)
    return text if len(text) <= 300 else text[:300] + "…"
