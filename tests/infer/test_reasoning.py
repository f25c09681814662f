"""Splitting reasoning from the answer: every tag may be cut anywhere, and no character is lost or given twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.infer.reasoning import Piece, ReasoningSplitter, partial_tag_length, split_reasoning


def streamed(pieces: list[str], starts_inside: bool = False, enabled: bool = True) -> tuple[str, str, list[str]]:
    """Reasoning, content and the order of kinds."""
    splitter = ReasoningSplitter(starts_inside, enabled)
    out: list[Piece] = []
    for piece in pieces:
        fed = splitter.feed(piece)
        assert [one.kind for one in fed] in ([], ["reasoning"], ["content"], ["reasoning", "content"])
        out += fed
    out += splitter.finish()
    assert splitter.finish() == []
    assert all(piece.text for piece in out)
    texts = {kind: "".join(piece.text for piece in out if piece.kind == kind) for kind in ("reasoning", "content")}
    kinds = [piece.kind for piece in out]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes first"
    return texts["reasoning"], texts["content"], kinds


CASES = [
    # text, starts_inside, enabled, reasoning, content
    ("<think>a b</think>c", False, True, "a b", "c"),
    ("<think>\na\n\nb\n</think>\n\nc\n", False, True, "a\n\nb", "c\n"),
    (" \n<think>a</think>  c", False, True, "a", "  c"),
    ("<think></think>c", False, True, "", "c"),
    ("<think>\n\n</think>\n\nc", False, True, "", "c"),
    ("a</think>c", True, True, "a", "c"),
    ("\n\na\n</think>\nc", True, True, "a", "c"),
    ("no block", False, True, "", "no block"),
    ("\n  code", False, True, "", "\n  code"),
    ("<thin", False, True, "", "<thin"),
    ("< think>a", False, True, "", "< think>a"),
    ("  ", False, True, "", "  "),
    ("", False, True, "", ""),
    ("", True, True, "", ""),
    ("<think>never closed\n", False, True, "never closed\n", ""),
    ("<think>never closed</thin", False, True, "never closed</thin", ""),
    ("<think>a <think> b</think>c", False, True, "a <think> b", "c"),
    ("<think>a</think>b<think>c</think>d", False, True, "a", "b<think>c</think>d"),
    ("<think>a</think></think>b", False, True, "a", "</think>b"),
    ("a</think>b", False, True, "", "a</think>b"),
    ("<think>a</think>b", False, False, "", "<think>a</think>b"),
    ("\n<think>a", True, False, "", "\n<think>a"),
    ("<think><</</t</thin</thinkk></think>x", False, True, "<</</t</thin</thinkk>", "x"),
]


@pytest.mark.parametrize(("text", "starts_inside", "enabled", "reasoning", "content"), CASES)
def test_any_cut_gives_the_same(text: str, starts_inside: bool, enabled: bool, reasoning: str, content: str) -> None:
    assert split_reasoning(text, starts_inside, enabled) == (reasoning, content)
    assert streamed(list(text), starts_inside, enabled)[:2] == (reasoning, content)
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], "", text[cut:]], starts_inside, enabled)[:2] == (reasoning, content)


scraps = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "<", ">", "\n", " ", "a", "é", "</think"]), max_size=12
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(scraps, st.booleans(), st.booleans())
def test_pieces_do_not_matter_and_nothing_is_lost(pieces: list[str], starts_inside: bool, enabled: bool) -> None:
    reasoning, content, _ = streamed(pieces, starts_inside, enabled)
    assert (reasoning, content) == plainly("".join(pieces), starts_inside, enabled)


def plainly(text: str, starts_inside: bool, enabled: bool) -> tuple[str, str]:
    """The same rules for a whole text."""
    if not enabled or not (starts_inside or text.lstrip().startswith("<think>")):
        return "", text
    inside = text if starts_inside else text.lstrip().removeprefix("<think>")
    reasoning, tag, content = inside.partition("</think>")
    reasoning = reasoning.lstrip("\r\n")
    return (reasoning.rstrip("\r\n"), content.lstrip("\r\n")) if tag else (reasoning, content)


def test_text_is_not_held_back_longer_than_needed() -> None:
    splitter = ReasoningSplitter()
    assert splitter.feed("<think>a") == [Piece("reasoning", "a")]
    assert splitter.feed(" b<") == [Piece("reasoning", " b")]
    assert splitter.is_reasoning
    assert splitter.feed("c") == [Piece("reasoning", "<c")]
    assert splitter.feed("</think>d") == [Piece("content", "d")]
    assert not splitter.is_reasoning
    assert splitter.feed("<") == [Piece("content", "<")]


def test_the_prompt_says_where_the_text_begins() -> None:
    header = "<|im_start|>assistant\n"
    assert streamed_after(header, "<think>a</think>b") == ("a", "b")
    assert streamed_after(header + "<think>\n", "a</think>b") == ("a", "b")
    assert streamed_after(header + "<think></think>", "<think>b") == ("", "<think>b")


def streamed_after(prompt: str, text: str) -> tuple[str, str]:
    splitter = ReasoningSplitter.after_prompt(prompt)
    pieces = splitter.feed(text) + splitter.finish()
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    return reasoning, "".join(piece.text for piece in pieces if piece.kind == "content")


def test_partial_tag_length() -> None:
    assert partial_tag_length("ab</th", "</think>") == 4
    assert partial_tag_length("<</", "</think>") == 2
    assert partial_tag_length("</think>", "</think>") == 0
    assert partial_tag_length("", "</think>") == 0
