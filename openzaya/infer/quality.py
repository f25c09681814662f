"""What quantisation costs: a quantised model beside its original, on the same text.

    per layer   NMSE |x' - x|^2 / |x|^2 of the hidden states behind it, and how often both chose the same expert:
                "alone" with the original's input at this layer, "running" behind all quantised layers before it
    at the end  KL(original || quantised) of the next-token distributions, how often the most likely token is the
                same, and both models' loss on the text
    generating  long completions, greedy and sampled, of both models: how repetitive they are, and how many ended in
                a loop

A token visits one expert in each layer, so it carries one expert's error in full: averages over tokens hide what a
few tokens suffer, and the 99th percentile of the KL is reported beside the mean.

Shape suffixes: T tokens of one document, D hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.data.chat import render
from openzaya.data.tokenizer import encode_plain, load_tokenizer
from openzaya.errors import DataError
from openzaya.infer.generate import generate
from openzaya.infer.sampling import SamplingParams
from openzaya.model import hf
from openzaya.model.quantised import QuantScheme, quantise_model
from openzaya.model.transformer import Block, ForwardRecord, Zaya
from openzaya.problems import TRAINED_FAMILIES, get_family, make_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_DOCUMENT_TOKENS = 512
DIFFICULTIES = (2, 3, 4, 5, 6)
WINDOW_TOKENS = 256
MAX_PERIOD = 64
"""A completion ended in a loop where its last window repeats itself with this period or a shorter one."""
REPEATED_TOKENS = 8
_ROWS_OF_LOGITS = 64


@dataclass(frozen=True)
class LayerError:
    """Means over all tokens."""

    nmse_alone: float
    nmse_running: float
    experts_alone: float
    """Share of tokens that visit the same class."""
    experts_running: float


@dataclass(frozen=True)
class GenerationCheck:
    """Completions that were not allowed to end, of one model and temperature."""

    temperature: float
    num_tokens: int
    repeated: float
    """Share of runs of 8 tokens that occurred before in their completion."""
    zlib_ratio: float
    """Compressed size over size: the mean of each completion's most repetitive window of 256 tokens."""
    loops: float
    """Share of completions that ended in a loop."""


@dataclass
class QualityReport:
    """Everything measured; ``original`` and ``quantised`` name what was compared."""

    original: str
    quantised: str
    num_tokens: int = 0
    kl_mean: float = 0.0
    kl_p99: float = 0.0
    """Nats a token."""
    top1_agreement: float = 0.0
    loss_original: float = 0.0
    loss_quantised: float = 0.0
    layers: list[LayerError] = field(default_factory=list)
    generation: dict[str, list[GenerationCheck]] = field(default_factory=dict)
    """Of "original" and "quantised": one check a temperature."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``."""
        return asdict(self)

    def to_text(self) -> str:
        """Tables for people."""
        lines = [
            f"{self.quantised} against {self.original}, {self.num_tokens:,} tokens of text",
            f"  KL {self.kl_mean:.5f} nats a token, 99th percentile {self.kl_p99:.4f}",
            f"  most likely token the same {self.top1_agreement:.2%}",
            f"  loss {self.loss_original:.4f} -> {self.loss_quantised:.4f}",
            f"  {'layer':>5}  {'NMSE alone':>10}  {'running':>10}  {'experts alone':>13}  {'running':>8}",
        ]
        for index, layer in enumerate(self.layers):
            lines.append(
                f"  {index:>5}  {layer.nmse_alone:>10.2e}  {layer.nmse_running:>10.2e}  "
                f"{layer.experts_alone:>13.2%}  {layer.experts_running:>8.2%}"
            )
        for name, checks in self.generation.items():
            for check in checks:
                lines.append(
                    f"  {name:<9} at T={check.temperature:g}: {check.num_tokens:,} tokens, repeated "
                    f"{check.repeated:.1%}, zlib {check.zlib_ratio:.3f}, ended in a loop {check.loops:.0%}"
                )
        return "\n".join(lines)


def compare(
    original: Zaya,
    quantised: Zaya,
    documents: Sequence[Sequence[int]],
    *,
    names: tuple[str, str] = ("original", "quantised"),
    progress: Callable[[int, int], None] | None = None,
) -> QualityReport:
    """Errors of ``quantised`` on ``documents`` of token ids; ``progress`` hears (documents done, in all).

    Raises:
        DataError: models of different shapes, or no document of two tokens.
    """
    if original.config != quantised.config:
        raise DataError("the two models have different configurations; compare a model with its own quantised form")
    documents = [document for document in documents if len(document) > 1]
    if not documents:
        raise DataError("no text of at least two tokens to compare on; give more text")
    sums = _Sums(original.config.num_hidden_layers)
    for number, document in enumerate(documents):
        _compare_document(original, quantised, torch.tensor([list(document)]), sums)
        if progress is not None:
            progress(number + 1, len(documents))
    return sums.report(names)


class _Sums:
    """Running sums over tokens, in double precision."""

    def __init__(self, num_layers: int):
        self.num_tokens = 0
        self.layers_L5 = torch.zeros(num_layers, 5, dtype=torch.float64)
        """|x|^2, error alone, error running, same expert alone, same expert running."""
        self.kl: list[Tensor] = []
        self.same_top = 0.0
        self.losses = [0.0, 0.0]
        self.num_targets = 0

    def report(self, names: tuple[str, str]) -> QualityReport:
        kl_N = torch.cat(self.kl)
        layers = [
            LayerError(
                nmse_alone=float(alone / max(power, 1e-30)),
                nmse_running=float(running / max(power, 1e-30)),
                experts_alone=float(same_alone / self.num_tokens),
                experts_running=float(same_running / self.num_tokens),
            )
            for power, alone, running, same_alone, same_running in self.layers_L5.tolist()
        ]
        return QualityReport(
            *names,
            num_tokens=self.num_tokens,
            kl_mean=float(kl_N.mean()),
            kl_p99=float(kl_N.quantile(0.99)),
            top1_agreement=self.same_top / self.num_tokens,
            loss_original=self.losses[0] / self.num_targets,
            loss_quantised=self.losses[1] / self.num_targets,
            layers=layers,
        )


@torch.inference_mode()
def _compare_document(original: Zaya, quantised: Zaya, tokens_1T: Tensor, sums: _Sums) -> None:
    running, alone = ForwardRecord(), ForwardRecord()
    expected: list[Tensor] = []
    blocks: dict[Block, int] = {block: index for index, block in enumerate(original.model.layers)}  # type: ignore[misc]

    def beside_original(block: Block, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """The quantised layer on the input of the original's."""
        index = blocks[block]
        x_TD, _, route = quantised.model.layers[index](*arguments)
        expected.append(output[0])
        running.routes.append(output[2])
        alone.routes.append(route)
        sums.layers_L5[index, 0] += output[0].double().square().sum()
        sums.layers_L5[index, 1] += (x_TD.double() - output[0].double()).square().sum()

    handles = [block.register_forward_hook(beside_original) for block in blocks]
    try:
        hidden_TD = original.hidden_states(tokens_1T.to(original.device))[0]
    finally:
        for handle in handles:
            handle.remove()
    behind = ForwardRecord()

    def behind_quantised(block: Block, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        index = len(behind.routes)
        behind.routes.append(output[2])
        sums.layers_L5[index, 2] += (output[0].double() - expected[index].double()).square().sum()

    handles = [block.register_forward_hook(behind_quantised) for block in quantised.model.layers]
    try:
        quantised_TD = quantised.hidden_states(tokens_1T.to(quantised.device))[0]
    finally:
        for handle in handles:
            handle.remove()
    classes_TL = running.experts_NL()
    sums.layers_L5[:, 3] += (classes_TL == alone.experts_NL()).double().sum(0)
    sums.layers_L5[:, 4] += (classes_TL == behind.experts_NL()).double().sum(0)
    sums.num_tokens += tokens_1T.shape[1]
    _compare_logits(original, quantised, hidden_TD, quantised_TD, tokens_1T[0], sums)


def _compare_logits(
    original: Zaya, quantised: Zaya, hidden_TD: Tensor, quantised_TD: Tensor, tokens_T: Tensor, sums: _Sums
) -> None:
    """Some rows at a time: logits of a large vocabulary are large."""
    targets_T = torch.cat((tokens_T[1:], tokens_T.new_tensor([-100])))
    for begin in range(0, len(tokens_T), _ROWS_OF_LOGITS):
        rows = slice(begin, begin + _ROWS_OF_LOGITS)
        logs_TV = original.logits(hidden_TD[rows]).log_softmax(-1)
        other_TV = quantised.logits(quantised_TD[rows]).log_softmax(-1)
        sums.kl.append((logs_TV.exp() * (logs_TV - other_TV)).sum(-1).double())
        sums.same_top += float((logs_TV.argmax(-1) == other_TV.argmax(-1)).sum())
        for place, logs in enumerate((logs_TV, other_TV)):
            sums.losses[place] += float(F.nll_loss(logs, targets_T[rows], reduction="sum", ignore_index=-100))
    sums.num_targets += len(tokens_T) - 1


# --- generation -------------------------------------------------------------------------------------


def check_generation(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int = 4000,
    temperatures: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
) -> list[GenerationCheck]:
    """Let a model write ``num_tokens`` tokens (or to its last position) behind each prompt, past every end of turn."""
    checks = []
    for temperature in temperatures:
        params = SamplingParams(
            temperature=temperature, top_p=1.0, max_new_tokens=num_tokens, seed=seed, ignore_eos=True
        )
        completions = [samples[0].tokens for samples in generate(model, prompts, params)]
        checks.append(
            GenerationCheck(
                temperature=temperature,
                num_tokens=sum(map(len, completions)),
                repeated=_mean([repeated_share(tokens) for tokens in completions]),
                zlib_ratio=_mean([smallest_zlib_ratio(tokens) for tokens in completions]),
                loops=_mean([float(ends_in_loop(tokens)) for tokens in completions]),
            )
        )
    return checks


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of runs of 8 tokens that occurred before."""
    runs = [tuple(tokens[begin : begin + REPEATED_TOKENS]) for begin in range(len(tokens) - REPEATED_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def smallest_zlib_ratio(tokens: Sequence[int]) -> float:
    """Compressed size over size of the most repetitive window; 1 where there is no whole window."""
    ratios = []
    for begin in range(0, len(tokens) - WINDOW_TOKENS + 1, WINDOW_TOKENS):
        raw = b"".join(token.to_bytes(4, "little") for token in tokens[begin : begin + WINDOW_TOKENS])
        ratios.append(len(zlib.compress(raw, 9)) / len(raw))
    return min(ratios, default=1.0)


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last window repeats itself exactly with a period of at most 64 tokens."""
    last = list(tokens[-WINDOW_TOKENS:])
    if len(last) < WINDOW_TOKENS:
        return False
    return any(last[period:] == last[:-period] for period in range(1, MAX_PERIOD + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


# --- a whole measurement ----------------------------------------------------------------------------


def measure(
    original: str | Path,
    quantised: str | Path,
    *,
    text: Path | None = None,
    num_tokens: int = 4000,
    num_generated: int = 4000,
    seed: int = 0,
) -> QualityReport:
    """Compare a checkpoint with its quantised form on text and, with ``num_generated``, in long generations.

    Args:
        quantised: a checkpoint, or a scheme to quantise the original with in memory.
        text: a file; by default held-out problems with worked solutions.

    Raises:
        DataError: the text cannot be read; the models do not belong together.
        CheckpointError, ConfigError: a checkpoint or a scheme that cannot be used.
    """
    tokenizer = load_tokenizer(original)
    first = hf.load(original)
    is_scheme = not Path(quantised).exists() and "/" not in str(quantised)
    scheme = QuantScheme.parse(str(quantised)) if is_scheme else None
    second = hf.load(quantised) if scheme is None else quantise_model(hf.load(original), scheme)
    documents, prompts = problem_documents(tokenizer, num_tokens, seed=seed)
    if text is not None:
        documents = text_documents(tokenizer, read_text(text), num_tokens)
    report = compare(first, second, documents, names=(str(original), str(quantised)))
    if num_generated:
        for name, model in (("original", first), ("quantised", second)):
            report.generation[name] = check_generation(model, prompts, num_tokens=num_generated, seed=seed)
    return report


def read_text(path: Path) -> str:
    """A UTF-8 text file; raises :class:`DataError` where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None


# --- text -------------------------------------------------------------------------------------------


def problem_documents(
    tokenizer: PreTrainedTokenizerFast, num_tokens: int, *, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """About ``num_tokens`` tokens of held-out problems with worked solutions, and prompts of further ones."""
    rng = random.Random(seed)
    documents: list[list[int]] = []
    index = 0
    while sum(map(len, documents)) < num_tokens:
        documents.append(_problem_tokens(tokenizer, rng, seed, index, with_solution=True)[:MAX_DOCUMENT_TOKENS])
        index += 1
    prompts = [_problem_tokens(tokenizer, rng, seed, index + more, with_solution=False) for more in range(4)]
    return documents, prompts


def _problem_tokens(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, seed: int, index: int, *, with_solution: bool
) -> list[int]:
    family = TRAINED_FAMILIES[index % len(TRAINED_FAMILIES)]
    problem = make_problem(family, rng.choice(DIFFICULTIES), seed, index, "heldout")
    solution = get_family(family).solve(problem)
    if not tokenizer.chat_template:
        text = f"{problem.prompt}\n{solution.trace}\n{solution.answer}\n" if with_solution else f"{problem.prompt}\n"
        return encode_plain(tokenizer, [text])[0]
    messages: list[dict[str, Any]] = [{"role": "user", "content": problem.prompt}]
    if with_solution:
        messages.append({"role": "assistant", "content": solution.answer, "reasoning_content": solution.trace})
    return render(messages, tokenizer, add_generation_prompt=not with_solution).tokens


def text_documents(tokenizer: PreTrainedTokenizerFast, text: str, num_tokens: int) -> list[list[int]]:
    """The first ``num_tokens`` tokens of a text as documents of up to 512 tokens."""
    tokens = encode_plain(tokenizer, [text])[0][:num_tokens]
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    step = MAX_DOCUMENT_TOKENS - len(begin)
    return [begin + tokens[place : place + step] for place in range(0, len(tokens), step)]
