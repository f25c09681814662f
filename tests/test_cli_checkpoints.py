"""The verbs that write and look at checkpoints: init, inspect, convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openzaya.data.tokenizer import save_tokenizer
from openzaya.model import hf
from openzaya.model.transformer import Zaya
from tests.command import error_line, openzaya
from tests.train import miniature


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write_babbling_model(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(miniature.tokenizer(), directory)
    return directory


SHAPE = ("vocab_size=300", "hidden_size=32", "num_hidden_layers=3", "max_position_embeddings=256")


@pytest.mark.parametrize("layout", ["native", "legacy", "openzaya"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_writes_a_checkpoint_of_every_layout(tmp_path, tokenizer_directory, layout: str, dtype: str) -> None:
    out = tmp_path / "fresh"
    options = ("--tokenizer", tokenizer_directory, "--layout", layout, "--dtype", dtype, "--seed", 3)
    finished = openzaya("init", "smoke", out, *SHAPE, *options)
    assert finished.code == 0, finished.err
    assert f"{layout} layout, {dtype}, seed 3" in finished.out
    found = openzaya("inspect", out, "--json")
    assert found.code == 0
    described = json.loads(found.out.strip().splitlines()[-1])
    assert described["layout"] == layout
    model = hf.load(out)
    assert model.dtype == getattr(torch, dtype)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 32)
    assert model.config.eos_token_id == miniature.tokenizer().eos_token_id
    assert f"{model.config.num_parameters():,} parameters" in finished.out
    same = Zaya(model.config, seed=3)
    if dtype == "float32":
        assert miniature.differences(dict(model.state_dict()), dict(same.state_dict())) == []
    text = openzaya("generate", out, "Hi", "--max-tokens", 3)
    assert text.code == 0


def test_init_trains_its_own_small_tokenizer_and_seeds_differ(tmp_path: Path) -> None:
    overrides = ("vocab_size=300", "hidden_size=16", "num_hidden_layers=1")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finished = openzaya("init", "smoke", tmp_path / name, *overrides, "--seed", seed)
        assert finished.code == 0, finished.err
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "c" / "tokenizer.json").read_bytes()
    assert openzaya("generate", tmp_path / "a", "x", "--chat", "--max-tokens", 2).code == 0


def test_an_ablation_goes_into_our_own_layout_and_no_other(tmp_path: Path, tokenizer_directory: Path) -> None:
    options = (*SHAPE, "attention=mla", "mla_latent_size=8", "--tokenizer", tokenizer_directory)
    finished = openzaya("init", "smoke", tmp_path / "a", *options)
    assert finished.code == 0 and "openzaya layout" in finished.out
    line = error_line(openzaya("init", "smoke", tmp_path / "b", *options, "--layout", "native"))
    assert "openzaya" in line and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nanoo", "d"), "unknown preset 'nanoo'; choose one of: zaya1-8b"),
        (("smoke", "d", "hiden_size=3"), "did you mean 'hidden_size'?"),
        (("smoke", "d", "self=1"), "unknown key 'self'"),
        (("smoke", "d", "num_hidden_layers"), "is not of the form key=value"),
        (("smoke", "d", "num_hidden_layers=0"), "num_hidden_layers"),
        (("smoke", "d", "num_attention_heads=3"), "num_attention_heads=3 is no multiple of"),
        (("smoke", "d", "--dtype", "int8"), "dtype 'int8' is not known"),
        (("smoke", "d", "--layout", "gguf", *SHAPE), "gguf"),
        (("zaya1-8b", "d"), "needs its own tokenizer; name one with --tokenizer"),
        (("smoke", "d", "--tokenizer", "nowhere"), "'nowhere' is no directory"),
        (("smoke", "d", "vocab_size=100"), "vocab_size=100"),
    ],
    ids=str,
)
def test_init_refuses_in_one_line(tmp_path: Path, monkeypatch, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    finished = openzaya("init", *arguments)
    error_line(finished)
    assert message in finished.err
    assert not (tmp_path / "d").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    line = error_line(openzaya("init", "smoke", tmp_path / "d", "vocab_size=299", "--tokenizer", tokenizer_directory))
    assert "has 300 tokens, the model's vocabulary 299; add vocab_size=300" in line


def test_convert_there_and_back_is_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    assert openzaya("convert", checkpoint, tmp_path / "legacy", "--to", "legacy").code == 0
    assert openzaya("convert", tmp_path / "legacy", tmp_path / "native", "--to", "native").code == 0
    assert (tmp_path / "native" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert "gguf" in error_line(openzaya("convert", checkpoint, tmp_path / "x", "--to", "gguf"))


def test_inspect_names_what_is_wrong_with_exit_code_1(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.surprise"] = tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    finished = openzaya("inspect", broken)
    assert finished.code == 1 and "model.surprise" in finished.out and "model.norm.weight" in finished.out
    as_json = openzaya("inspect", broken, "--json")
    assert as_json.code == 1 and isinstance(json.loads(as_json.out.strip().splitlines()[-1]), dict)
    assert error_line(openzaya("generate", broken, "x"))
