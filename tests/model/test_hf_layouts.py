"""Both released layouts and ours: the table against the models, round trips to identical bytes, loading elsewhere."""

from __future__ import annotations

import filecmp
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.errors import CheckpointError
from openzaya.model import hf
from openzaya.model.config import ZayaConfig, preset
from openzaya.model.hf_config import read_config, write_config
from openzaya.model.hf_files import TensorToWrite, tensor_chunks, write_file
from openzaya.model.hf_names import expected_tensors, tensor_table
from openzaya.model.transformer import Zaya
from tests.model.hf_miniatures import (
    LEGACY_CONFIG,
    MINI,
    NATIVE_CONFIG,
    SLIDING,
    legacy_state,
    native_state,
    read,
    same,
    write,
)

ONE_EXPERT = MINI.with_changes(num_experts=1, num_hidden_layers=1)


def test_table_counts_of_the_released_8b():
    table = tensor_table(preset("zaya1-8b"))
    assert len(table) == 1283
    assert sum(len(spec.legacy) for spec in table) == 2483
    assert sum(torch.Size(spec.shape).numel() for spec in table if spec.dtype_policy == "weight") == 8_840_488_784


@pytest.mark.parametrize(
    "config", [preset("zaya1-8b"), preset("zaya1-74b-preview"), preset("nano"), SLIDING, ONE_EXPERT]
)
def test_table_equals_our_model_and_transformers(config: ZayaConfig):
    from transformers import ZayaConfig as ReferenceConfig
    from transformers import ZayaForCausalLM

    values = write_config(config, "native", "float32")
    expected = {name: shape for name, (shape, _) in expected_tensors(config).items()}
    with torch.device("meta"):
        ours = Zaya(config)
        theirs = ZayaForCausalLM(ReferenceConfig(**values))
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == expected
    reference = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert reference == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_released_field_sets_load_in_both_layouts(tmp_path, dtype, shards):
    state = native_state(MINI, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    write(tmp_path / "native", {**NATIVE_CONFIG, "dtype": name}, state, shards=shards)
    write(tmp_path / "legacy", {**LEGACY_CONFIG, "dtype": name}, legacy_state(MINI, state), shards=shards)
    for layout in ("native", "legacy"):
        report = hf.inspect(tmp_path / layout)
        assert report.ok and report.layout == layout and report.num_parameters == MINI.num_parameters()
        assert not report.warnings
        model = hf.load(tmp_path / layout)
        assert model.config == MINI
        assert same(dict(model.state_dict()), state)
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("config", [MINI, SLIDING, ONE_EXPERT])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 5_000])
def test_round_trips_give_identical_files(tmp_path, config, max_shard_bytes):
    model = Zaya(config)
    model.load_state_dict(native_state(config))
    hf.save(model, tmp_path / "native", max_shard_bytes=max_shard_bytes)
    hf.save(model, tmp_path / "legacy", layout="legacy", max_shard_bytes=max_shard_bytes)
    state = dict(model.state_dict())
    assert same(read(tmp_path / "native"), state)
    assert same(read(tmp_path / "legacy"), legacy_state(config, state))

    hf.convert(tmp_path / "native", tmp_path / "to_legacy", to="legacy", max_shard_bytes=max_shard_bytes)
    hf.convert(tmp_path / "to_legacy", tmp_path / "back", to="native", max_shard_bytes=max_shard_bytes)
    hf.convert(tmp_path / "native", tmp_path / "ours", to="openzaya", max_shard_bytes=max_shard_bytes)
    hf.convert(tmp_path / "ours", tmp_path / "from_ours", to="legacy", max_shard_bytes=max_shard_bytes)
    for one, other in (("legacy", "to_legacy"), ("native", "back"), ("legacy", "from_ours")):
        names = sorted(path.name for path in (tmp_path / one).iterdir())
        assert names == sorted(path.name for path in (tmp_path / other).iterdir())
        matches, *_ = filecmp.cmpfiles(tmp_path / one, tmp_path / other, names, shallow=False)
        assert matches == names
    loaded = hf.load(tmp_path / "to_legacy")
    assert loaded.config == config and same(dict(loaded.state_dict()), state)


def test_coarse_balancing_biases_survive_conversion_and_are_widened_on_load(tmp_path):
    """Released legacy files hold these biases in bfloat16."""
    state = native_state(MINI, dtype=torch.bfloat16)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    legacy = legacy_state(MINI, state)
    write(tmp_path / "legacy", LEGACY_CONFIG, legacy)
    hf.convert(tmp_path / "legacy", tmp_path / "native", to="native")
    hf.convert(tmp_path / "native", tmp_path / "back", to="legacy")
    assert same(read(tmp_path / "native"), state)
    assert same(read(tmp_path / "back"), legacy)
    assert any("less than float32" in warning for warning in hf.inspect(tmp_path / "back").warnings)
    biases = hf.load(tmp_path / "legacy").state_dict()["model.layers.0.mlp.gate.balancing_biases"]
    assert biases.dtype == torch.float32
    assert torch.equal(biases, state["model.layers.0.mlp.gate.balancing_biases"].float())


@pytest.mark.parametrize("layout", ["native", "legacy"])
def test_dtype_on_load(tmp_path, layout):
    state = native_state(MINI)
    model = Zaya(MINI)
    model.load_state_dict(state)
    hf.save(model, tmp_path / "c", layout=layout)
    for dtype in ("bfloat16", torch.float64, "float32"):
        loaded = hf.load(tmp_path / "c", dtype=dtype).state_dict()
        wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float64 if dtype == torch.float64 else torch.float32
        for name, tensor in loaded.items():
            biases = name.endswith("balancing_biases")
            assert tensor.dtype == (torch.float32 if biases else wanted)
            assert torch.equal(tensor, state[name] if biases else state[name].to(wanted))


@given(
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    experts=st.integers(1, 4),
    layers=st.integers(1, 3),
    kernels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.one_of(st.none(), st.integers(2, 9)),
    sliding=st.integers(0, 7),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_config_round_trips(kv_heads, groups, experts, layers, kernels, window, sliding):
    types = tuple("hybrid_sliding" if window and sliding >> i & 1 else "hybrid" for i in range(layers))
    config = MINI.with_changes(
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * groups,
        num_experts=experts,
        num_hidden_layers=layers,
        cca_time0=kernels[0],
        cca_time1=kernels[1],
        sliding_window=window,
        layer_types=types,
        rms_norm_eps=3e-6,
        rope_theta=1e6,
        partial_rotary_factor=0.25,
        initializer_range=0.03,
    )
    for layout in ("native", "legacy", "openzaya"):
        raw = json.loads(json.dumps(write_config(config, layout, "float32")))
        assert read_config(raw, layout) == config


@pytest.mark.parametrize("config", [MINI, SLIDING])
def test_transformers_loads_what_we_save_with_the_same_logits(tmp_path, config):
    from transformers import ZayaForCausalLM

    model = Zaya(config).eval()
    model.load_state_dict(native_state(config))
    hf.save(model, tmp_path / "ours", max_shard_bytes=20_000)
    theirs, info = ZayaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_transformers_keeps_our_bytes_in_bfloat16(tmp_path):
    from transformers import ZayaForCausalLM

    state = native_state(MINI, dtype=torch.bfloat16)
    write(tmp_path / "source", LEGACY_CONFIG, legacy_state(MINI, state))
    hf.save(hf.load(tmp_path / "source"), tmp_path / "ours")
    theirs = ZayaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    del theirs["lm_head.weight"]
    assert same(theirs, state)


def test_we_load_what_transformers_saves(tmp_path):
    from transformers import ZayaConfig as ReferenceConfig
    from transformers import ZayaForCausalLM

    theirs = ZayaForCausalLM(ReferenceConfig(**write_config(SLIDING, "native", "float32")))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    model = hf.load(tmp_path / "theirs")
    assert model.config == SLIDING
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert same(dict(model.state_dict()), state)


def test_files_equal_those_of_the_safetensors_library(tmp_path):
    from safetensors.torch import save_file

    types = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)
    tensors = {f"t.{i}.{dtype}": torch.ones(i + 1, 3).to(dtype) for dtype in types for i in range(3)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "é": torch.zeros(2)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    names |= {torch.int64: "I64", torch.int8: "I8", torch.bool: "BOOL"}

    def described(name: str, tensor: torch.Tensor) -> TensorToWrite:
        return TensorToWrite(name, names[tensor.dtype], tuple(tensor.shape), lambda: tensor_chunks(tensor))

    write_file(tmp_path / "ours", [described(*item) for item in tensors.items()])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


VARIANTS = [
    {"attention": "gqa"},
    {"attention": "mha", "num_key_value_heads": 4},
    {"attention": "mla"},
    {"router": "mlp"},
    {"router": "linear"},
    {"residual": "plain"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_variants_live_in_our_layout_only(tmp_path, changes):
    config = MINI.with_changes(**changes)
    model = Zaya(config, seed=3)
    hf.save(model, tmp_path / "c", layout="openzaya", max_shard_bytes=20_000)
    loaded = hf.load(tmp_path / "c")
    assert loaded.config == config and same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert hf.inspect(tmp_path / "c").ok
    field = next(iter(changes))
    for layout in ("native", "legacy"):
        with pytest.raises(CheckpointError, match=field):
            hf.save(model, tmp_path / "d", layout=layout)
        with pytest.raises(CheckpointError, match=field):
            hf.convert(tmp_path / "c", tmp_path / "d", to=layout)
    assert not (tmp_path / "d").exists()


def test_extra_groups_of_our_layout(tmp_path):
    model = Zaya(MINI)
    head = {"weight": torch.ones(1, 32), "codes": torch.arange(4, dtype=torch.int8)}
    hf.save(model, tmp_path / "c", layout="openzaya", groups={"reward_head": hf.TensorGroup(head)})
    assert same(dict(hf.load(tmp_path / "c").state_dict()), dict(model.state_dict()))
    assert same(hf.load_group(tmp_path / "c", "reward_head"), head)
    hf.convert(tmp_path / "c", tmp_path / "copy", to="openzaya")
    assert same(hf.load_group(tmp_path / "copy", "reward_head"), head)
    assert hf.inspect(tmp_path / "copy").num_parameters == MINI.num_parameters()
    with pytest.raises(CheckpointError, match="reward_head"):
        hf.convert(tmp_path / "c", tmp_path / "d", to="native")
    with pytest.raises(CheckpointError, match="reward_head"):
        hf.save(model, tmp_path / "d", groups={"reward_head": hf.TensorGroup(head)})
    hf.save(model, tmp_path / "q", layout="openzaya", groups={"scales": hf.TensorGroup(head, required=True)})
    with pytest.raises(CheckpointError, match="scales"):
        hf.load(tmp_path / "q")


def test_side_files_and_tokenizer(tmp_path):
    source = write(tmp_path / "a", NATIVE_CONFIG, native_state(MINI, dtype=torch.bfloat16), tokenizer=True)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_zaya.py").write_text("raise SystemExit")
    report = hf.convert(source, tmp_path / "b", to="legacy")
    assert report.has_tokenizer and report.has_chat_template
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"temperature": 0.6}'
    assert not (tmp_path / "b" / "modeling_zaya.py").exists()
    hf.save(hf.load(source), tmp_path / "c", tokenizer=source)
    assert hf.inspect(tmp_path / "c").has_tokenizer

    class Tokenizer:
        def save_pretrained(self, directory: str) -> None:
            with open(f"{directory}/tokenizer.json", "w") as file:
                file.write("[]")

    hf.save(hf.load(source), tmp_path / "c", tokenizer=Tokenizer())
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "[]"
