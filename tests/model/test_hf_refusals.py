"""Damaged, mixed and foreign checkpoints: one error naming everything, nothing half-loaded or half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openzaya.errors import CheckpointError
from openzaya.model import hf, hf_files
from openzaya.model.transformer import Zaya
from tests.model.hf_miniatures import LEGACY_CONFIG, MINI, NATIVE_CONFIG, legacy_state, native_state, read, same, write

CONFIG = {**NATIVE_CONFIG, "dtype": "float32"}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
BIASES = "model.layers.2.mlp.gate.balancing_biases"


def refused(path: Path) -> str:
    """The message of load, which inspect and convert agree with."""
    with pytest.raises(CheckpointError) as error:
        hf.load(path)
    report = hf.inspect(path)
    assert not report.ok and all(problem in str(error.value) for problem in report.problems)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False
    assert "would refuse" in report.to_text()
    destination = path.parent / "never_written"
    with pytest.raises(CheckpointError):
        hf.convert(path, destination, to="native")
    assert not destination.exists()
    return str(error.value)


def test_keys_missing_unknown_and_misshapen_in_one_message(tmp_path):
    state = native_state(MINI)
    del state["model.norm.weight"], state[GATE_UP]
    state["model.layers.7.surprise"] = torch.zeros(2)
    state["model.layers.0.mlp.gate.down_proj.bias"] = torch.zeros(11)
    state["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    write(tmp_path / "c", CONFIG, state)
    message = refused(tmp_path / "c")
    for name in ("model.norm.weight", GATE_UP, "model.layers.7.surprise", "gate.down_proj.bias", "[11]", "I8"):
        assert name in message
    report = hf.inspect(tmp_path / "c")
    assert report.missing == [GATE_UP, "model.norm.weight"]
    assert report.unexpected == ["model.layers.7.surprise"]
    assert list(report.wrong_shape) == ["model.layers.0.mlp.gate.down_proj.bias"]


def test_a_missing_legacy_expert_is_named(tmp_path):
    state = legacy_state(MINI, native_state(MINI))
    name = "model.layers.3.zaya_block.experts.local_experts.2.linear_fc2.weight"
    del state[name]
    write(tmp_path / "c", {**LEGACY_CONFIG, "dtype": "float32"}, state)
    assert name in refused(tmp_path / "c")


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 48), ("num_hidden_layers", 2), ("num_experts", 4), ("num_key_value_heads", 1)]
)
def test_configuration_and_tensors_disagree(tmp_path, key, value):
    config = {**CONFIG, key: value}
    if key == "num_hidden_layers":
        config["layer_types"] = ["hybrid"] * value
    write(tmp_path / "c", config, native_state(MINI))
    refused(tmp_path / "c")


def test_layout_of_config_and_tensors_disagree(tmp_path):
    state = native_state(MINI)
    write(tmp_path / "a", {**LEGACY_CONFIG, "dtype": "float32"}, state)
    assert "legacy layout, the tensor names are native" in refused(tmp_path / "a")
    write(tmp_path / "b", CONFIG, legacy_state(MINI, state))
    assert "native layout, the tensor names are legacy" in refused(tmp_path / "b")
    write(tmp_path / "c", CONFIG, {**state, "model.final_norm.weight": torch.zeros(32)})
    assert "mixed" in refused(tmp_path / "c")


def test_head_must_be_the_embedding(tmp_path):
    state = native_state(MINI)
    embedding = state["model.embed_tokens.weight"]
    inverse_frequencies = {"model.rotary_emb.inv_freq": torch.zeros(2)}
    write(tmp_path / "tied", CONFIG, {**state, "lm_head.weight": embedding.clone(), **inverse_frequencies})
    report = hf.inspect(tmp_path / "tied")
    assert report.ok and report.ignored == ["lm_head.weight", "model.rotary_emb.inv_freq"]
    assert report.num_parameters == MINI.num_parameters()
    assert same(dict(hf.load(tmp_path / "tied").state_dict()), state)
    hf.convert(tmp_path / "tied", tmp_path / "copy", to="native")
    assert same(read(tmp_path / "copy"), state)
    write(tmp_path / "untied", CONFIG, {**state, "lm_head.weight": embedding + 1})
    assert "lm_head.weight differs" in refused(tmp_path / "untied")


def test_dtype_of_config_and_weights(tmp_path):
    write(tmp_path / "c", {**CONFIG, "dtype": "bfloat16"}, native_state(MINI))
    with pytest.raises(CheckpointError, match=r"bfloat16.*float32"):
        hf.load(tmp_path / "c")
    assert hf.load(tmp_path / "c", dtype="bfloat16").dtype == torch.bfloat16
    assert hf.load(tmp_path / "c", dtype="float32").dtype == torch.float32
    with pytest.raises(CheckpointError, match="int8"):
        hf.load(tmp_path / "c", dtype=torch.int8)
    with pytest.raises(CheckpointError, match="float17"):
        hf.load(tmp_path / "c", dtype="float17")


def truncate(directory: Path) -> None:
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])


def lengthen(directory: Path) -> None:
    with (directory / "model-00002-of-00003.safetensors").open("ab") as file:
        file.write(b"12345")


def cut_header(directory: Path) -> None:
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])


def empty_file(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"")


def spoil_header(directory: Path) -> None:
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:8] + b"!" + shard.read_bytes()[9:])


def shift_offsets(directory: Path) -> None:
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[1,'))


def lose_shard(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


def lose_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def break_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ')


def leave_directory(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def tensor_twice(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = (directory / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file({**load_file(second), name: tensors[name]}, second)


def leftover_file(directory: Path) -> None:
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "model.safetensors")


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{model_type: zaya")


def list_config(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def double_key(directory: Path) -> None:
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text[:-1] + ', "hidden_size": 64}')


def only_pickles(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def no_weights(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()


def nothing(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "truncated: holds"),
        (lengthen, "5 bytes behind"),
        (cut_header, "truncated"),
        (empty_file, "holds 0 bytes"),
        (spoil_header, "damaged header"),
        (shift_offsets, "do not fit"),
        (lose_shard, "names model-00002-of-00003.safetensors, absent"),
        (lose_index, "without model.safetensors.index.json"),
        (break_index, "not valid JSON"),
        (leave_directory, "outside the checkpoint"),
        (tensor_twice, "keep it in one shard"),
        (leftover_file, "model.safetensors: not named by"),
        (no_config, "config.json is missing"),
        (broken_config, "not valid JSON"),
        (list_config, "expected a JSON object"),
        (double_key, "hidden_size' occurs twice"),
        (only_pickles, "pytorch_model.bin"),
        (no_weights, "no weights"),
        (nothing, "empty"),
    ],
)
def test_damaged_directories(tmp_path, damage: Callable[[Path], None], says: str):
    directory = write(tmp_path / "c", CONFIG, native_state(MINI), shards=3)
    assert hf.inspect(directory).ok
    damage(directory)
    assert says in refused(directory)


def test_paths_that_are_no_checkpoints(tmp_path):
    for path in (tmp_path / "absent", "no/such/deep/path", "plain-name"):
        with pytest.raises(CheckpointError, match="no such directory"):
            hf.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        hf.load(tmp_path / "file")


def test_skip_class_that_can_win_is_a_warning(tmp_path):
    """It wins where its probability + bias exceeds every expert's; fresh and released biases cannot."""
    state = native_state(MINI)
    state[BIASES] = torch.tensor([-0.01, -0.02, -0.01, -1.0])
    write(tmp_path / "c", CONFIG, state)
    (warning,) = hf.inspect(tmp_path / "c").warnings
    assert "skip class can win in layers 2 " in warning
    assert warning in hf.convert(tmp_path / "c", tmp_path / "d", to="legacy").warnings
    state[BIASES] = torch.tensor([-0.01, 0.0, -0.01, -1.0])
    write(tmp_path / "c", CONFIG, state)
    assert not hf.inspect(tmp_path / "c").warnings
    state[BIASES] = torch.tensor([0.0, float("nan"), 0.0, -1.0])
    write(tmp_path / "c", CONFIG, state)
    assert "not finite" in refused(tmp_path / "c")


def test_save_replaces_only_checkpoints_and_only_when_complete(tmp_path, monkeypatch):
    one, two = Zaya(MINI, seed=1), Zaya(MINI, seed=2)
    hf.save(one, tmp_path / "c")
    hf.save(two, tmp_path / "c", max_shard_bytes=20_000)
    assert same(dict(hf.load(tmp_path / "c").state_dict()), dict(two.state_dict()))
    assert not (tmp_path / "c" / "model.safetensors").exists()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(hf_files, "write_json", fail)
        with pytest.raises(OSError, match="disk full"):
            hf.save(one, tmp_path / "c")
    assert same(dict(hf.load(tmp_path / "c").state_dict()), dict(two.state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]

    (tmp_path / "c" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("")
    for directory in ("c", "home", "home/letter.txt"):
        with pytest.raises(CheckpointError, match="no checkpoint alone"):
            hf.save(one, tmp_path / directory)
    (tmp_path / "empty").mkdir()
    hf.save(one, tmp_path / "empty")
    assert hf.inspect(tmp_path / "empty").ok


def test_save_refuses_what_it_cannot_write(tmp_path):
    model = Zaya(MINI)
    with pytest.raises(CheckpointError, match="layout='gguf'"):
        hf.save(model, tmp_path / "c", layout="gguf")
    with pytest.raises(CheckpointError, match="max_shard_bytes=0"):
        hf.save(model, tmp_path / "c", max_shard_bytes=0)
    with torch.device("meta"):
        empty = Zaya(MINI)
    with pytest.raises(CheckpointError, match="initialised"):
        hf.save(empty, tmp_path / "c")
    model.model.norm = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        hf.save(model, tmp_path / "c")
    hf.save(Zaya(MINI), tmp_path / "c")
    with pytest.raises(CheckpointError, match="source itself"):
        hf.convert(tmp_path / "c", tmp_path / "c", to="legacy")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
