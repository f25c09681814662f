"""The error report: zero for a model beside itself, honest about planted damage, and the verb that prints it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch

from openzaya.errors import DataError
from openzaya.infer.quality import (
    WINDOW_TOKENS,
    check_generation,
    compare,
    ends_in_loop,
    measure,
    problem_documents,
    repeated_share,
    smallest_zlib_ratio,
    text_documents,
)
from openzaya.model import hf
from openzaya.model.quantised import quantise_model
from openzaya.model.transformer import Zaya
from tests.command import openzaya
from tests.model.reference import perturb
from tests.train import miniature

DOCUMENTS = [[1, 5, 9, 20, 33, 7], [2, *range(30, 60)], [3]]


def fresh() -> Zaya:
    model = Zaya(miniature.config(), seed=0).eval()
    perturb(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    hf.save(fresh(), directory, tokenizer=miniature.tokenizer())
    return directory


def test_a_model_equals_itself():
    model = fresh()
    report = compare(model, copy.deepcopy(model), DOCUMENTS)
    assert report.num_tokens == 37, "a document of one token says nothing"
    assert report.kl_mean == report.kl_p99 == 0 and report.top1_agreement == 1
    assert report.loss_original == report.loss_quantised > 0
    for layer in report.layers:
        assert layer.nmse_alone == layer.nmse_running == 0
        assert layer.experts_alone == layer.experts_running == 1


def test_losses_are_those_of_the_model():
    model = fresh()
    document = torch.tensor([DOCUMENTS[1]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(document)[0, :-1], document[0, 1:])
    report = compare(model, quantise_model(fresh(), "int4"), DOCUMENTS[1:2])
    assert report.loss_original == pytest.approx(float(loss), rel=1e-6)
    assert report.loss_quantised != report.loss_original


def test_fewer_bits_cost_more():
    model = fresh()
    eight, four = (compare(model, quantise_model(fresh(), scheme), DOCUMENTS) for scheme in ("int8", "int4"))
    assert 0 < eight.kl_mean < 0.2 * four.kl_mean
    assert eight.kl_mean < eight.kl_p99
    for fine, coarse in zip(eight.layers, four.layers, strict=True):
        assert 0 < fine.nmse_running < coarse.nmse_running


def test_damage_is_found_in_its_layer():
    """The layer's own error shows alone; the error running through shows from there on."""
    model, broken = fresh(), fresh()
    with torch.no_grad():
        broken.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    layers = compare(model, broken, DOCUMENTS).layers
    assert [layer.nmse_alone > 0 for layer in layers] == [index == 1 for index in range(len(layers))]
    assert [layer.nmse_running > 0 for layer in layers] == [index >= 1 for index in range(len(layers))]


def test_another_router_is_seen():
    model, broken = fresh(), fresh()
    broken.model.layers[1].mlp.gate.balancing_biases[0] += 10
    layers = compare(model, broken, DOCUMENTS).layers
    assert layers[0].experts_alone == layers[0].experts_running == 1
    assert layers[1].experts_alone < 1 and layers[1].experts_running < 1


def test_hooks_are_gone_afterwards():
    model = fresh()
    compare(model, quantise_model(fresh(), "int8"), DOCUMENTS)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_what_cannot_be_compared():
    with pytest.raises(DataError, match="configurations"):
        compare(fresh(), Zaya(miniature.config().with_changes(num_hidden_layers=1)), DOCUMENTS)
    with pytest.raises(DataError, match="two tokens"):
        compare(fresh(), fresh(), [[1], []])


def test_loops_are_told_from_text():
    rng = random.Random(0)
    text = [rng.randrange(1000) for _ in range(1000)]
    loop = text[:500] + [7, 8, 9] * 200
    assert not ends_in_loop(text) and ends_in_loop(loop)
    assert not ends_in_loop([*loop[:-1], 1]) and not ends_in_loop([7] * (WINDOW_TOKENS - 1))
    assert repeated_share(text) == 0 and repeated_share(loop) > 0.5 and repeated_share([1, 2]) == 0
    assert smallest_zlib_ratio(loop) < 0.1 < 0.3 < smallest_zlib_ratio(text) and smallest_zlib_ratio([1]) == 1


def test_generation_goes_on_past_the_end_of_a_turn():
    model = fresh()
    checks = check_generation(model, [[1, 2, 3], [4]], num_tokens=20)
    assert [check.temperature for check in checks] == [0, 1]
    assert all(check.num_tokens == 40 for check in checks)
    assert checks == check_generation(model, [[1, 2, 3], [4]], num_tokens=20)


def test_documents_come_from_problems_or_a_text():
    tokenizer = miniature.tokenizer()
    documents, prompts = problem_documents(tokenizer, 500)
    assert 500 <= sum(map(len, documents)) < 1100 and len(prompts) == 4
    assert (documents, prompts) == problem_documents(tokenizer, 500)
    assert all(prompt != document[: len(prompt)] for prompt in prompts for document in documents)
    pieces = text_documents(tokenizer, "some text " * 400, 1200)
    assert sum(map(len, pieces)) == 1200 + len(pieces) and max(map(len, pieces)) == 512


def test_a_whole_measurement(checkpoint, tmp_path):
    hf.convert(checkpoint, tmp_path / "int4", quantize="int4")
    report = measure(checkpoint, tmp_path / "int4", num_tokens=100, num_generated=4)
    again = measure(checkpoint, "int4", num_tokens=100, num_generated=4)
    assert {**report.to_dict(), "quantised": ""} == {**again.to_dict(), "quantised": ""}
    text = tmp_path / "text.txt"
    text.write_text("abc " * 50)
    other = measure(checkpoint, "int4", text=text, num_tokens=50, num_generated=0)
    assert other.kl_mean != report.kl_mean and not other.generation


def test_the_verb(checkpoint):
    done = openzaya("quality", checkpoint, "int8,down=int4", "--tokens", 60, "--generate", 3)
    assert done.code == 0, done.err
    for word in ("KL", "NMSE", "experts alone", "quantised at T=1", "int8,down=int4"):
        assert word in done.out
    done = openzaya("quality", checkpoint, "int8", "--tokens", 60, "--generate", 0, "--json")
    assert json.loads(done.out)["layers"][0]["nmse_alone"] > 0


def test_the_verb_refuses(checkpoint, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "int3" in openzaya("quality", checkpoint, "int3").err
    assert "no such directory" in openzaya("quality", checkpoint, "some/where/else").err
    assert "UTF-8" in openzaya("quality", checkpoint, "int8", "--text", tmp_path / "binary", "--generate", 0).err
    assert openzaya("quality", checkpoint, "int8", "--text", tmp_path / "none", "--generate", 0).code == 1


def test_the_verb_convert(checkpoint, tmp_path):
    done = openzaya("convert", checkpoint, tmp_path / "out", "--quantize", "int4,attention=int4")
    assert done.code == 0 and "int4,attention=int4" in done.out and "M/s" in done.err
    assert openzaya("generate", tmp_path / "out", "1+1", "--max-tokens", 3).code == 0
    assert json.loads(openzaya("inspect", tmp_path / "out", "--json").out)["quantisation"]["attention"] == "int4"
    assert "--quantize" in openzaya("convert", checkpoint, tmp_path / "out").err
    assert "native" in openzaya("convert", tmp_path / "out", tmp_path / "x", "--to", "native").err
