"""The matrix products of the inference kernels against their plain twins, in every format and many shapes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from openzaya.infer.cpu_records import matrix_record
from openzaya.kernels import build
from openzaya.model.quantised import QuantisedMatrix
from tests.kernels.every_kernel import ROOT

pytestmark = pytest.mark.skipif(build.inference().library is None, reason="no inference kernels on this machine")

FORMATS = ("float32", "bfloat16", "int8", "int4")
SHAPES = [(1, 1), (16, 64), (17, 65), (5, 3), (48, 128), (33, 200), (272, 320), (130, 1000)]
TOKENS = (1, 2, 5, 6, 7, 13, 150)


def make(format: str, *shape: int) -> Tensor | QuantisedMatrix:
    weights = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return weights.to(getattr(torch, format)) if "float" in format else QuantisedMatrix.from_matrix(weights, format)


def kernel(matrix: Tensor | QuantisedMatrix, x: Tensor, *, expert: int = 0, threads: int = 1) -> Tensor:
    record = matrix_record(matrix)
    y = torch.full((x.shape[0], record.rows), float("nan"))
    library = build.inference().library
    assert library is not None
    library.cpu_product(
        threads,
        ctypes.byref(record),
        ctypes.c_int64(expert),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
    )
    return y


def twin(matrix: Tensor | QuantisedMatrix, x: Tensor, expert: int | None = None) -> Tensor:
    """In fp64, from operands rounded as the kernels round them: what is left is the order of sums in fp32."""
    if isinstance(matrix, QuantisedMatrix):
        return matrix(x, expert)
    weights = matrix if expert is None else matrix[expert]
    return (x.to(matrix.dtype).double() @ weights.double().T).float()


def inputs(tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens * columns))
    x[:, 0] *= 30  # an outlier, as residual streams have them
    return x


def assert_close(got: Tensor, want: Tensor) -> None:
    """To 1e-6 of what a sum of this many products adds up to."""
    scale = want.abs().max().clamp_min(1e-6)
    assert float(((got - want).abs() / scale).max()) < 2e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_its_twin(format, shape):
    matrix = make(format, *shape)
    for tokens in TOKENS:
        x = inputs(tokens, shape[1])
        assert_close(kernel(matrix, x), twin(matrix, x))


@pytest.mark.parametrize("format", FORMATS)
def test_each_expert_of_a_stack(format):
    matrix = make(format, 3, 40, 72)
    x = inputs(9, 72)
    for expert in range(3):
        assert_close(kernel(matrix, x, expert=expert), twin(matrix, x, expert))


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_does_not_feel_the_others(format):
    """Bit for bit: alone, in any tile, in the block of tokens behind, and with two threads."""
    matrix = make(format, 130, 200)
    x = inputs(261, 200)
    together = kernel(matrix, x)
    assert torch.equal(together, kernel(matrix, x, threads=2))
    for size in (1, 3, 11, 12, 100):
        pieces = [kernel(matrix, part.contiguous()) for part in x.split(size)]
        assert torch.equal(torch.cat(pieces), together), size


@pytest.mark.parametrize("format", FORMATS)
def test_no_token(format):
    assert kernel(make(format, 20, 64), torch.empty(0, 64)).shape == (0, 20)


@pytest.mark.parametrize("format", ("int8", "int4"))
def test_zeros_and_tiny_inputs(format):
    matrix = make(format, 20, 130)
    assert torch.equal(kernel(matrix, torch.zeros(3, 130)), torch.zeros(3, 20))
    x = inputs(3, 130) * 1e-28
    assert_close(kernel(matrix, x) * 1e28, twin(matrix, x) * 1e28)


def test_a_planted_fault_is_seen():
    """One code of 8 bits off by one, in the last row and column."""
    matrix = make("int8", 33, 200)
    x = inputs(4, 200)
    want = twin(matrix, x)
    matrix.packed[2, 49, 0, 3] += 1
    with pytest.raises(AssertionError):
        assert_close(kernel(matrix, x), want)


def test_every_tier_of_this_processor():
    """The narrower instruction sets, each in a process of its own."""
    possible = [tier for tier in build.TIERS if tier != build.inference_tier()]
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-x",
        "-k",
        "not every_tier and not tiles and not proves",
    ]
    files = ["tests/kernels/test_cpu_products.py", "tests/infer/test_cpu_runner.py"]
    if "OPENZAYA_CPU_TIER" in os.environ:
        pytest.skip("a tier is chosen already")
    for tier in possible:
        environment = os.environ | {"OPENZAYA_CPU_TIER": tier}
        result = subprocess.run([*run, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        if "this processor can run" in result.stdout + result.stderr:
            continue
        assert result.returncode == 0, tier + result.stdout[-2000:]
        assert " passed" in result.stdout and "skipped" not in result.stdout


def test_tiles_played_by_plain_code():
    """The kernel for AMX, on processors without it: the same tests, and bits equal to those of the other kernels."""
    if "OPENZAYA_KERNEL_FLAGS" in os.environ:
        pytest.skip("other flags are chosen already")
    environment = os.environ | {"OPENZAYA_KERNEL_FLAGS": "-DOZ_EMULATE_TILES"}
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", "not every_tier and not tiles"]
    file = "tests/kernels/test_cpu_products.py"
    result = subprocess.run([*run, file], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_a_library_proves_itself_in_a_process_of_its_own():
    """As those for instructions that could not be tried must; a damaged one does not pass."""
    library = build.inference().library
    assert library is not None
    command = [sys.executable, "-m", "openzaya.kernels.check"]
    assert subprocess.run([*command, library._name], cwd=ROOT, timeout=120).returncode == 0
    assert subprocess.run([*command, __file__], cwd=ROOT, capture_output=True, timeout=120).returncode != 0
