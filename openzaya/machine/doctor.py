"""What ``openzaya doctor`` says of a machine: its facts, what does not work, and how fast ZAYA1-8B would run.

A *problem* is something set up wrongly (a compiler that fails, a cache directory that cannot be written to): the exit
code is 1. A *notice* is something that works in a slower way or is not there: the exit code stays 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from openzaya import __version__
from openzaya.machine.costs import costs_of
from openzaya.machine.facts import Kernels, Machine
from openzaya.machine.plan import expected_speed
from openzaya.machine.sizes import bytes_text
from openzaya.model.config import preset
from openzaya.model.quantised import QuantScheme

_EXAMPLE_MODEL = "zaya1-8b"
_EXAMPLE_CONTEXT = 1024
SLOW_BANDWIDTH = 8e9
"""Less than one channel of DDR4 memory gives: something else is using the machine, or threads are too few."""


@dataclass(frozen=True)
class Outlook:
    """How a model would do here."""

    weights: str
    peak_bytes: int
    fits: bool | None
    tokens_per_second: float | None
    """Expected at batch 1; None where it is unknown."""


@dataclass(frozen=True)
class Diagnosis:
    """The report of ``openzaya doctor``."""

    machine: Machine
    problems: tuple[str, ...]
    notices: tuple[str, ...]
    outlooks: tuple[Outlook, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``."""
        return {"ok": self.ok, "version": __version__, **asdict(self)}


def diagnose(machine: Machine) -> Diagnosis:
    """Judge the facts."""
    problems: list[str] = []
    notices: list[str] = []
    kernels = machine.inference_kernels
    if not kernels.built:
        what = "quantised weights run slowly, float ones at about half the speed"
        if "OPENZAYA_KERNELS=0" in kernels.problem:
            notices.append(f"kernels are turned off (OPENZAYA_KERNELS=0): PyTorch runs everything; {what}")
        elif "no C++ compiler" in kernels.problem:
            notices.append(
                f"no C++ compiler, so no kernels: PyTorch runs everything; {what}. Install g++ or clang++, or name one "
                "in CXX"
            )
        elif kernels.tier is None and "OPENZAYA_CPU_TIER" not in kernels.problem:
            notices.append(f"no kernels for this processor: PyTorch runs everything; {what} ({kernels.problem})")
        else:
            problems.append(f"the inference kernels cannot be built: {kernels.problem}")
    if kernels.built and not machine.training_kernels.built:
        problems.append("the training kernels cannot be built although those for inference can; the log says why")
    if machine.cache_problem:
        problems.append(machine.cache_problem)
    if machine.missing_packages:
        notices.append(f"'openzaya serve' needs {', '.join(machine.missing_packages)}: pip install 'openzaya[serve]'")
    if machine.sandbox_problem:
        notices.append(f"environments that run programs are not to be had: {machine.sandbox_problem}")
    if machine.allowed_cores < machine.num_threads:
        notices.append(
            f"{machine.num_threads} threads on {machine.allowed_cores:g} processors that this process may use: they "
            "will wait for each other; set OMP_NUM_THREADS"
        )
    elif machine.num_threads < int(machine.allowed_cores) // 2:
        notices.append(f"{machine.num_threads} threads on {machine.allowed_cores:g} processors; raise OMP_NUM_THREADS")
    if machine.read_bandwidth < SLOW_BANDWIDTH:
        notices.append(
            f"memory reads at only {bytes_text(machine.read_bandwidth)}/s: other programs may be using it, look again"
        )
    if machine.gpus:
        notices.append("the GPU is used only with --device, through PyTorch; this path has not been tested on a GPU")
    return Diagnosis(machine, tuple(problems), tuple(notices), _outlooks(machine))


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """The report for people."""
    machine = diagnosis.machine
    memory = machine.memory
    sizes = ["unknown" if size is None else bytes_text(size) for size in (memory.total, memory.available)]
    container = "" if memory.container_limit is None else f" (container limit {bytes_text(memory.container_limit)})"
    free = "" if machine.cache_free_bytes is None else f", {bytes_text(machine.cache_free_bytes)} free"
    rows = [
        ("openzaya", f"{__version__}, Python {machine.python}, PyTorch {machine.torch}"),
        ("system", machine.system),
        ("processor", f"{machine.processor}, {machine.num_cores} logical cores, {machine.allowed_cores:g} allowed"),
        ("instructions", " ".join(machine.instruction_sets) or "unknown"),
        ("memory", f"{sizes[0]}, {sizes[1]} free{container}"),
        ("bandwidth", f"{bytes_text(machine.read_bandwidth)}/s read by {machine.num_threads} threads "
         f"({machine.bandwidth_from})"),
        ("compiler", machine.compiler or "none"),
        ("OpenMP", "yes" if machine.openmp else "no"),
        ("kernels", f"inference {_kernels_text(machine.inference_kernels)}, "
         f"training {_kernels_text(machine.training_kernels)}"),
        ("cache", f"{machine.cache_directory or 'none'}{free}"),
        ("sandbox", machine.sandbox or "none"),
        ("GPU", ", ".join(machine.gpus) or "none"),
    ]  # fmt: skip
    lines = [f"{name:<14}{value}" for name, value in rows]
    lines += ["", f"{_EXAMPLE_MODEL} here, one sequence of {_EXAMPLE_CONTEXT} tokens:"]
    for outlook in diagnosis.outlooks:
        rate = outlook.tokens_per_second
        speed = "speed unknown" if rate is None else f"about {rate:.3g} tokens/s"
        fits = {True: "", False: "; does NOT fit into the free memory", None: ""}[outlook.fits]
        lines.append(f"  {outlook.weights:<10}{bytes_text(outlook.peak_bytes):>8}, {speed}{fits}")
    lines += ["", *(f"notice: {notice}" for notice in diagnosis.notices)] if diagnosis.notices else []
    lines += ["", *(f"problem: {problem}" for problem in diagnosis.problems)] if diagnosis.problems else []
    return "\n".join([*lines, "", "everything works" if diagnosis.ok else "something is set up wrongly, see above"])


def _kernels_text(kernels: Kernels) -> str:
    return f"built{f' ({kernels.tier})' if kernels.tier else ''}" if kernels.built else "off"


def _outlooks(machine: Machine) -> tuple[Outlook, ...]:
    result = []
    for name in ("int4", "int8", "bfloat16"):
        scheme = None if name == "bfloat16" else QuantScheme.parse(name)
        costs = costs_of(preset(_EXAMPLE_MODEL), scheme, torch.bfloat16)
        peak = costs.peak_bytes(_EXAMPLE_CONTEXT, 1)
        available = machine.memory.available
        speed = expected_speed(costs, machine, scheme is not None, _EXAMPLE_CONTEXT, 1)
        result.append(Outlook(name, peak, None if available is None else peak <= available, speed.expected))
    return tuple(result)
