"""What ``inspect`` says about a checkpoint, as JSON and as text, and how its problems are worded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

_MAX_PROBLEMS_SHOWN = 40


@dataclass(frozen=True)
class Inspection:
    """Findings about one checkpoint directory; ``ok`` is false where loading would refuse."""

    path: str
    layout: str | None
    config: dict[str, Any] | None
    """Fields of ``ZayaConfig``, or None where config.json could not be read."""
    num_parameters: int
    num_tensors: int
    num_weight_bytes: int
    num_files: int
    dtypes: dict[str, int]
    """Stored type -> number of tensors."""
    has_tokenizer: bool
    has_chat_template: bool
    quantisation: dict[str, Any] | None = None
    """Of a quantised checkpoint: its scheme, the format of each kind of matrix, bits a weight and bytes a format."""
    groups: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    """Tensors that carry nothing of their own (a copy of the embedding as head, rotary frequencies)."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def with_warnings(self, warnings: list[str]) -> Inspection:
        """A copy that carries further warnings, each once."""
        return replace(self, warnings=list(dict.fromkeys([*self.warnings, *warnings])))

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``."""
        return {"ok": self.ok, **asdict(self)}

    def to_text(self) -> str:
        """A summary for people."""
        dtypes = ", ".join(f"{count} x {name}" for name, count in self.dtypes.items()) or "none"
        lines = [
            self.path,
            f"  layout      {self.layout or 'unknown'}",
            f"  parameters  {self.num_parameters:,}",
            f"  weights     {self.num_weight_bytes / 1e9:.3f} GB in {self.num_files} files, "
            f"{self.num_tensors} tensors ({dtypes})",
        ]
        if self.config is not None:
            sliding = sum(kind == "hybrid_sliding" for kind in self.config["layer_types"])
            lines += [
                f"  shape       {self.config['num_hidden_layers']} layers ({sliding} with a sliding window), "
                f"hidden {self.config['hidden_size']}, heads {self.config['num_attention_heads']} query "
                f"{self.config['num_key_value_heads']} key/value of {self.config['head_dim']}",
                f"  experts     {self.config['num_experts']} of width {self.config['moe_intermediate_size']}, "
                f"router {self.config['router_hidden_size']}, vocabulary {self.config['vocab_size']:,}",
                f"  variant     attention {self.config['attention']}, router {self.config['router']}, "
                f"residual {self.config['residual']}",
            ]
        found = [
            name for name, there in (("tokenizer", self.has_tokenizer), ("template", self.has_chat_template)) if there
        ]
        lines.append(f"  beside it   {', '.join(found) or 'no tokenizer'}")
        if self.quantisation is not None:
            formats = [
                f"{name} {entry['bytes'] / 1e9:.3f} GB, {entry['bits_per_weight']:.2f} bits a weight"
                for name, entry in self.quantisation["formats"].items()
            ]
            lines.append(f"  quantised   {self.quantisation['scheme']} ({'; '.join(formats)})")
        if self.groups:
            lines.append(f"  groups      {', '.join(self.groups)}")
        if self.ignored:
            lines.append(f"  ignored     {collapse_names(self.ignored)}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines.append(
            "  every key accounted for" if self.ok else f"  {len(self.problems)} problems: loading would refuse"
        )
        return "\n".join(lines)


def describe_problems(directory: Path, problems: list[str]) -> str:
    """One message with all problems."""
    shown = [f"  {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN]]
    if len(problems) > len(shown):
        shown.append(f"  and {len(problems) - len(shown)} more (see 'openzaya inspect')")
    return f"{directory} cannot be used as a checkpoint:\n" + "\n".join(shown)


def collapse_names(names: Sequence[str], limit: int = 8) -> str:
    """Tensor names with their numbers folded into ranges: ``model.layers.{0-39}.norm.weight``.

    At most ``limit`` patterns are listed.
    """
    patterns: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        patterns.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), []).append(numbers)
    texts = []
    for pattern, rows in patterns.items():
        ranges = []
        for column in zip(*rows, strict=True):
            low, high = min(column), max(column)
            ranges.append(str(low) if low == high else f"{{{low}-{high}}}")
        texts.append(pattern.format(*ranges) if ranges else pattern)
    if len(texts) > limit:
        texts = [*texts[:limit], f"and {len(texts) - limit} more kinds"]
    return ", ".join(texts)
