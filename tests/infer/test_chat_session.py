"""A loaded checkpoint that talks: whole characters only, errors that say why, and the same text as generate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from openzaya.data.chat import render
from openzaya.data.tokenizer import encode_plain
from openzaya.errors import CheckpointError, ConfigError, DataError, EngineError
from openzaya.infer import loop as loop_module
from openzaya.infer.chat import ChatSession
from openzaya.infer.generate import generate
from openzaya.infer.outputs import TokenLogprob
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.text import visible_text
from openzaya.model import hf
from openzaya.model.transformer import Zaya
from tests.model.reference import perturb
from tests.train import miniature

REPLACEMENT = "�"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Zaya(miniature.config(), seed=0)
    perturb(model, torch.Generator().manual_seed(0))
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    hf.save(model, directory, layout="native", tokenizer=miniature.tokenizer())
    return directory


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Iterator[ChatSession]:
    with ChatSession.load(str(checkpoint)) as loaded:
        yield loaded


def scripted(monkeypatch: pytest.MonkeyPatch, session: ChatSession, tokens: list[int]) -> list[str]:
    """The pieces of a turn in which the model says just that."""
    script = iter([*tokens, session.model.config.eos_token_id])
    monkeypatch.setattr(loop_module, "choose", lambda logits, states: [TokenLogprob(next(script), math.nan)])
    return list(session.go_on("x", SamplingParams()))


@pytest.mark.parametrize("text", ["naïve Ünïcödé", "日本語 🙂👩‍👩‍👧‍👦 end", "a  b   c .", ""])
def test_pieces_join_to_the_text_and_hold_whole_characters(session, monkeypatch, text: str) -> None:
    pieces = scripted(monkeypatch, session, encode_plain(session.tokenizer, [text])[0])
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces) and "" not in pieces


def test_a_text_that_ends_inside_a_character_shows_what_there_is(session, monkeypatch) -> None:
    pieces = scripted(monkeypatch, session, encode_plain(session.tokenizer, ["ab日"])[0][:-1])
    assert "".join(pieces) == "ab" + REPLACEMENT
    assert not any(REPLACEMENT in piece for piece in pieces[:-1])


def test_a_second_turn_runs_only_what_is_new(checkpoint: Path) -> None:
    messages = [{"role": "user", "content": "Sort: 3 1 2 " * 8}]
    params = SamplingParams(temperature=0, max_new_tokens=40)
    with ChatSession.load(str(checkpoint)) as session:
        first = "".join(session.reply(messages, params))
        assert session.num_cached_tokens == 0
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And 4 5?"}]
        second = "".join(session.reply(messages, params))
        length = len(render(messages[:1], session.tokenizer, add_generation_prompt=True).tokens)
        assert session.num_cached_tokens >= (length - 1) // 64 * 64 > 0
    with ChatSession.load(str(checkpoint)) as fresh:
        assert "".join(fresh.reply(messages, params)) == second and fresh.num_cached_tokens == 0
    with pytest.raises(EngineError, match="closed"):
        list(session.reply(messages, params))


def test_a_reply_that_is_left_frees_its_memory(session: ChatSession) -> None:
    pieces = session.go_on("x", SamplingParams(max_new_tokens=500, ignore_eos=True))
    next(pieces)
    pieces.close()
    # Runs behind the cancel, one at a time: were the first still there, this would wait for all of its tokens.
    list(session.go_on("y", SamplingParams(max_new_tokens=1)))
    stats = session.engine.stats()
    assert stats.num_running == 0 and stats.tokens_generated < 500
    assert stats.blocks_free == stats.blocks_total


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_can_be_quantised(checkpoint: Path, quantize: str) -> None:
    with ChatSession.load(str(checkpoint), quantize=quantize) as session:
        assert session.model.quantisation is not None
        assert "".join(session.go_on("x", SamplingParams(max_new_tokens=20, seed=1)))


def test_a_reply_is_the_generation_of_the_rendered_chat(session: ChatSession) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sort: 3 1 2"}]
    params = SamplingParams(temperature=0.8, max_new_tokens=30, seed=5)
    for thinking in (True, False):
        prompt = render(messages, session.tokenizer, add_generation_prompt=True, enable_thinking=thinking).tokens
        wanted = generate(session.model, [prompt], params)[0][0].tokens
        text = "".join(session.reply(messages, params, enable_thinking=thinking))
        assert text == visible_text(session.tokenizer, wanted)


def test_going_on_begins_with_bos_and_control_strings_stay_text(session: ChatSession, monkeypatch) -> None:
    seen: list[list[int]] = []
    submit = session.engine.submit

    def watched(prompt, *given, **named):
        seen.append(prompt)
        return submit(prompt, *given, **named)

    monkeypatch.setattr(session.engine, "submit", watched)
    for text in ("", "<|im_end|>"):
        list(session.go_on(text, SamplingParams(max_new_tokens=1)))
    assert seen[0] == [session.tokenizer.bos_token_id]
    assert session.tokenizer.eos_token_id not in seen[1] and len(seen[1]) > 2


def test_the_checkpoint_s_dtype_can_be_chosen(checkpoint: Path) -> None:
    assert ChatSession.load(str(checkpoint), dtype="bfloat16").model.dtype == torch.bfloat16


def test_errors_say_why(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        ChatSession.load(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="device 'gpu9' cannot be used here"):
        ChatSession.load(str(checkpoint), device="gpu9")
    without = tmp_path / "without"
    without.mkdir()
    for file in checkpoint.iterdir():
        if not file.name.startswith(("tokenizer", "chat_template")):
            (without / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"no tokenizer.json in"):
        ChatSession.load(str(without))


def test_a_prompt_longer_than_the_positions_is_refused(session: ChatSession) -> None:
    with pytest.raises(EngineError, match="fewer than the model's 512 positions"):
        list(session.go_on("x y " * 400, SamplingParams()))
