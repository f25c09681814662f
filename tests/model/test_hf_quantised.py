"""Quantised checkpoints: made by streaming from every layout, opened by mapping, damaged ones refused."""

from __future__ import annotations

import json
import mmap
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from openzaya.errors import CheckpointError, ConfigError
from openzaya.kernels.host import LARGE_PAGE_BYTES
from openzaya.model import hf, hf_files, hf_quantised
from openzaya.model.quantised import QuantisedMatrix, quantise_model
from openzaya.model.transformer import Zaya
from openzaya.train.loop import starting_model
from openzaya.train.recipe import ModelChoice
from tests.model.hf_miniatures import MINI
from tests.model.test_hf_memory import MEDIUM, peak_bytes, weight_bytes, write_random

SCHEMES = ["int8", "int4", "int4,attention=int4,head=int4", "int4,down=int8,head=float"]
TOKENS = torch.arange(2 * 12).view(2, 12)


def same_model(one: Zaya, other: Zaya) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """One model in all layouts."""
    directory = tmp_path_factory.mktemp("sources")
    model = Zaya(MINI, seed=3).bfloat16().eval()
    for layout in ("native", "legacy", "openzaya"):
        hf.save(model, directory / layout, layout=layout)
    return directory


@pytest.fixture
def quantised(sources, tmp_path) -> Path:
    hf.convert(sources / "native", tmp_path / "quantised", quantize="int8,gate_up=int4")
    return tmp_path / "quantised"


@pytest.mark.parametrize("layout", ["native", "legacy", "openzaya"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_streaming_gives_what_quantising_in_memory_gives(sources, tmp_path, layout, scheme):
    report = hf.convert(sources / layout, tmp_path / "out", quantize=scheme)
    assert report.ok and report.layout == "openzaya"
    expected = quantise_model(hf.load(sources / "native"), scheme)
    loaded = hf.load(tmp_path / "out")
    assert loaded.quantisation == expected.quantisation
    assert same_model(loaded, expected)
    assert torch.equal(loaded(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("layout", ["native", "legacy"])
def test_pieces_of_a_matrix_make_the_same_file(sources, tmp_path, layout, monkeypatch):
    """Sixteen rows at a time: expert by expert, and several pieces of the head and of 32 rows."""
    hf.convert(sources / layout, tmp_path / "whole", quantize="int4,head=int4")
    seen: list[int] = []
    monkeypatch.setattr(hf_quantised, "_PIECE_BYTES", 1)
    monkeypatch.setattr(hf_quantised.Counting, "__call__", lambda self, weights: seen.append(weights))
    hf.convert(sources / layout, tmp_path / "pieces", quantize="int4,head=int4")
    assert max(seen) == 16 * 32
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("max_shard_bytes", [1, 4000, 10**9])
def test_codes_are_aligned_and_files_are_safetensors(sources, tmp_path, max_shard_bytes):
    hf.convert(sources / "native", tmp_path / "out", quantize="int8,gate_up=int4", max_shard_bytes=max_shard_bytes)
    loaded = hf.load(tmp_path / "out").state_dict()
    aligned = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert torch.equal(opened.get_tensor(name), loaded.pop(name)), name
        for stored in hf_files.read_header(file):
            if stored.name.endswith(".packed"):
                assert stored.offset % 64 == 0
                aligned += 1
    assert not loaded and aligned == 3 * 7 + 1


@pytest.mark.parametrize("layout", ["native", "legacy", "openzaya"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("piece_bytes", [1, 32 << 20])
def test_quantising_while_loading_gives_what_converting_gives(sources, layout, scheme, piece_bytes, monkeypatch):
    expected = quantise_model(hf.load(sources / "native"), scheme)
    monkeypatch.setattr(hf_quantised, "_PIECE_BYTES", piece_bytes)
    loaded = hf.load(sources / layout, quantize=scheme)
    assert loaded.quantisation == expected.quantisation and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert same_model(loaded, expected)
    assert torch.equal(loaded(TOKENS), expected(TOKENS))


def test_quantising_while_loading_rounds_the_stored_values(tmp_path):
    """Other types are for what stays in float: int8 codes are those of the fp32 weights, not of their bf16 rounding."""
    hf.save(Zaya(MINI, seed=3), tmp_path / "wide")
    wide, narrow = (hf.load(tmp_path / "wide", dtype=dtype, quantize="int8") for dtype in ("auto", "bfloat16"))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    codes = [name for name in wide.state_dict() if name.endswith((".packed", ".scales"))]
    assert codes and all(torch.equal(wide.state_dict()[name], narrow.state_dict()[name]) for name in codes)
    assert narrow.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_copied_model_is_the_mapped_one(quantised):
    copied = hf.load(quantised, mapped=False)
    assert same_model(copied, hf.load(quantised)) and torch.equal(copied(TOKENS), hf.load(quantised)(TOKENS))
    hf.save(copied, quantised)
    assert same_model(hf.load(quantised), copied)


def test_inspect_tells_formats_and_bits(quantised):
    report = hf.inspect(quantised)
    assert report.num_parameters == MINI.num_parameters()
    found = report.quantisation
    assert found["scheme"] == "int8,gate_up=int4" and found["down"] == "int8"
    assert found["formats"]["int4"]["weights"] == 3 * MINI.num_experts * 24 * 32
    sizes = sum(m.nbytes for m in hf.load(quantised).modules() if isinstance(m, QuantisedMatrix))
    assert sum(entry["bytes"] for entry in found["formats"].values()) == sizes
    assert "int8,gate_up=int4" in report.to_text() and "bits a weight" in report.to_text()
    assert json.loads(json.dumps(report.to_dict()))["quantisation"] == found


def test_saving_and_copying(quantised, tmp_path):
    model = hf.load(quantised)
    hf.save(model, tmp_path / "saved")
    hf.convert(quantised, tmp_path / "copied", to="openzaya")
    assert same_model(hf.load(tmp_path / "saved"), model) and same_model(hf.load(tmp_path / "copied"), model)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == json.loads(
        (quantised / "config.json").read_text()
    )
    # A checkpoint that is open may be replaced: the model keeps its file.
    before = model(TOKENS)
    hf.save(Zaya(MINI, seed=9), quantised)
    assert torch.equal(model(TOKENS), before)


def test_writing_to_a_mapped_model_leaves_the_file_alone(quantised):
    digest = (quantised / "model.safetensors").read_bytes()
    model = hf.load(quantised)
    model.model.layers[0].mlp.experts.down_proj.copy_from_(torch.ones(3, 32, 12))
    model.model.embed_tokens.weight.zero_()
    assert (quantised / "model.safetensors").read_bytes() == digest
    assert not same_model(model, hf.load(quantised))


def test_other_dtypes_touch_float_tensors_only(quantised):
    model, wide = hf.load(quantised), hf.load(quantised, dtype="float32")
    assert wide.dtype == torch.float32
    for name, tensor in wide.state_dict().items():
        if name.endswith((".packed", ".scales")):
            assert torch.equal(tensor, model.state_dict()[name]) and tensor.dtype == model.state_dict()[name].dtype
    assert wide(TOKENS).isfinite().all()


def test_a_quantised_model_does_not_train(quantised):
    model = hf.load(quantised)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(TOKENS).sum().backward()
    with pytest.raises(ConfigError, match="original weights"):
        starting_model(ModelChoice(start_from=str(quantised)), quantised.parent)


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "legacy"])
def test_released_layouts_cannot_hold_it(sources, quantised, tmp_path, layout):
    with pytest.raises(CheckpointError, match=r"int8,gate_up=int4.*cannot hold"):
        hf.convert(quantised, tmp_path / "out", to=layout)
    with pytest.raises(CheckpointError, match="cannot hold a quantised model"):
        hf.convert(sources / "native", tmp_path / "out", to=layout, quantize="int8")
    with pytest.raises(CheckpointError, match="cannot hold a quantised model"):
        hf.save(hf.load(quantised), tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_requests_that_make_no_sense(sources, quantised, tmp_path):
    with pytest.raises(CheckpointError, match="quantised already"):
        hf.convert(quantised, tmp_path / "out", quantize="int4")
    with pytest.raises(CheckpointError, match="quantised already"):
        hf.load(quantised, quantize="int4")
    for act in (
        lambda **scheme: hf.convert(sources / "native", tmp_path / "out", **scheme),
        partial(hf.load, quantised),
    ):
        with pytest.raises(ConfigError, match="int4"):
            act(quantize="int5")
    with pytest.raises(CheckpointError, match="quantize="):
        hf.convert(sources / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit_config(directory: Path, change) -> None:
    raw = json.loads((directory / "config.json").read_text())
    change(raw)
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda raw: raw["quantisation"].update(version=2), "version 2.*upgrade"),
        (lambda raw: raw["quantisation"].update(version=True), "version"),
        (lambda raw: raw["quantisation"].pop("version"), "version"),
        (lambda raw: raw["quantisation"].update(gate_up="int3"), "int8, int4, float"),
        (lambda raw: raw["quantisation"].update(router="int8"), "upgrade"),
        (lambda raw: raw["quantisation"].pop("head"), "upgrade"),
        (lambda raw: raw["quantisation"].update(gate_up=["int4"]), "upgrade"),
        (lambda raw: raw.update(quantisation=None), "version"),
        (lambda raw: raw.update(quantisation=[1]), "version"),
        (lambda raw: raw.update(quantisation={"version": 1} | dict.fromkeys(FORMATS, "float")), "quantises nothing"),
        (lambda raw: raw.pop("quantisation"), "unexpected.*packed"),
        (lambda raw: raw["quantisation"].update(down="int4"), "down_proj.packed.*shape"),
        (lambda raw: raw["quantisation"].update(head="float"), "lm_head.packed"),
        (lambda raw: raw["config"].update(moe_intermediate_size=13, hidden_size=65), "shape"),
        (lambda raw: raw.update(openzaya_format=2), "upgrade"),
    ],
)
def test_tampered_configurations(quantised, change, match):
    edit_config(quantised, change)
    with pytest.raises(CheckpointError) as error:
        hf.load(quantised)
    assert re.search(match, str(error.value), re.DOTALL), error.value
    assert not hf.inspect(quantised).ok


FORMATS = ("gate_up", "down", "attention", "head")


def test_codes_of_another_type_are_refused(quantised):
    file = quantised / "model.safetensors"
    raw = file.read_bytes()
    assert raw.count(b'"dtype":"U8"') == 22
    file.write_bytes(raw.replace(b'"dtype":"U8"', b'"dtype":"I8"', 1))
    with pytest.raises(CheckpointError, match=r"packed is stored as I8, its format asks for U8"):
        hf.load(quantised)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_truncated_files(quantised, keep):
    file = quantised / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|no room|damaged"):
        hf.load(quantised)


def test_bad_weights_name_the_tensor_and_leave_the_old_checkpoint(sources, quantised, tmp_path):
    model = hf.load(sources / "native")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 5, 5] = float("nan")
    hf.save(model, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj.*not finite"):
        hf.load(tmp_path / "bad", quantize="int8")
    before = sorted((file.name, file.read_bytes()) for file in quantised.iterdir())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj.*not finite"):
        hf.convert(tmp_path / "bad", quantised, quantize="int4")
    assert sorted((file.name, file.read_bytes()) for file in quantised.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "quantised"]


# --- memory -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def medium(tmp_path_factory) -> Path:
    """300 MB in bfloat16, three layers; the quantised form beside it."""
    directory = tmp_path_factory.mktemp("medium")
    write_random(directory / "native", MEDIUM)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_memory_of_quantising_and_opening(medium):
    """Quantising holds pieces of a matrix, opening next to nothing, and running what it touches."""
    out = medium / "int4"
    peak, _ = peak_bytes(f"hf.convert({str(medium / 'native')!r}, {str(out)!r}, quantize='int4')")
    assert peak < 150_000_000
    size, bf16 = weight_bytes(out), weight_bytes(medium / "native")
    embedding = 2 * MEDIUM.vocab_size * MEDIUM.hidden_size
    # Experts in 4.25 bits a weight instead of 16, attention in 8, the head beside the embedding, and what stays.
    assert size < bf16 * 4.25 / 16 + 1.5 * embedding + 10_000_000
    peak, _ = peak_bytes(f"model = hf.load({str(out)!r})")
    assert peak < 0.2 * size
    code = f"model = hf.load({str(out)!r})\nmodel.model.layers[0].mlp.experts.gate_up_proj.packed.amax()"
    touched, _ = peak_bytes(code)
    assert 10_000_000 < touched - peak < 0.3 * size
    # In memory for an engine: all but the embedding table, once.
    for code in (
        f"model = hf.load({str(out)!r}, mapped=False)",
        f"model = hf.load({str(medium / 'native')!r}, quantize='int4')",
    ):
        peak, _ = peak_bytes(code)
        # The float model would be 300 MB; quantising takes pieces of 32 MB (as fp32) and what they need.
        assert 0.9 * (size - embedding) < peak < size - embedding + 110_000_000, (code, peak, size)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are asked for on Linux")
@pytest.mark.parametrize("settings", [{}, {"quantize": "int8", "mapped": False}])
def test_large_tensors_begin_with_a_large_page(medium, settings):
    model = hf.load(medium / "native", **settings)
    large = {name: tensor for name, tensor in model.state_dict().items() if tensor.nbytes >= LARGE_PAGE_BYTES}
    if settings:
        large.pop("model.embed_tokens.weight")
    assert len(large) >= 6 and not any(tensor.data_ptr() % LARGE_PAGE_BYTES for tensor in large.values())
