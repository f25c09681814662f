"""Mixtures of sources by token share, and the records that sources give.

The next example comes from the source whose share of the tokens so far is furthest below its weight:
shares follow the weights within one example, whatever the examples' lengths, and the order is a
function of the sources, the weights and the seed alone. The state is the sources' cursors and the
token counts, so a mixture resumes in the middle of an epoch exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from openzaya.errors import DataError

MAX_CONSECUTIVE_SKIPS = 10_000


@dataclass(frozen=True)
class Example:
    """One document: tokens, and which of them are training targets.

    ``loss_mask[t]`` says that token ``t`` is a target, predicted from the tokens before it. The first
    token of a document has none before it: sources leave it false.
    """

    tokens: list[int]
    loss_mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.loss_mask) or not self.tokens:
            raise DataError(
                f"an example has {len(self.tokens)} tokens and {len(self.loss_mask)} mask entries; give as many of "
                "both, at least 1"
            )


@runtime_checkable
class Source(Protocol):
    """An endless, deterministic stream of examples with a cursor.

    ``next_example`` moves the cursor by one item and returns it, or None where the item cannot be used
    (the source counts why, see ``report``). ``state_dict`` is JSON-able; after ``load_state_dict`` the
    stream continues as it did from there.
    """

    name: str

    def next_example(self) -> Example | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def report(self) -> dict[str, Any]: ...


class Mixture:
    """Draws examples from ``sources`` so that their token shares follow ``weights``.

    ``weights`` need not sum to one; a source with weight 0 is never drawn. ``seed`` orders sources
    that are equally far below their share.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        names = [source.name for source in sources]
        if not sources or len(weights) != len(sources):
            raise DataError(f"mixture: {len(sources)} sources and {len(weights)} weights; give one weight a source")
        if len(set(names)) != len(names):
            raise DataError(f"mixture: source names repeat in {names}; give each source its own name")
        if any(not 0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
            raise DataError(f"mixture: weights={list(weights)} must be 0 or more, finite, and not all 0")
        self.sources = list(sources)
        self.weights = [weight / sum(weights) for weight in weights]
        self.seed = seed
        self._tokens = [0] * len(sources)
        self._supervised = [0] * len(sources)
        self._examples = [0] * len(sources)
        self._tie_order = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]

    def next_example(self) -> Example:
        """The next example; ``DataError`` where a source gives no usable one for too long."""
        total = sum(self._tokens)
        chosen = max(
            (i for i, weight in enumerate(self.weights) if weight > 0),
            key=lambda i: (self.weights[i] * total - self._tokens[i], self._tie_order[i]),
        )
        source = self.sources[chosen]
        for _ in range(MAX_CONSECUTIVE_SKIPS):
            example = source.next_example()
            if example is not None:
                self._tokens[chosen] += len(example.tokens)
                self._supervised[chosen] += sum(example.loss_mask)
                self._examples[chosen] += 1
                return example
        raise DataError(
            f"source '{source.name}': {MAX_CONSECUTIVE_SKIPS} items in a row could not be used ({source.report()}); "
            "raise the context length, or take the source out"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: what was drawn from each source, and its cursor."""
        return {
            "seed": self.seed,
            "sources": {
                source.name: {
                    "weight": self.weights[i],
                    "tokens": self._tokens[i],
                    "supervised_tokens": self._supervised[i],
                    "examples": self._examples[i],
                    "cursor": source.state_dict(),
                }
                for i, source in enumerate(self.sources)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; ``DataError`` where it belongs to another mixture."""
        stored = state["sources"]
        weights = {name: entry["weight"] for name, entry in stored.items()}
        ours = dict(zip((source.name for source in self.sources), self.weights, strict=True))
        if state["seed"] != self.seed or weights != ours:
            raise DataError(
                f"the saved mixture has seed {state['seed']} and weights {weights}, this one has seed {self.seed} and "
                f"{ours}; resume with the same recipe, or start the phase anew"
            )
        for i, source in enumerate(self.sources):
            entry = stored[source.name]
            self._tokens[i] = entry["tokens"]
            self._supervised[i] = entry["supervised_tokens"]
            self._examples[i] = entry["examples"]
            source.load_state_dict(entry["cursor"])

    def report(self) -> dict[str, dict[str, Any]]:
        """For each source: weight, token share, counts, and the source's own report."""
        total = max(1, sum(self._tokens))
        return {
            source.name: {
                "weight": self.weights[i],
                "share": self._tokens[i] / total,
                "tokens": self._tokens[i],
                "supervised_tokens": self._supervised[i],
                "examples": self._examples[i],
                **source.report(),
            }
            for i, source in enumerate(self.sources)
        }
