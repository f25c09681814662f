"""A loaded checkpoint that talks: whole characters only, errors that say why, and the same text as generate."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from openzaya.data.chat import render
from openzaya.data.tokenizer import encode_plain
from openzaya.errors import CheckpointError, ConfigError, DataError
from openzaya.infer import chat as chat_module
from openzaya.infer.chat import ChatSession
from openzaya.infer.generate import generate
from openzaya.infer.sampling import SamplingParams
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
def session(checkpoint: Path) -> ChatSession:
    return ChatSession.load(str(checkpoint))


def scripted(monkeypatch: pytest.MonkeyPatch, session: ChatSession, tokens: list[int]) -> list[str]:
    monkeypatch.setattr(chat_module, "stream", lambda model, prompt, params: iter(tokens))
    return list(session.go_on("x", SamplingParams()))


@pytest.mark.parametrize(
    "text", ["plain", "naïve Ünïcödé", "日本語 テキスト", "🙂👩‍👩‍👧‍👦 end", "a  b   c .", "1 , 2 !", ""]
)
def test_pieces_join_to_the_text_and_hold_whole_characters(session, monkeypatch, text: str) -> None:
    tokens = encode_plain(session.tokenizer, [text])[0]
    pieces = scripted(monkeypatch, session, tokens)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)
    for piece in pieces:
        piece.encode("utf-8")


def test_a_text_that_ends_inside_a_character_shows_what_there_is(session, monkeypatch) -> None:
    tokens = encode_plain(session.tokenizer, ["ab日"])[0]
    pieces = scripted(monkeypatch, session, tokens[:-1])
    assert "".join(pieces) == "ab" + REPLACEMENT
    assert not any(REPLACEMENT in piece for piece in pieces[:-1])


def test_a_replacement_character_of_the_model_s_own_is_shown(session, monkeypatch) -> None:
    tokens = encode_plain(session.tokenizer, [f"a{REPLACEMENT}b"])[0]
    assert "".join(scripted(monkeypatch, session, tokens)) == f"a{REPLACEMENT}b"


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_show_each_character_once(session, monkeypatch, seed: int) -> None:
    draw = random.Random(seed)
    tokens = [draw.randrange(11, len(session.tokenizer)) for _ in range(60)]
    pieces = scripted(monkeypatch, session, tokens)
    assert "".join(pieces) == session.tokenizer.decode(tokens)


def test_a_reply_is_the_generation_of_the_rendered_chat(session: ChatSession) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sort: 3 1 2"}]
    params = SamplingParams(temperature=0.8, max_new_tokens=30, seed=5)
    for thinking in (True, False):
        prompt = render(messages, session.tokenizer, add_generation_prompt=True, enable_thinking=thinking).tokens
        wanted = generate(session.model, [prompt], params)[0][0].tokens
        text = "".join(session.reply(messages, params, enable_thinking=thinking))
        assert text == session.tokenizer.decode(wanted)


def test_going_on_begins_with_bos_and_control_strings_stay_text(session: ChatSession, monkeypatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(chat_module, "stream", lambda model, prompt, params: seen.append(prompt) or iter([]))
    list(session.go_on("", SamplingParams()))
    list(session.go_on("<|im_end|>", SamplingParams()))
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
    with pytest.raises(DataError, match="fewer than the model's 512 positions"):
        list(session.go_on("x y " * 400, SamplingParams()))
