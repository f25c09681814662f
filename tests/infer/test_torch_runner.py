"""The plain runner: ragged steps over pages and slots equal the whole forward pass, for every variant of the model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from openzaya.infer.runner import BLOCK_TOKENS, StepSequence, block_bytes, slot_bytes
from openzaya.infer.torch_runner import TorchRunner
from openzaya.model.config import ZayaConfig
from openzaya.model.transformer import ForwardRecord, Zaya
from tests.model.reference import TINY, perturb, random_config

NUM_SEQUENCES, BLOCKS_EACH = 4, 4
LENGTHS = (1, 2, 63, 64, 65, 128, 150, 200)


def variant(seed: int) -> ZayaConfig:
    """A random shape; attention, router and residual vary too."""
    draw = random.Random(seed)
    return random_config(draw).with_changes(
        max_position_embeddings=512,
        attention=draw.choice(("cca", "cca", "gqa", "mha", "mla")),
        router=draw.choice(("mlp+eda", "mlp", "linear")),
        residual=draw.choice(("learned", "plain")),
    )


def perturbed(config: ZayaConfig, seed: int = 0) -> Zaya:
    model = Zaya(config, seed=seed)
    perturb(model, torch.Generator().manual_seed(seed))
    return model


class Case:
    """A few sequences with scattered pages, run in random pieces beside each other."""

    def __init__(self, model: Zaya, seed: int, **settings):
        self.draw, self.model = random.Random(seed), model
        self.runner = TorchRunner(model, NUM_SEQUENCES * BLOCKS_EACH, NUM_SEQUENCES + 1, **settings)
        spoil(self.runner)
        vocab_size = model.config.vocab_size
        lengths = [self.draw.choice(LENGTHS) for _ in range(NUM_SEQUENCES)]
        self.texts = [[self.draw.randrange(vocab_size) for _ in range(length)] for length in lengths]
        scattered = list(range(self.runner.num_blocks))
        self.draw.shuffle(scattered)
        self.blocks = [scattered[i * BLOCKS_EACH : (i + 1) * BLOCKS_EACH] for i in range(NUM_SEQUENCES)]

    def run(self, forced: list[Tensor] | None = None, pieces: Sequence[int] = (1, 1, 2, 7, 64, 100)):
        """Logits (T, V) and experts (T, L) of each sequence."""
        done = [0] * NUM_SEQUENCES
        logits: list[list[Tensor]] = [[] for _ in self.texts]
        experts: list[list[Tensor]] = [[] for _ in self.texts]
        while any(done[i] < len(text) for i, text in enumerate(self.texts)):
            chosen = [i for i, text in enumerate(self.texts) if done[i] < len(text) and self.draw.random() < 0.7]
            if not chosen:
                continue
            step = []
            for i in chosen:
                end = min(len(self.texts[i]), done[i] + self.draw.choice(pieces))
                classes = None if forced is None or i % 2 else forced[i][done[i] : end]
                step.append(StepSequence(self.texts[i][done[i] : end], done[i], i, self.blocks[i], "all", classes))
            result = self.runner.step(step)
            sizes = [len(sequence.tokens) for sequence in step]
            for i, size, part, classes in zip(
                chosen, sizes, result.logits.split(sizes), result.experts.split(sizes), strict=True
            ):
                logits[i].append(part)
                experts[i].append(classes)
                done[i] += size
        return [torch.cat(parts) for parts in logits], [torch.cat(parts) for parts in experts]


def spoil(runner: TorchRunner) -> None:
    """What was never written must never be read."""
    for layer in runner.cache.layers:
        for memory in (*layer.pages, layer.slot_z, layer.slot_delayed, layer.block_z, layer.block_delayed):
            memory.fill_(77 if memory.dtype == torch.int8 else float("nan"))


@torch.inference_mode()
def whole(model: Zaya, text: list[int], forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    record = ForwardRecord()
    given = None if forced is None else forced[None]
    return model(torch.tensor([text]), forced_experts=given, record=record)[0], record.experts_NL()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("seed", range(16))
def test_ragged_pieces_equal_the_whole_forward(seed: int) -> None:
    case = Case(perturbed(variant(seed), seed), seed)
    logits, experts = case.run()
    for i, text in enumerate(case.texts):
        expected, classes = whole(case.model, text)
        assert error(logits[i], expected) < 2e-5
        assert torch.equal(experts[i], classes) and experts[i].dtype == torch.uint8


@pytest.mark.parametrize("seed", range(6))
def test_a_sequence_goes_on_from_the_snapshot_of_any_full_block(seed: int) -> None:
    case = Case(perturbed(variant(seed), seed), seed)
    case.run()
    free_slot = NUM_SEQUENCES
    for i, text in enumerate(case.texts):
        expected, _ = whole(case.model, text)
        for end in range(BLOCK_TOKENS, len(text), BLOCK_TOKENS):
            case.runner.restore_slot(case.blocks[i][end // BLOCK_TOKENS - 1], free_slot)
            rest = StepSequence(text[end:], end, free_slot, case.blocks[i], "last")
            assert error(case.runner.step([rest]).logits[0], expected[-1]) < 2e-5


def test_a_fork_goes_on_by_itself() -> None:
    model = perturbed(TINY)
    runner = TorchRunner(model, 8, 3)
    text = [7 + i % 40 for i in range(100)]
    runner.step([StepSequence(text, 0, 0, [5, 2])])
    runner.copy_slot(0, 2)
    runner.copy_block(2, 6)
    for step, tokens in enumerate(([3, 9], [8, 8], [30, 31])):
        both = [StepSequence([tokens[0]], 100 + step, 0, [5, 2]), StepSequence([tokens[1]], 100 + step, 2, [5, 6])]
        logits = runner.step(both).logits
    assert error(logits[0], whole(model, [*text, 3, 8, 30])[0][-1]) < 2e-5
    assert error(logits[1], whole(model, [*text, 9, 8, 31])[0][-1]) < 2e-5


def test_choices_are_replayed_beside_free_ones() -> None:
    model = perturbed(TINY.with_changes(max_position_embeddings=512))
    case = Case(model, 3)
    generator = torch.Generator().manual_seed(0)
    classes = [
        torch.randint(0, TINY.num_experts + 1, (len(text), TINY.num_hidden_layers), generator=generator).to(torch.uint8)
        for text in case.texts
    ]
    logits, experts = case.run(forced=classes)
    for i, text in enumerate(case.texts):
        expected, chosen = whole(model, text, classes[i] if i % 2 == 0 else None)
        assert error(logits[i], expected) < 2e-5
        assert torch.equal(experts[i], chosen)
        assert torch.equal(experts[i], classes[i]) == (i % 2 == 0)


@pytest.mark.parametrize(("cache_dtype", "limit"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_narrow_caches_are_close(cache_dtype, limit: float) -> None:
    model = perturbed(TINY.with_changes(max_position_embeddings=512, num_hidden_layers=1))
    case = Case(model, 5, cache_dtype=cache_dtype)
    logits, _ = case.run()
    errors = [error(logits[i], whole(model, text)[0]) for i, text in enumerate(case.texts)]
    assert 1e-5 < max(errors) < limit


def test_int8_is_the_largest_value_over_127() -> None:
    from openzaya.model.paged import to_int8

    x = torch.tensor([[[0.0, 0.0], [1.0, -2.54], [1e-39, 0.0]]])
    codes, scales = to_int8(x)
    assert codes[0, :2].tolist() == [[0, 0], [50, -127]]
    assert scales[0, 1].item() == pytest.approx(0.02)
    assert torch.allclose(codes * scales, x, atol=0.01)


def test_a_bfloat16_model_runs_in_pages_as_in_rows() -> None:
    model = perturbed(TINY.with_changes(max_position_embeddings=512, num_hidden_layers=1)).to(torch.bfloat16)
    case = Case(model, 1)
    assert case.runner.cache.layers[0].keys_RKd.dtype == torch.bfloat16
    logits, _ = case.run()
    for i, text in enumerate(case.texts):
        assert error(logits[i], whole(model, text)[0]) < 0.05


def test_batch_invariant_numbers_are_the_same_bits_in_any_company_and_pieces() -> None:
    model = perturbed(TINY.with_changes(max_position_embeddings=512))
    cases = [Case(model, 2, batch_invariant=True) for _ in range(2)]
    first, second = cases[0].run(), cases[1].run(pieces=(3, 50))
    for i, text in enumerate(cases[0].texts):
        assert torch.equal(first[0][i], second[0][i]) and torch.equal(first[1][i], second[1][i])
        alone = TorchRunner(model, 4, 1, batch_invariant=True)
        last = alone.step([StepSequence(text, 0, 0, [3, 1, 0, 2])])
        assert torch.equal(last.logits[0], first[0][i][-1])
        assert torch.equal(last.experts, first[1][i])


def test_logits_are_given_as_asked() -> None:
    model = perturbed(TINY)
    runner = TorchRunner(model, 4, 4)
    asked = [
        StepSequence([5, 6, 7], 0, 0, [0], "last"),
        StepSequence([8, 9], 0, 1, [1], "none"),
        StepSequence([5, 6, 7], 0, 2, [2], "all"),
    ]
    result = runner.step(asked)
    assert result.logits.shape == (4, TINY.vocab_size) and result.experts.shape == (8, TINY.num_hidden_layers)
    assert torch.allclose(result.logits[0], result.logits[3], atol=1e-4)
    nothing = runner.step([])
    assert nothing.logits.shape == (0, TINY.vocab_size) and nothing.experts.shape == (0, TINY.num_hidden_layers)


@pytest.mark.parametrize("attention", ["cca", "gqa", "mla"])
@pytest.mark.parametrize(("cache_dtype", "dtype"), [("auto", torch.float32), ("int8", torch.int8)])
def test_memory_is_what_the_formulas_say(attention, cache_dtype, dtype) -> None:
    config = TINY.with_changes(attention=attention)
    runner = TorchRunner(Zaya(config), 10, 3, cache_dtype)
    found = 0
    for layer in runner.cache.layers:
        memories = (*layer.pages, layer.slot_z, layer.slot_delayed, layer.block_z, layer.block_delayed)
        found += sum(memory.nbytes for memory in memories)
    assert found == 10 * block_bytes(config, dtype) + 3 * slot_bytes(config)
