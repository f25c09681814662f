"""A small tokenizer of ours, trained once for the tests of this folder."""

from __future__ import annotations

import random

import pytest

from openzaya.data.documents import PYTHON_STDLIB, find_files
from openzaya.data.tokenizer import train_tokenizer
from openzaya.problems import TRAINED_FAMILIES, demonstration, make_problem


@pytest.fixture(scope="session")
def tokenizer():
    texts = [file.read_group(0)[0].value for file in find_files(PYTHON_STDLIB)[:12]]
    for index in range(300):
        family = list(TRAINED_FAMILIES)[index % len(TRAINED_FAMILIES)]
        problem = make_problem(family, index % 8, 0, index, "train")
        solution = demonstration(problem, random.Random(index), 0.3)
        texts.append(f"{problem.prompt}\n{solution.trace}\n{solution.answer}")
    return train_tokenizer(texts, 640)
