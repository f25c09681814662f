"""The 25 IFEval types against the checkers of lm-eval: every text of a mixed collection, judged by both.

lm-eval cuts sentences with a trained model that is downloaded; without a network its untrained form takes the
place, which knows no abbreviations, so texts without abbreviations are compared. Its words in capitals are
cut without cutting sentences first.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random

import pytest

from openzaya.problems.instructions.registry import CONSTRAINTS, IFEVAL_CONSTRAINTS, NEEDS_LANGDETECT

pytest.importorskip("langdetect", reason="lm-eval's checkers need langdetect")
pytest.importorskip("immutabledict", reason="lm-eval's checkers need immutabledict")
nltk = pytest.importorskip("nltk", reason="lm-eval's checkers need nltk")
pytest.importorskip("lm_eval", reason="lm-eval holds the checkers to compare with")

TEXTS_A_TYPE = 3
CONSTRAINTS_A_TYPE = 6
ODD_TEXTS = (
    "* one\n* two\n- three\n** four\n*",
    "**bold** and *light* and ** ** and * *",
    "***\none\n***\ntwo\n***",
    "one *** *** two",
    "first\n\n\n\nsecond\n\n'amber' third",
    "<<>> <<<a>>> < <b> >",
    "[a][b] [c\nd] [[e]] []",
    "p. s. see you. P.P.S. again. p.p.s",
    "Section 1 text SECTION 2 Section3 section 4",
    '"quoted"',
    '"',
    "******one******",
    "one******two******",
    "```json\n{}\n```",
    "[1, 2",
    "MY answer is yes.",
    "I say: My answer is no. Or not.",
    "UN-HEARD of THINGS, A B C",
    "word_one word-two don't 3.14",
    "Really?! Yes... no. 'Well.' (Fine.) Is it? go on",
)


@pytest.fixture(scope="module")
def their_registry():
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *names, **settings: False)
        from lm_eval.tasks.ifeval import instructions_registry, instructions_util

        patch.setattr(instructions_util, "_get_sentence_tokenizer", lambda: nltk.tokenize.PunktSentenceTokenizer())
        patch.setattr(nltk, "word_tokenize", functools.partial(nltk.word_tokenize, preserve_line=True))
        import langdetect

        patch.setattr(langdetect.DetectorFactory, "seed", 0)
        yield instructions_registry.INSTRUCTION_DICT


def collection() -> list[str]:
    texts = list(ODD_TEXTS)
    for constraint in CONSTRAINTS.values():
        for seed in range(TEXTS_A_TYPE):
            drawn = constraint.draw(random.Random(seed))
            texts += [drawn.witness(random.Random(seed)), drawn.violation(random.Random(seed))]
    return texts


def test_the_same_types(their_registry):
    assert set(their_registry) == set(IFEVAL_CONSTRAINTS) and len(their_registry) == 25


@pytest.mark.parametrize("kind", IFEVAL_CONSTRAINTS)
def test_the_same_verdicts(their_registry, kind):
    texts = collection()
    if kind in NEEDS_LANGDETECT or kind.startswith("change_case:english"):
        texts = texts[::20]  # slow, and unsure of what plain words are
    seen = set()
    for seed in range(CONSTRAINTS_A_TYPE):
        ours = IFEVAL_CONSTRAINTS[kind].draw(random.Random(seed))
        theirs = their_registry[kind](kind)
        theirs.build_description(**ours.arguments())
        own_texts = [ours.witness(random.Random(seed)), ours.violation(random.Random(seed))]
        for text in [*own_texts, *texts]:
            verdict = bool(text.strip()) and bool(theirs.check_following(text.strip()))
            assert ours.check(text) == verdict, (ours, text)
            seen.add(verdict)
    assert seen == {True, False}
