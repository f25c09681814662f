"""Peak memory: loading needs the weights once, converting next to nothing. Each measurement is its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openzaya.model import hf
from openzaya.model.config import ZayaConfig, preset
from openzaya.model.hf_config import write_config
from openzaya.model.hf_files import DTYPE_NAMES, TensorToWrite, write_json, write_sharded
from openzaya.model.hf_names import tensor_table

ROOT = Path(__file__).parents[2]
GIGABYTE = 10**9

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")

# 300 MB in bfloat16, most of it in experts.
MEDIUM = preset("zaya1-8b").with_changes(
    num_hidden_layers=3, hidden_size=1024, moe_intermediate_size=768, vocab_size=20_000
)


def write_random(directory: Path, config: ZayaConfig) -> None:
    """A bfloat16 checkpoint with a random pattern, streamed to disk."""
    directory.mkdir()
    pattern = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return pattern.repeat(-(-count // pattern.numel()))[:count].to(dtype).view(shape)

    tensors = []
    for spec in tensor_table(config):
        dtype = torch.float32 if spec.dtype_policy == "float32" else torch.bfloat16

        def chunks(shape: tuple[int, ...] = spec.shape, dtype: torch.dtype = dtype):
            yield tensor(shape, dtype).view(-1).view(torch.uint8).numpy().data

        tensors.append(TensorToWrite(spec.native, DTYPE_NAMES[dtype], spec.shape, chunks))
    write_json(directory / "config.json", write_config(config, "native", "bfloat16"))
    write_sharded(directory, tensors, 5 * GIGABYTE)


def peak_bytes(code: str) -> tuple[int, dict[str, str]]:
    """Run ``code`` in a fresh interpreter; (growth of its peak memory behind the imports, what it put in ``out``).

    Read from /proc: the peak of ``resource.getrusage`` includes that of the process that started this one.
    """
    program = (
        "import json, re, torch\n"
        "from openzaya.model import hf\n"
        "import openzaya.model.transformer\n"
        "out = {}\n"
        "def memory(key):\n"
        "    return 1024 * int(re.search(key + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before = memory('VmRSS')\n"
        f"{code}\n"
        "out['peak'] = memory('VmHWM') - before\n"
        "print(json.dumps(out))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout.splitlines()[-1])
    return out.pop("peak"), out


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.fixture(scope="module")
def medium(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("medium")
    write_random(directory / "native", MEDIUM)
    hf.convert(directory / "native", directory / "legacy", to="legacy")
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("layout", ["native", "legacy"])
@pytest.mark.parametrize(("dtype", "factor"), [("auto", 1), ("float32", 2)])
def test_loading_holds_the_weights_once(medium, layout, dtype, factor):
    size = factor * weight_bytes(medium / layout)
    peak, _ = peak_bytes(f"model = hf.load({str(medium / layout)!r}, dtype={dtype!r})")
    # A second copy of the weights would be another 300 MB or more.
    assert 0.9 * size < peak < size + 120_000_000, (peak, size)


@pytest.mark.parametrize(("source", "to"), [("native", "legacy"), ("legacy", "native")])
def test_converting_streams(medium, tmp_path, source, to):
    peak, _ = peak_bytes(f"hf.convert({str(medium / source)!r}, {str(tmp_path / 'out')!r}, to={to!r})")
    shutil.rmtree(tmp_path / "out")
    assert peak < 120_000_000


def test_saving_holds_no_second_copy(medium, tmp_path):
    size = weight_bytes(medium / "native")
    out = str(tmp_path / "out")
    peak, _ = peak_bytes(f"hf.save(hf.load({str(medium / 'native')!r}), {out!r}, layout='legacy')")
    shutil.rmtree(out)
    assert peak < size + 120_000_000


SAMPLES = (
    "model.embed_tokens.weight",
    "model.layers.39.mlp.experts.gate_up_proj",
    "model.layers.17.self_attn.qkv_proj.conv_qk_grouped.weight",
    "model.layers.20.mlp.gate.balancing_biases",
)
DIGESTS = (
    "import hashlib\n"
    f"for name in {SAMPLES!r}:\n"
    "    tensor = model.state_dict()[name]\n"
    "    out[name] = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()\n"
)


@pytest.mark.slow
def test_full_size_8b_between_transformers_and_us(tmp_path):
    """17.7 GB written by transformers loads here, and what we write loads there, with equal bytes."""
    if (
        shutil.disk_usage(tmp_path).free < 40 * GIGABYTE
        or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 20 * GIGABYTE
    ):
        pytest.skip("needs 40 GB of free disk and 20 GB of free memory")
    theirs, legacy, ours = (str(tmp_path / name) for name in ("theirs", "legacy", "ours"))
    _, written = peak_bytes(
        "from transformers import ZayaConfig, ZayaForCausalLM\n"
        "with torch.device('meta'):\n"
        "    model = ZayaForCausalLM(ZayaConfig(dtype='bfloat16')).to(torch.bfloat16)\n"
        "model.to_empty(device='cpu')\n"
        "model.tie_weights()\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "pattern = torch.randn(1 << 20, generator=generator).mul_(0.02).bfloat16()\n"
        "with torch.no_grad():\n"
        "    for name, buffer in model.named_buffers():\n"
        "        if name.endswith('balancing_biases'):\n"
        "            buffer.data = torch.zeros(17)\n"
        "            buffer[-1] = -1\n"
        "    for number, parameter in enumerate(model.parameters()):\n"
        "        flat = parameter.view(-1)\n"
        "        for begin in range(0, flat.numel(), pattern.numel()):\n"
        "            part = flat[begin : begin + pattern.numel()]\n"
        "            part.copy_(pattern.roll(number + begin // 7)[: part.numel()])\n"
        f"model.save_pretrained({theirs!r})\n" + DIGESTS
    )
    size = weight_bytes(Path(theirs))
    assert size > 17.6 * GIGABYTE
    report = hf.inspect(theirs)
    assert report.ok and report.num_parameters == 8_840_488_784
    peak, loaded = peak_bytes(f"model = hf.load({theirs!r})\n" + DIGESTS)
    assert loaded == written
    assert peak < size + GIGABYTE

    # Disk holds two copies at a time.
    peak, _ = peak_bytes(f"hf.convert({theirs!r}, {legacy!r}, to='legacy')")
    assert peak < GIGABYTE
    shutil.rmtree(theirs)
    peak, _ = peak_bytes(f"hf.save(hf.load({legacy!r}), {ours!r})")
    assert peak < size + GIGABYTE
    shutil.rmtree(legacy)
    _, reloaded = peak_bytes(
        "from transformers import ZayaForCausalLM\n"
        f"model, info = ZayaForCausalLM.from_pretrained({ours!r}, dtype='auto', output_loading_info=True)\n"
        "assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))\n" + DIGESTS
    )
    shutil.rmtree(ours)
    assert reloaded == written
