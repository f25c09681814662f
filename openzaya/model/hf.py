"""Checkpoints in and out: load, save, convert and inspect, in three layouts.

* ``native``: what ``transformers`` >= 5.13 reads (``ZayaForCausalLM``), one layer = attention + experts.
* ``legacy``: the layout of ZAYA1-base and the ``-legacy`` repositories, twice as many sub-layers.
* ``openzaya``: ours, versioned, for what those cannot hold (ablation variants, extra tensor groups, quantised
  matrices; hf_quantised.py).

Everything starts with a survey of the directory: config.json, every safetensors header, and the table
of ``hf_names`` that says which tensors this configuration must have. Whatever does not fit becomes a
finding; loading and converting raise ONE error with all of them before anything is allocated or
written. Then bytes are copied tensor by tensor: a stacked expert tensor is the concatenation of the
legacy per-expert matrices (gate rows first in ``linear_fc1``), so converting is moving byte ranges and
changes none of them. Stored types are kept; ``load`` widens balancing biases to float32 always.

One difference no renaming can remove: where the router's skip class wins, legacy code outputs
probability * input, native code (and ours) 0. In released files it cannot win; a survey warns where it can.

The released files themselves were not loaded where this was developed; tests use miniatures with
their names and layout, and full-size random checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from openzaya.errors import CheckpointError
from openzaya.kernels.host import empty_in_large_pages
from openzaya.model import hf_files
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_config import Layout, write_config
from openzaya.model.hf_files import TensorToWrite
from openzaya.model.hf_names import dtype_policy, refuse_variant
from openzaya.model.hf_quantised import (
    Counting,
    Mapper,
    Progress,
    already_quantised,
    describe,
    quantise_stored,
    quantised_pair,
    write_scheme,
    write_tensors,
)
from openzaya.model.hf_report import Inspection
from openzaya.model.hf_survey import GROUP_PREFIX, empty_model, required_groups, survey_checkpoint, torch_dtype_name
from openzaya.model.hf_write import (
    TOKENIZER_FILES,
    Replacing,
    Target,
    check_layout,
    check_state,
    copy_side_files,
    from_state,
    from_stored,
    from_tensor,
    generation_config,
    targets,
    write_tokenizer,
)
from openzaya.model.hub import resolve
from openzaya.model.quantised import QuantScheme, quantised_slots

if TYPE_CHECKING:
    from openzaya.model.transformer import Zaya

DtypeChoice = Literal["auto", "float32", "bfloat16"] | torch.dtype

DEFAULT_SHARD_BYTES = 5 * 10**9
TABLE = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TensorGroup:
    """Extra tensors of an "openzaya" checkpoint (a reward head, quantisation scales).

    ``required`` means that the model is wrong without them: a reader that does not ask for the group refuses.
    """

    tensors: Mapping[str, torch.Tensor]
    required: bool = False


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: DtypeChoice = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    quantize: str | QuantScheme | None = None,
    mapped: bool = True,
    known_groups: Collection[str] = (),
) -> Zaya:
    """The model in a checkpoint of any layout, in evaluation mode.

    Args:
        path_or_hub_id: a directory, or ``owner/name`` on the hub (hub.py).
        dtype: ``auto`` keeps each tensor as stored; balancing biases are float32 in any case.
        device: where the tensors are put, one by one; peak memory is the weights and a little. On the CPU large
            ones lie in large pages, which are read faster.
        revision: branch, tag or commit of a hub id.
        quantize: a scheme (:class:`QuantScheme`) for a float checkpoint: its matrices are quantised as they are read,
            from the values stored. Peak memory is the quantised model and a little.
        mapped: on the CPU, leave the matrices of a quantised checkpoint in their file: open at once, and in memory as
            they are used. False copies them, as an engine does. An embedding table beside a quantised head stays in
            the file either way.
        known_groups: required tensor groups that the caller reads by itself, with :func:`load_group`.

    Raises:
        ConfigError: a scheme that cannot be read.
        CheckpointError: anything missing, unknown, truncated or inconsistent, or quantised already; nothing is
            half-loaded.
    """
    target = _parse_dtype(dtype)
    scheme = QuantScheme.parse(quantize) if isinstance(quantize, str) else quantize
    survey = survey_checkpoint(resolve(path_or_hub_id, revision))
    declared = survey.raw_config.get("dtype", survey.raw_config.get("torch_dtype"))
    main = torch_dtype_name(survey.main_dtype)
    if target is None and survey.tensors and declared is not None and str(declared).removeprefix("torch.") != main:
        survey.problems.append(
            f"config.json says dtype={declared!r}, most weights are {main}; correct it, or pass dtype explicitly"
        )
    required = [group for group in required_groups(survey) if group not in known_groups]
    if required:
        survey.problems.append(
            f"it is no plain language model: it needs its tensor groups {', '.join(required)}; load a reward_head with "
            "openzaya.rl.reward_model.RewardModel, and for any other upgrade openzaya"
        )
    if survey.scheme is not None and scheme is not None:
        survey.problems.append(already_quantised(survey.scheme))
    survey.refuse()

    to_quantise = [] if scheme is None else quantised_slots(empty_model(survey.known_config), scheme)
    scheme = scheme or survey.scheme
    model = empty_model(survey.known_config, scheme)
    mapper = Mapper() if scheme is not None and torch.device(device).type == "cpu" else None
    for slot in to_quantise:
        packed, scales = (
            _empty(meta.shape, meta.dtype, device) for meta in model.get_submodule(slot.name).buffers(recurse=False)
        )
        quantise_stored(slot, survey.sources[slot.source], packed, scales)
        _assign(model, f"{slot.name}.packed", packed)
        _assign(model, f"{slot.name}.scales", scales)
    for name, meta in model.state_dict().items():
        if not meta.is_meta:
            continue
        sources = survey.sources[name]
        stored_dtype, policy = hf_files.DTYPES[sources[0].dtype], dtype_policy(name)
        wanted = stored_dtype if target is None or policy == "stored" else target
        if policy == "float32":
            wanted = torch.float32
        is_table = name == TABLE and model.lm_head is not None
        stays = is_table or (mapped and survey.scheme is not None and meta.dim() > 1)
        if mapper is not None and stays and wanted == stored_dtype:
            _assign(model, name, mapper.tensor(sources[0]))
            continue
        tensor = _empty(meta.shape, wanted, device)
        parts = [tensor] if len(sources) == 1 else list(tensor)
        for source, part in zip(sources, parts, strict=True):
            hf_files.read_into(source, part)
        _assign(model, name, tensor)
    # Training a quantised model is refused at the first gradient that is asked for, so none is.
    return model.eval().requires_grad_(scheme is None)


def save(
    model: Zaya,
    path: str | Path,
    *,
    layout: Layout | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    groups: Mapping[str, TensorGroup] | None = None,
) -> Path:
    """Write a checkpoint; an existing one at ``path`` is replaced only when the new one is complete on disk.

    Args:
        layout: by default ``native``, and ``openzaya`` for a quantised model, which no other holds.
        tokenizer: something with ``save_pretrained(directory)``, or a directory or file to copy from.
        max_shard_bytes: weights beyond it are split into shards with an index.
        groups: extra tensors by name of their group ("openzaya" layout only).

    Raises:
        CheckpointError: the layout cannot hold this model, or ``path`` holds something else than a checkpoint.
    """
    scheme: QuantScheme | None = model.quantisation
    layout = layout or ("native" if scheme is None else "openzaya")
    check_layout(layout, max_shard_bytes)
    if scheme is not None and layout != "openzaya":
        raise CheckpointError(f"layout '{layout}' cannot hold a quantised model ({scheme}); use layout 'openzaya'")
    if groups and layout != "openzaya":
        raise CheckpointError(
            f"layout '{layout}' cannot hold tensor groups ({', '.join(groups)}); use layout 'openzaya'"
        )
    config: ZayaConfig = model.config
    if layout != "openzaya":
        refuse_variant(config, f"layout '{layout}'")
    state = model.state_dict()
    check_state(config, state, scheme)
    tensors: list[TensorToWrite] = []
    quantised = {name: tensor for name, tensor in state.items() if dtype_policy(name) == "stored"}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in quantised}
    for target in targets(config, shapes, layout):
        tensors += from_state(state[target.native], target)
    main = hf_files.main_dtype(tensors)
    pairs = [
        (from_tensor(name, state[name]), from_tensor(scales, state[scales]))
        for name, scales in ((name, name.removesuffix("packed") + "scales") for name in quantised if name.endswith("d"))
    ]
    for group, content in sorted((groups or {}).items()):
        tensors += [from_tensor(f"{GROUP_PREFIX}{group}.{name}", value) for name, value in content.tensors.items()]
    raw = write_config(config, layout, torch_dtype_name(main))
    if scheme is not None:
        raw["quantisation"] = write_scheme(scheme)
    if groups:
        raw["groups"] = {
            group: {"tensors": sorted(content.tensors), "required": content.required}
            for group, content in groups.items()
        }
    directory = Path(path).expanduser().resolve()
    with Replacing(directory) as temporary:
        hf_files.write_json(temporary / "config.json", raw)
        hf_files.write_json(temporary / "generation_config.json", generation_config(config))
        write_tensors(temporary, pairs, tensors, max_shard_bytes)
        write_tokenizer(tokenizer, temporary)
    return directory


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Layout | None = None,
    quantize: str | QuantScheme | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Rewrite a checkpoint in another layout, or quantise it; returns what was written.

    Without ``quantize`` no byte of any tensor changes. With it, the result is in the "openzaya" layout, which
    :func:`load` opens without reading it. Tokenizer and generation files are copied. Memory stays below 100 MB
    (quantising: below 200 MB) whatever the size. The result's ``warnings`` hold those of the source.

    Args:
        to: the layout; may be left out with ``quantize``.
        quantize: a scheme such as "int8" or "int4,head=float" (:class:`QuantScheme`).
        progress: called while quantising, see :data:`Progress`.

    Raises:
        ConfigError: a scheme that cannot be read.
        CheckpointError: the source has problems, or the layout cannot hold the result; nothing is written then.
    """
    scheme = QuantScheme.parse(quantize) if isinstance(quantize, str) else quantize
    if to is None and scheme is None:
        raise CheckpointError("neither a layout nor a quantisation to convert to; pass to= or quantize=")
    to = to or "openzaya"
    if scheme is not None and to != "openzaya":
        raise CheckpointError(f"layout '{to}' cannot hold a quantised model ({scheme}); use layout 'openzaya'")
    check_layout(to, max_shard_bytes)
    source = resolve(src, revision)
    destination = Path(dst).expanduser().resolve()
    if destination == source.resolve():
        raise CheckpointError(f"{dst} is the source itself; convert into another directory")
    survey = survey_checkpoint(source)
    if survey.groups and to != "openzaya":
        survey.problems.append(f"tensor groups {', '.join(survey.groups)} do not fit layout '{to}'; use 'openzaya'")
    if survey.scheme is not None and to != "openzaya":
        survey.problems.append(
            f"it is quantised ({survey.scheme}), which layout '{to}' cannot hold; convert the original weights"
        )
    if survey.scheme is not None and scheme is not None:
        survey.problems.append(already_quantised(survey.scheme))
    for native, stored in survey.sources.items():
        if len({part.dtype for part in stored}) > 1:
            survey.problems.append(f"{native}: its experts are stored in different types; write them in one type")
    survey.refuse()
    config = survey.known_config

    scheme = scheme or survey.scheme
    slots = [] if scheme is None else quantised_slots(empty_model(config), scheme)
    counting = Counting(sum(slot.num_weights for slot in slots), progress)
    pairs = [quantised_pair(slot, survey.sources, counting) for slot in slots]
    replaced = {slot.source for slot in slots if slot.name != "lm_head"}
    kept = {
        name: shape for name, shape in survey.shapes.items() if name not in replaced and dtype_policy(name) != "stored"
    }
    tensors: list[TensorToWrite] = []
    for target in targets(config, kept, to):
        tensors += from_stored(survey.sources[target.native], target)
    for content in survey.groups.values():
        for extra in content.values():
            tensors += from_stored((extra,), Target(extra.name, (extra.name,), extra.shape))
    raw = write_config(config, to, torch_dtype_name(survey.main_dtype))
    if scheme is not None:
        raw["quantisation"] = write_scheme(scheme)
    if survey.groups:
        raw["groups"] = survey.raw_config["groups"]
    with Replacing(destination) as temporary:
        hf_files.write_json(temporary / "config.json", raw)
        write_tensors(temporary, pairs, tensors, max_shard_bytes)
        copy_side_files(source, temporary)
        if not (temporary / "generation_config.json").exists():
            hf_files.write_json(temporary / "generation_config.json", generation_config(config))
    result = inspect(destination)
    return result.with_warnings(survey.warnings)


def inspect(path_or_hub_id: str | Path, *, revision: str | None = None) -> Inspection:
    """What a checkpoint is and everything that is wrong with it; reads headers and vectors only.

    Raises:
        CheckpointError: only if the path cannot be resolved; problems inside are reported, not raised.
    """
    survey = survey_checkpoint(resolve(path_or_hub_id, revision))
    dtypes: dict[str, int] = {}
    for tensor in survey.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    ignored = set(survey.ignored)
    slots = (
        quantised_slots(empty_model(survey.config), survey.scheme)
        if survey.scheme is not None and survey.config is not None
        else []
    )
    parameters = [
        stored
        for name, stored in survey.tensors.items()
        if name not in ignored and not name.startswith(GROUP_PREFIX) and dtype_policy(name) == "weight"
    ]
    return Inspection(
        path=str(survey.directory),
        layout=survey.layout,
        config=None if survey.config is None else survey.config.model_dump(mode="json"),
        num_parameters=sum(stored.num_elements for stored in parameters)
        + sum(slot.num_weights for slot in slots if slot.name != "lm_head"),
        num_tensors=len(survey.tensors),
        num_weight_bytes=sum(stored.num_bytes for stored in survey.tensors.values()),
        num_files=len({stored.file for stored in survey.tensors.values()}),
        dtypes=dict(sorted(dtypes.items())),
        has_tokenizer=any((survey.directory / name).exists() for name in TOKENIZER_FILES),
        has_chat_template=(survey.directory / "chat_template.jinja").exists(),
        quantisation=None if survey.scheme is None else describe(slots, survey.scheme, survey.tensors),
        groups=sorted(survey.groups),
        missing=survey.missing,
        unexpected=survey.unexpected,
        wrong_shape=survey.wrong_shape,
        ignored=survey.ignored,
        problems=survey.problems,
        warnings=survey.warnings,
    )


def load_group(path_or_hub_id: str | Path, group: str) -> dict[str, torch.Tensor]:
    """The tensors of one extra group of an "openzaya" checkpoint, as stored."""
    survey = survey_checkpoint(resolve(path_or_hub_id))
    survey.refuse()
    if group not in survey.groups:
        raise CheckpointError(
            f"no tensor group '{group}' in {survey.directory}; it holds: {sorted(survey.groups) or 'none'}; name a "
            "checkpoint that was saved with it"
        )
    result = {}
    for name, stored in survey.groups[group].items():
        result[name] = torch.empty(stored.shape, dtype=hf_files.DTYPES[stored.dtype])
        hf_files.read_into(stored, result[name])
    return result


def _parse_dtype(dtype: DtypeChoice) -> torch.dtype | None:
    named = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(f"dtype={dtype} cannot hold the model's weights; use float32 or bfloat16")
        return dtype
    if dtype not in named:
        raise CheckpointError(f"dtype={dtype!r}, expected one of {', '.join(named)} or a torch.dtype")
    return named[dtype]


def _empty(shape: torch.Size, dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return empty_in_large_pages(*shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _assign(model: Zaya, name: str, tensor: torch.Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor)
