"""The survey of a checkpoint directory: everything in it held against what its configuration asks for.

Reads config.json and all safetensors headers, decides the layout, matches every tensor by name, shape
and type with the table of ``hf_names`` (or, for the "openzaya" layout, with the model built on the
meta device) and notes where each native tensor's bytes are. Findings are collected, not raised, so that
``inspect`` can show them and ``load`` can refuse with all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openzaya.errors import CheckpointError
from openzaya.model import hf_files
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_config import Layout, layout_of_config, read_config
from openzaya.model.hf_files import StoredTensor
from openzaya.model.hf_names import dtype_policy, is_ignorable, layout_of_names, tensor_table
from openzaya.model.hf_quantised import check_stored_types, read_scheme
from openzaya.model.hf_report import collapse_names, describe_problems
from openzaya.model.quantised import QuantScheme, prepare_quantised

if TYPE_CHECKING:
    from openzaya.model.transformer import Zaya

GROUP_PREFIX = "group."
"""Tensor names of extra groups in the "openzaya" layout: group.<group>.<name>."""
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


@dataclass
class Survey:
    """What is in a checkpoint directory, and everything that is wrong with it."""

    directory: Path
    raw_config: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    config: ZayaConfig | None = None
    scheme: QuantScheme | None = None
    """How the matrices are quantised ("openzaya" layout only)."""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    sources: dict[str, tuple[StoredTensor, ...]] = field(default_factory=dict)
    """Native name -> the stored tensors whose concatenation it is."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Native name -> the shape that the configuration asks for."""
    groups: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Raise one error with all problems, if there are any."""
        if self.problems:
            raise CheckpointError(describe_problems(self.directory, self.problems))

    @property
    def known_config(self) -> ZayaConfig:
        if self.config is None:
            raise CheckpointError(f"{self.directory}: config.json could not be read; see the other problems")
        return self.config

    @property
    def main_dtype(self) -> str:
        """Stored type of most weight bytes, quantised matrices not counted."""
        counted = [parts for name, parts in self.sources.items() if dtype_policy(name) != "stored"]
        return hf_files.main_dtype([stored for parts in counted for stored in parts])


def torch_dtype_name(stored: str) -> str:
    """ "BF16" -> "bfloat16"."""
    dtype = hf_files.DTYPES.get(stored)
    return str(dtype).removeprefix("torch.") if dtype is not None else stored.lower()


def empty_model(config: ZayaConfig, scheme: QuantScheme | None = None) -> Zaya:
    """The model without its weights (device "meta"), with quantised matrices where ``scheme`` has them."""
    from openzaya.model.transformer import Zaya

    with torch.device("meta"):
        model = Zaya(config)
        if scheme is not None:
            prepare_quantised(model, scheme)
        return model


def survey_checkpoint(directory: Path) -> Survey:
    survey = Survey(directory)
    if not any(directory.iterdir()):
        survey.problems.append("the directory is empty; expected config.json and safetensors files")
        return survey
    try:
        if not (directory / "config.json").exists():
            raise CheckpointError("config.json is missing; expected one beside the weights")
        survey.raw_config = hf_files.read_json(directory / "config.json")
        survey.layout = layout_of_config(survey.raw_config)
        survey.config = read_config(survey.raw_config, survey.layout)
        if survey.layout == "openzaya":
            survey.scheme = read_scheme(survey.raw_config)
    except CheckpointError as error:
        survey.problems.append(str(error))
    file_problems: list[str] = []
    survey.tensors = hf_files.read_tensor_list(directory, file_problems)
    survey.problems += file_problems
    names_say = layout_of_names(list(survey.tensors))
    if survey.layout in ("native", "legacy") and names_say not in (survey.layout, "unknown"):
        survey.problems.append(
            f"config.json is in the {survey.layout} layout, the tensor names are {names_say}; "
            "take config.json and weights from the same checkpoint"
        )
    elif survey.config is not None and survey.layout is not None and survey.tensors:
        _match_tensors(survey, survey.config, survey.layout, files_intact=not file_problems)
    return survey


def _match_tensors(survey: Survey, config: ZayaConfig, layout: Layout, *, files_intact: bool) -> None:
    """Hold every stored tensor against what the configuration asks for."""
    remaining = dict(survey.tensors)
    expected: list[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]]]
    if layout == "openzaya":
        _take_groups(survey, remaining)
        state = empty_model(config, survey.scheme).state_dict()
        shapes = {name: tuple(meta.shape) for name, meta in state.items()}
        survey.problems += check_stored_types(state, survey.tensors)
        expected = [(name, (name,), shape, shape) for name, shape in shapes.items()]
    else:
        expected = [
            (spec.native, spec.legacy, spec.legacy_shape, spec.shape)
            if layout == "legacy"
            else (spec.native, (spec.native,), spec.shape, spec.shape)
            for spec in tensor_table(config)
        ]

    wrong_dtypes: dict[str, list[str]] = {}
    for native, names, shape, native_shape in expected:
        found = []
        for name in names:
            stored = remaining.pop(name, None)
            if stored is None:
                survey.missing.append(name)
                continue
            if stored.shape != shape:
                survey.wrong_shape[name] = f"{list(stored.shape)}, config.json asks for {list(shape)}"
            if stored.dtype not in hf_files.WEIGHT_DTYPES and dtype_policy(native) != "stored":
                wrong_dtypes.setdefault(stored.dtype, []).append(name)
            found.append(stored)
        survey.sources[native] = tuple(found)
        survey.shapes[native] = native_shape

    _check_head(survey, remaining)
    for name in sorted(remaining):
        (survey.ignored if is_ignorable(name) else survey.unexpected).append(name)
    # Tensors of an unreadable file are missing for the reason already given.
    if survey.missing and files_intact:
        survey.problems.append(
            f"{len(survey.missing)} tensors are missing: {collapse_names(survey.missing)}; "
            "correct config.json if they should not exist, or download or write the weights again"
        )
    if survey.unexpected:
        survey.problems.append(
            f"{len(survey.unexpected)} unexpected tensors: {collapse_names(survey.unexpected)}; "
            "config.json does not know them, correct it or remove them"
        )
    by_shape: dict[str, list[str]] = {}
    for name, text in survey.wrong_shape.items():
        by_shape.setdefault(text, []).append(name)
    for text, names_of in by_shape.items():
        survey.problems.append(
            f"{collapse_names(names_of)}: shape {text}; correct config.json or take the weights that belong to it"
        )
    for dtype, names_of in wrong_dtypes.items():
        survey.problems.append(
            f"{len(names_of)} tensors are stored as {dtype}: {collapse_names(names_of)}; expected one of "
            f"{', '.join(hf_files.WEIGHT_DTYPES)}: use an unquantised checkpoint"
        )
    if not survey.problems:
        _check_balancing_biases(survey, config)


def _check_head(survey: Survey, remaining: dict[str, StoredTensor]) -> None:
    """The head is the embedding; a copy of it in the file must be identical."""
    head, embedding = remaining.pop(_HEAD, None), survey.tensors.get(_EMBEDDING)
    if head is None or embedding is None:
        return
    if hf_files.same_bytes(head, embedding):
        survey.ignored.append(_HEAD)
    else:
        survey.problems.append(
            f"{_HEAD} differs from {_EMBEDDING}: untied heads are not supported; remove it, or tie the weights first"
        )


def _check_balancing_biases(survey: Survey, config: ZayaConfig) -> None:
    """Warn where the skip class can win (layouts disagree on its output) and where biases are stored coarsely."""
    layers = []
    coarse = False
    for native, stored in survey.sources.items():
        if not native.endswith("mlp.gate.balancing_biases"):
            continue
        biases = hf_files.read_small(stored[0])
        coarse |= stored[0].dtype != "F32"
        # The skip class wins at most with probability 1 against experts with probability 0.
        if not torch.isfinite(biases).all():
            survey.problems.append(f"{stored[0].name} holds values that are not finite; take an intact checkpoint")
        elif float(biases[:-1].max()) < 1 + float(biases[-1]):
            layers.append(native.split(".")[2])
    if layers:
        survey.warnings.append(
            f"the skip class can win in layers {', '.join(layers)} (no expert's balancing bias reaches the skip bias "
            "+ 1): legacy code then outputs probability * input, native code and this one 0"
        )
    if coarse:
        survey.warnings.append("balancing biases are stored in less than float32; load widens them")


def _take_groups(survey: Survey, remaining: dict[str, StoredTensor]) -> None:
    declared = survey.raw_config.get("groups", {})
    if not isinstance(declared, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("tensors"), list) and isinstance(entry.get("required"), bool)
        for entry in declared.values()
    ):
        survey.problems.append("config.json: 'groups' must give 'tensors' and 'required' for each; write it again")
        return
    for group, entry in declared.items():
        survey.groups[group] = {}
        for name in entry["tensors"]:
            stored = remaining.pop(f"{GROUP_PREFIX}{group}.{name}", None)
            if stored is None:
                survey.missing.append(f"{GROUP_PREFIX}{group}.{name}")
            elif stored.dtype not in hf_files.DTYPES:
                survey.problems.append(
                    f"{stored.name} is stored as {stored.dtype}, which is not supported; write it again"
                )
            else:
                survey.groups[group][name] = stored


def required_groups(survey: Survey) -> list[str]:
    return [group for group in survey.groups if survey.raw_config["groups"][group]["required"]]
