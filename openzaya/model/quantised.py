"""Quantised matrices as modules, and models that hold them.

The formats are those of quantised_formats.py. A :class:`QuantScheme` says which format each kind of matrix gets;
:func:`quantise_model` replaces the float matrices of a model one by one. Everything small stays in float: router,
convolutions, norms, scales and temperatures. So does the embedding table, of which a token reads one row; the head
is a quantised copy of it.

Shape suffixes: E experts, N rows, K columns, G = K/64 groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from openzaya.errors import CheckpointError, ConfigError, TrainingError
from openzaya.model.layers import Linear
from openzaya.model.quantised_formats import (
    FORMATS,
    GROUP,
    ROW_BLOCK,
    Format,
    pack,
    packed_shape,
    padded_size,
    quantise_activations,
    quantise_into,
    scales_dtype,
    scales_shape,
    unpack,
)

if TYPE_CHECKING:
    from openzaya.model.transformer import Zaya

__all__ = [
    "FORMATS",
    "GROUP",
    "ROW_BLOCK",
    "Format",
    "QuantScheme",
    "QuantisedMatrix",
    "Slot",
    "copy_weights_",
    "install",
    "pack",
    "padded_size",
    "prepare_quantised",
    "quantise_activations",
    "quantise_model",
    "quantised_slots",
    "unpack",
]


class QuantisedMatrix(nn.Module):
    """One matrix (rows, columns), or a stack of them, with quantised weights.

    Args:
        format: ``int8`` or ``int4``.
        rows, columns: of the matrix, without padding; it maps (..., columns) to (..., rows).
        leading: () or (E,).

    A new one is uninitialised; :meth:`from_matrix` makes one from weights.
    """

    packed: Tensor
    """uint8, see quantised_formats.py."""
    scales: Tensor

    def __init__(
        self,
        format: Format,
        rows: int,
        columns: int,
        leading: tuple[int, ...] = (),
        *,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if format not in FORMATS:
            raise CheckpointError(f"format={format!r}, expected one of {', '.join(FORMATS)}")
        self.format, self.rows, self.columns, self.leading = format, rows, columns, leading
        self.quantises_activations = True
        """False: multiply with activations as they come, to measure what rounding them costs."""
        shape = (format, rows, columns, leading)
        self.register_buffer("packed", torch.empty(packed_shape(*shape), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(scales_shape(*shape), dtype=scales_dtype(format), device=device))

    @classmethod
    def from_matrix(cls, weights: Tensor, format: Format) -> QuantisedMatrix:
        """The quantised form of float weights (N, K) or (E, N, K), on their device."""
        *leading, rows, columns = weights.shape
        matrix = cls(format, rows, columns, tuple(leading), device=weights.device)
        matrix.copy_from_(weights)
        return matrix

    @torch.no_grad()
    def copy_from_(self, weights: Tensor) -> None:
        """Quantise float weights of the same shape into the memory at hand.

        Raises:
            CheckpointError: another shape, a type that is not float, or values that are not finite.
        """
        if weights.shape != self.matrix_shape or not weights.dtype.is_floating_point:
            raise CheckpointError(
                f"weights of shape {tuple(weights.shape)} {weights.dtype} for a quantised matrix of shape "
                f"{tuple(self.matrix_shape)}; pass float weights of the same model"
            )
        if self.leading:
            for part, packed, scales in zip(weights, self.packed, self.scales, strict=True):
                quantise_into(part, packed, scales, self.format)
        else:
            quantise_into(weights, self.packed, self.scales, self.format)

    def dequantised(self, expert: int | None = None) -> Tensor:
        """fp32 weights (N, K): the whole stack (E, N, K), or one matrix of it."""
        packed, scales = (self.packed, self.scales) if expert is None else (self.packed[expert], self.scales[expert])
        return self._dequantise(packed, scales)[..., : self.rows, : self.columns]

    def _dequantise(self, packed: Tensor, scales: Tensor) -> Tensor:
        codes = unpack(packed, self.format).float()
        if self.format == "int8":
            return codes * scales.flatten(-2)[..., None]
        scales_NG = scales.float().transpose(-1, -2).flatten(-3, -2)
        return (codes.unflatten(-1, (-1, GROUP)) * scales_NG[..., None]).flatten(-2)

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x W^T (..., rows) in x's dtype, computed in fp32; of a stack, with one expert's matrix.

        Raises:
            TrainingError: a gradient is asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise TrainingError(
                "a gradient through a quantised matrix, whose weights are integers; train the original model and "
                "quantise the result"
            )
        weights = self.dequantised(expert)
        values = x.float()
        if self.quantises_activations:
            codes, scales = quantise_activations(values)
            values = (codes.float() * scales[..., None]).flatten(-2)[..., : self.columns]
        return F.linear(values, weights).to(x.dtype)

    @property
    def matrix_shape(self) -> torch.Size:
        """(N, K) or (E, N, K), without padding."""
        return torch.Size((*self.leading, self.rows, self.columns))

    @property
    def nbytes(self) -> int:
        """Memory of codes and scales."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def num_weights(self) -> int:
        """Weights that it stands for, padding not counted."""
        return self.matrix_shape.numel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedMatrix:
        """Moves between devices; ``model.to(dtype)`` must not round the scales, whose type belongs to the format."""
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.format}, shape={tuple(self.matrix_shape)}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in ("packed", "scales"):
            found = state_dict.get(prefix + name)
            if found is not None and found.dtype != getattr(self, name).dtype:
                raise CheckpointError(f"{prefix}{name} is {found.dtype}, expected {getattr(self, name).dtype}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)


# --- whole models ---------------------------------------------------------------------------------

FormatOrFloat = Literal["int8", "int4", "float"]


class QuantScheme(BaseModel):
    """The format of each kind of matrix; ``float`` leaves it as it is.

    Router, convolutions, norms, scales, temperatures and the embedding table always stay in float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate_up: FormatOrFloat
    """The experts' first matrices."""
    down: FormatOrFloat
    """The experts' second matrices."""
    attention: FormatOrFloat
    """All projections of attention, into it and out of it."""
    head: FormatOrFloat
    """The LM head: a copy of the embedding."""

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """A scheme from a name, or a name with exceptions: "int4", "int8,down=int4", "int4,head=float".

        ``int8`` and ``float`` mean that format for every matrix; ``int4`` is the mixture to take: experts in 4 bits,
        attention and head in 8. Four bits everywhere is "int4,attention=int4,head=int4".

        Raises:
            ConfigError: unknown kinds or formats, a kind twice, or nothing to quantise.
        """
        name, *exceptions = (part.strip() for part in text.split(","))
        known = get_args(FormatOrFloat)
        pairs: list[tuple[str, str]] = []
        for exception in exceptions:
            kind, _, format = (part.strip() for part in exception.partition("="))
            pairs.append((kind, format))
        unknown = [kind for kind, format in pairs if kind not in cls.model_fields or format not in known]
        if name not in _NAMED or unknown or len(dict(pairs)) < len(pairs):
            raise ConfigError(
                f"quantisation '{text}': expected int8, int4 or float, then exceptions of {', '.join(cls.model_fields)}"
                " each once, as in 'int4,head=float'"
            )
        scheme = cls(**{**_NAMED[name], **dict(pairs)})
        if set(scheme.model_dump().values()) == {"float"}:
            raise ConfigError(f"quantisation '{text}' leaves every matrix in float; name int8 or int4 for one of them")
        return scheme

    def __str__(self) -> str:
        """The shortest text that :meth:`parse` reads back."""
        formats = self.model_dump()
        texts: list[list[str]] = [
            [name, *(f"{kind}={format}" for kind, format in formats.items() if format != named[kind])]
            for name, named in _NAMED.items()
        ]
        shortest = min(texts, key=len)
        return ",".join(shortest)


_NAMED: dict[str, dict[str, FormatOrFloat]] = {
    "int8": dict.fromkeys(QuantScheme.model_fields, "int8"),
    "float": dict.fromkeys(QuantScheme.model_fields, "float"),
    # Most weights are the experts'. Attention and head are few, and rounding them costs more (docs/quantisation.md).
    "int4": {"gate_up": "int4", "down": "int4", "attention": "int8", "head": "int8"},
}
"""By the name in a text. Of two equally short texts the earlier name writes it: the others say what they mean."""


@dataclass(frozen=True)
class Slot:
    """A matrix of a model that a scheme quantises."""

    source: str
    """Name of the float parameter that it is made from."""
    name: str
    """Name of the quantised module; its tensors are ``name.packed`` and ``name.scales``."""
    format: Format
    shape: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    def empty(self, device: torch.device | str | None = None) -> QuantisedMatrix:
        *leading, rows, columns = self.shape
        return QuantisedMatrix(self.format, rows, columns, tuple(leading), device=device)


def quantised_slots(model: Zaya, scheme: QuantScheme) -> list[Slot]:
    """Every matrix of a float model that ``scheme`` quantises, in the order of the layers, the head last."""
    found: list[tuple[str, str, FormatOrFloat]] = []
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, Linear) and ".self_attn." in name:
            found.append((f"{name}.weight", name, scheme.attention))
        elif name.endswith(".mlp.experts"):
            found.append((f"{name}.gate_up_proj", f"{name}.gate_up_proj", scheme.gate_up))
            found.append((f"{name}.down_proj", f"{name}.down_proj", scheme.down))
    found.append(("model.embed_tokens.weight", "lm_head", scheme.head))
    return [
        Slot(source, name, format, tuple(model.get_parameter(source).shape))
        for source, name, format in found
        if format != "float"
    ]


def install(model: Zaya, name: str, matrix: QuantisedMatrix) -> None:
    """Put a quantised matrix where the model has a float one."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    parent._parameters.pop(leaf, None)
    setattr(parent, leaf, matrix)


def prepare_quantised(model: Zaya, scheme: QuantScheme) -> None:
    """Give a float model the modules of a quantised one, uninitialised, on the model's device."""
    for slot in quantised_slots(model, scheme):
        install(model, slot.name, slot.empty(model.device))
    _mark(model, scheme)


def quantise_model(
    model: Zaya, scheme: QuantScheme | str, *, progress: Callable[[int, int], None] | None = None
) -> Zaya:
    """Quantise a model in place, matrix by matrix, each float matrix freed before the next; returns the model.

    The result runs like any model (forward, cache, generation, ``save``), but cannot be trained.

    Args:
        scheme: or a text for :meth:`QuantScheme.parse`.
        progress: called with weights done and weights in all after each matrix.

    Raises:
        ConfigError: a scheme that cannot be read.
        CheckpointError: the model is quantised already, or holds weights that are not finite.
    """
    scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
    if model.quantisation is not None:
        raise CheckpointError(f"the model is quantised already ({model.quantisation}); start from the original weights")
    slots = quantised_slots(model, scheme)
    done, total = 0, sum(slot.num_weights for slot in slots)
    for slot in slots:
        matrix = QuantisedMatrix.from_matrix(model.get_parameter(slot.source), slot.format)
        install(model, slot.name, matrix)
        done += matrix.num_weights
        if progress is not None:
            progress(done, total)
    _mark(model, scheme)
    return model


def _mark(model: Zaya, scheme: QuantScheme) -> None:
    model.quantisation = scheme
    model.requires_grad_(False)
    model.eval()


@torch.no_grad()
def copy_weights_(model: Zaya, weights: Mapping[str, Tensor]) -> None:
    """Copy float tensors into a model, by the names of a float model; quantised matrices are quantised anew.

    A new embedding renews a quantised head as well. Memory stays where it is.

    Raises:
        CheckpointError: unknown names, other shapes, values that are not finite; nothing is changed then.
    """
    state = model.state_dict(keep_vars=True)
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedMatrix)}
    steps: list[tuple[QuantisedMatrix | Tensor, Tensor]] = []
    problems: list[str] = []
    for name, tensor in weights.items():
        places: list[QuantisedMatrix | Tensor] = []
        if name in state and name.rpartition(".")[0] not in matrices:
            places.append(state[name])
        matrix = matrices.get(name) or matrices.get(name.removesuffix(".weight"))
        if matrix is not None and matrix is not model.lm_head:
            places.append(matrix)
        if name == "model.embed_tokens.weight" and model.lm_head is not None:
            places.append(model.lm_head)
        shapes = {place.shape if isinstance(place, Tensor) else place.matrix_shape for place in places}
        if not places:
            problems.append(f"{name}: no such weight")
        elif shapes != {tensor.shape} or not tensor.dtype.is_floating_point:
            problems.append(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, expected float {tuple(shapes.pop())}")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{name}: holds values that are not finite")
        steps += [(place, tensor) for place in places]
    if problems:
        raise CheckpointError(f"weights do not fit the model: {'; '.join(problems[:10])}; pass those of the same shape")
    for place, tensor in steps:
        if isinstance(place, QuantisedMatrix):
            place.copy_from_(tensor)
        else:
            place.copy_(tensor)
