"""A process of its own that runs every kernel, or its plain twin where there are none, and reports on itself.

    python -m tests.kernels.every_kernel TENSORS_FILE

Writes outputs and gradients to the file and prints one JSON object: which kernels were called, whether a second run
gave the same bits, the notices in the log, and the process's threads before and at the end of any kernel.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openzaya.kernels import build, calls, experts
from openzaya.kernels.experts import experts as run_experts
from openzaya.model.experts import loop_experts
from openzaya.model.transformer import Zaya
from openzaya.train.loss import linear_cross_entropy
from tests.model.reference import TINY, perturb

ROOT = Path(__file__).parent.parent.parent


class Report(dict[str, Any]):
    """What a process said: its JSON object, and its tensors by name."""

    tensors: dict[str, Tensor]


def start(tensors: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the process with two threads and the given variables, the settings of the kernels cleared before."""
    cleared = {"OPENZAYA_KERNELS", "OPENZAYA_KERNEL_FLAGS", "OPENZAYA_CACHE", "CXX"}
    variables = {name: value for name, value in os.environ.items() if name not in cleared}
    command = [sys.executable, "-m", "tests.kernels.every_kernel", str(tensors)]
    variables |= {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"} | environment
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str], tensors: Path) -> Report:
    """Wait for a started process and read what it left."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, f"exit {process.returncode}: {errors[-2000:]}"
    report = Report(json.loads(output.splitlines()[-1]))
    report.tensors = torch.load(tensors)
    return report


OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 3e-5
"""Gradients of three layers, summed over 300 tokens: in fp32 kernels and twins are each 1e-5 off those in fp64."""


def assert_same_numbers(one: Report, other: Report) -> None:
    """The largest difference between two processes' tensors, each relative to its largest entry, is rounding."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        twin = other.tensors[name]
        difference = float((tensor - twin).abs().max()) / max(float(twin.abs().max()), 1e-6)
        limit = OUTPUT_TOLERANCE if name in ("hidden", "loss", "large") else GRADIENT_TOLERANCE
        assert difference < limit, f"{name} differs by {difference:.2e}"


def compute() -> dict[str, Tensor]:
    """Loss and gradients of a small model on packed documents, and large experts by themselves."""
    generator = torch.Generator().manual_seed(3)
    model = Zaya(TINY)
    perturb(model, generator)
    tokens = torch.randint(1, TINY.vocab_size, (2, 150), generator=generator)
    document_ids = torch.randint(0, 2, (2, 150), generator=generator).cumsum(1) // 20
    hidden = model.hidden_states(tokens, document_ids=document_ids).flatten(0, 1)
    mask = torch.rand(300, generator=generator) < 0.9
    loss = linear_cross_entropy(hidden, model.head_weight, tokens.view(-1), mask, scale=0.01)
    loss.backward()
    results = {"hidden": hidden.detach(), "loss": loss.detach()}
    results |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    shapes = {"x": (90, 16), "gate": (90,), "gate_up": (3, 20, 16), "down": (3, 16, 10)}
    leaves = {k: torch.randn(shape, generator=generator).requires_grad_() for k, shape in shapes.items()}
    choice = torch.randint(0, 4, (90,), generator=generator)
    large, experts.LARGE_EXPERT = experts.LARGE_EXPERT, 0
    function = run_experts if calls.suits(leaves["x"]) else loop_experts
    output = function(leaves["x"], choice, leaves["gate"], leaves["gate_up"], leaves["down"])
    output.square().sum().backward()
    experts.LARGE_EXPERT = large
    return results | {"large": output.detach()} | {f"large.{name}": leaf.grad for name, leaf in leaves.items()}


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def main() -> None:
    notices: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("openzaya").addHandler(handler)
    called: set[str] = set()
    threads: list[int] = []
    library = build.library()

    class Recorder:
        """The library, watched at the border to C: what is called, and how many threads there are behind it."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            def watched(*arguments: Any) -> None:
                called.add(name)
                getattr(library, name)(*arguments)
                threads.append(num_threads())

            return watched

    recorder = Recorder()
    calls.library = lambda: library and recorder  # type: ignore[assignment]
    # PyTorch's own threads: both pools, that of its loops and that of its matrix products.
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    numbers.view(1024, 1024) @ numbers.exp().view(1024, 1024)
    threads_before = num_threads()
    first, second = compute(), compute()
    torch.save(first, sys.argv[1])
    report = {
        "available": build.available(),
        "called": sorted(called),
        "same_bits": all(torch.equal(tensor, second[name]) for name, tensor in first.items()),
        "notices": notices,
        "num_threads": torch.get_num_threads(),
        "threads_before": threads_before,
        "threads_after": max(threads, default=0),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
