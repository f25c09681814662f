"""Plans: what is found, what fits, what is offered where it does not, and what a user can get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openzaya.errors import CheckpointError, ConfigError
from openzaya.machine import facts
from openzaya.machine.facts import Kernels, Machine
from openzaya.machine.memory import Memory
from openzaya.machine.plan import (
    KERNEL_SHARE,
    PYTORCH_SHARE,
    Plan,
    find_model,
    make_plan,
    num_quantised_weights,
    plan_text,
    quantising_rate,
)
from openzaya.machine.sizes import bytes_text, parse_tokens, seconds_text, tokens_text
from openzaya.model import hf
from openzaya.model.config import preset
from openzaya.model.quantised import QuantScheme
from openzaya.model.transformer import Zaya
from tests.command import error_line, openzaya

GB = 10**9
MACHINE = Machine(
    system="Linux",
    python="3.11",
    torch="2.13",
    processor="test",
    num_cores=2,
    allowed_cores=2.0,
    num_threads=2,
    instruction_sets=("avx2",),
    memory=Memory(24 * GB, 21 * GB, None),
    compiler="g++",
    openmp=True,
    training_kernels=Kernels(True),
    inference_kernels=Kernels(True, tier="avx2"),
    read_bandwidth=25e9,
    bandwidth_from="kernels",
    gpus=(),
    cache_directory="/nowhere",
    cache_free_bytes=50 * GB,
    cache_problem="",
    missing_packages=(),
)


def plan_8b(machine: Machine = MACHINE, **settings: object) -> Plan:
    return make_plan(find_model("zaya1-8b"), machine, weights_per_second=50e6, **settings)  # type: ignore[arg-type]


def test_zaya1_8b_int4() -> None:
    made = plan_8b(quantise="int4", context=32768, batch=16, cache_dtype="int8")
    parts = [*made.weights.values(), made.cache, made.state, made.activations, made.program]
    assert made.peak == sum(parts) and made.fits and made.remedies == ()
    assert 5.1 * GB < sum(made.weights.values()) < 5.12 * GB
    assert [(speed.batch, speed.context) for speed in made.speeds] == [(1, 1024), (1, 32768), (16, 1024), (16, 32768)]
    assert 21 < made.speeds[0].ceiling < 23 and made.speeds[0].expected == pytest.approx(
        KERNEL_SHARE * made.speeds[0].ceiling
    )
    assert made.download == pytest.approx(17.7e9, rel=0.01)
    assert made.disk == made.download + made.table + sum(made.weights.values())
    assert any("--cache-gb 14.6" in note for note in made.notes)
    assert not any("--cache-gb" in note for note in plan_8b(quantise="int4", context=8192).notes)
    assert made.quantise_seconds == num_quantised_weights(preset("zaya1-8b"), QuantScheme.parse("int4")) / 50e6
    text = plan_text(made)
    assert "fits: 20.3 GB of 21.0 GB" in text and "32k" in text and "25.0 GB/s" in text
    assert json.loads(json.dumps(made.to_dict()))["peak"] == made.peak


def test_what_does_not_fit_gets_remedies_that_do() -> None:
    made = plan_8b(context=32768, batch=16)
    assert made.fits is False
    assert made.remedies[0].startswith("--quantize int4 --cache-dtype int8")
    wider = plan_8b(quantise="int8", context=32768, batch=16)
    assert "--quantize int4 --cache-dtype int8: 20.3 GB" in wider.remedies
    for remedy in wider.remedies:
        words = remedy.split()
        if "--batch" in words:
            fewer = int(words[-1])
            assert plan_8b(quantise="int8", context=32768, batch=fewer).fits
            assert not plan_8b(quantise="int8", context=32768, batch=fewer + 1).fits
    huge = make_plan(find_model("zaya1-74b-preview"), MACHINE)
    assert len(huge.remedies) == 1 and "not even one sequence of one token fits" in huge.remedies[0]
    assert "does NOT fit" in plan_text(huge)


def test_memory_that_others_hold_and_memory_that_is_unknown() -> None:
    busy = replace(MACHINE, memory=Memory(24 * GB, 2 * GB, None))
    made = plan_8b(busy, quantise="int4")
    assert made.fits is False and any("other programs" in note for note in made.notes)
    unknown = plan_8b(replace(MACHINE, memory=Memory(None, None, None)))
    assert unknown.fits is None and "unknown" in plan_text(unknown)


def test_without_kernels_speed_is_that_of_pytorch_or_unknown() -> None:
    slow = replace(MACHINE, inference_kernels=Kernels(False, "no compiler"))
    speed = plan_8b(slow).speeds[0]
    assert speed.expected == pytest.approx(PYTORCH_SHARE * speed.ceiling)
    variant = replace(find_model("nano"), config=preset("nano").with_changes(attention="mla"))
    assert any("ablation variant" in note for note in make_plan(variant, MACHINE).notes)
    quantised = plan_8b(slow, quantise="int8")
    assert quantised.speeds[0].expected is None and "unknown" in plan_text(quantised) and quantised.notes


def test_a_checkpoint_is_planned_as_it_is(tmp_path: Path) -> None:
    model = Zaya(preset("smoke"), seed=0)
    hf.save(model, tmp_path / "plain", layout="native")
    plain = find_model(str(tmp_path / "plain"))
    assert (plain.config, plain.dtype, plain.scheme, plain.must_download) == (model.config, torch.float32, None, False)
    made = make_plan(plain, MACHINE, quantise="int8", weights_per_second=1e6)
    assert made.download == 0 and made.disk > 0 and made.context == 2048
    assert any("caches" in note for note in made.notes)

    hf.convert(tmp_path / "plain", tmp_path / "small", quantize="int4,head=int4")
    small = find_model(str(tmp_path / "small"))
    assert str(small.scheme) == "int4,head=int4"
    held = make_plan(small, MACHINE)
    assert held.disk == 0 and held.quantise_seconds is None
    stored = hf.inspect(tmp_path / "small").num_weight_bytes
    assert sum(held.weights.values()) + held.table == stored
    with pytest.raises(ConfigError, match="quantised already"):
        make_plan(small, MACHINE, quantise="int8")


def test_quantising_is_measured() -> None:
    assert quantising_rate("int8") > 1e5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 131_073}, "1 to 131072"),
        ({"context": 0}, "lower it"),
        ({"batch": 0}, "batch=0"),
        ({"cache_dtype": "int3"}, "auto, float32, bfloat16, int8"),
        ({"quantise": "int5"}, "int5"),
        ({"quantise": ""}, "expected int8"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_8b(**settings)


def test_models_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no preset"):
        find_model("zaya2")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        find_model(str(tmp_path))
    for content in ("{", "[]", '{"model_type": "llama"}', "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError):
            find_model(str(tmp_path))


def test_the_hub_gives_the_configuration_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hf.save(Zaya(preset("smoke"), seed=0), tmp_path, layout="native")
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = find_model("owner/name")
    assert asked == [("owner/name", "config.json")] and source.must_download and source.config == preset("smoke")

    def refuse(name: str, file: str) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=r"owner/name.*no network\).*HF_TOKEN"):
        find_model("owner/name")


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_BANDWIDTH_BUFFER_BYTES", 1 << 22)
    arguments = ("plan", "--model", "zaya1-8b", "--quantize", "int4", "--context", "32k", "--batch", "16")
    finished = openzaya(*arguments, "--json")
    assert finished.code == 0
    assert json.loads(finished.out)["context"] == 32768
    assert "expected int8" in error_line(openzaya("plan", "--model", "nano", "--quantize", "5"))
    assert "32k or 1M" in error_line(openzaya("plan", "--model", "nano", "--context", "long"))
    assert openzaya("plan").code == 2
    assert openzaya("plan", "--model", "nano", "--batch", "0").code == 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("32k", 32768),
        ("8K", 8192),
        ("131072", 131072),
        ("131_072", 131072),
        ("0.5M", 524288),
        (" 2 k ", 2048),
    ],
)
def test_token_counts(text: str, number: int) -> None:
    assert parse_tokens(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "k", "1.3", "1e3", "32kb", "½k", "٣", "9" * 400, "_1", "nan"])
def test_token_counts_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="number of tokens"):
        parse_tokens(text)


def test_units() -> None:
    assert [bytes_text(size) for size in (0, 999, 999.6e3, 9.994e9, 9.996e9, 99.96e9, 1.25e12)] == [
        *("0 bytes", "999 bytes", "1.00 MB", "9.99 GB", "10.0 GB", "100 GB", "1.25 TB")
    ]
    assert [tokens_text(number) for number in (1, 1023, 1024, 131072, 5000)] == ["1", "1,023", "1k", "128k", "5,000"]
    assert [seconds_text(seconds) for seconds in (4, 120, 7200)] == ["4 s", "2 min", "2.0 h"]
