"""The C++ runner against the model in PyTorch and against its own promises: chunks, batches, threads, forks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from openzaya.errors import EngineError
from openzaya.infer.cpu_runner import CpuRunner
from openzaya.infer.runner import BLOCK_TOKENS, Runner, StepSequence
from openzaya.infer.torch_runner import TorchRunner
from openzaya.kernels import build
from openzaya.model.config import ZayaConfig
from openzaya.model.quantised import quantise_model
from openzaya.model.transformer import ForwardRecord, Zaya
from tests.infer.miniature import make_model, make_prompts
from tests.model.reference import TINY, perturb

pytestmark = pytest.mark.skipif(build.inference().library is None, reason="no inference kernels on this machine")

LONG = TINY.with_changes(max_position_embeddings=4096, vocab_size=200, sliding_window=70)


def table(sequence: int) -> list[int]:
    """Twelve blocks of sequence i, in a scrambled order and mixed with those of others."""
    return [block * 8 + sequence for block in (3, 0, 7, 1, 9, 5, 2, 11, 4, 8, 6, 10)]


def make_runner(model: Zaya, **settings: object) -> CpuRunner:
    return CpuRunner(model, num_blocks=96, num_slots=8, **settings)  # type: ignore[arg-type]


def run(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    chunks: Sequence[Sequence[int]],
    forced: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Every token's logits and experts; ``chunks[i]`` are the sizes of sequence i's pieces, one a step."""
    logits: list[list[Tensor]] = [[] for _ in prompts]
    experts: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for step in range(max(len(sizes) for sizes in chunks)):
        running = [i for i, sizes in enumerate(chunks) if step < len(sizes)]
        work = []
        for i in running:
            part = slice(done[i], done[i] + chunks[i][step])
            classes = None if forced is None or forced[i] is None else forced[i][part]
            work.append(StepSequence(prompts[i][part], done[i], i, table(i), "all", classes))
        result = runner.step(work)
        sizes = [chunks[i][step] for i in running]
        parts = zip(running, result.logits.split(sizes), result.experts.split(sizes), strict=True)
        for i, logits_TV, experts_TL in parts:
            logits[i].append(logits_TV)
            experts[i].append(experts_TL)
            done[i] += len(logits_TV)
    return [torch.cat(part) for part in logits], [torch.cat(part) for part in experts]


def cut(length: int, draw: random.Random, largest: int = 70) -> list[int]:
    sizes = []
    while length:
        sizes.append(min(length, draw.randint(1, largest)))
        length -= sizes[-1]
    return sizes


@torch.inference_mode()
def whole(model: Zaya, prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
    record = ForwardRecord()
    logits_TV = model(torch.tensor([list(prompt)]), record=record)[0]
    return logits_TV, record.experts_NL()


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest logit."""
    assert float((got - want).abs().max() / want.abs().max()) < tolerance


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_model_for_random_shapes(seed):
    model = make_model(seed)
    draw = random.Random(seed)
    prompts = make_prompts(5, (1, 200), model.config.vocab_size, seed)
    logits, experts = run(make_runner(model), prompts, [cut(len(prompt), draw) for prompt in prompts])
    for prompt, logits_TV, experts_TL in zip(prompts, logits, experts, strict=True):
        want_TV, want_TL = whole(model, prompt)
        assert torch.equal(experts_TL, want_TL)
        assert_close(logits_TV, want_TV)


@pytest.mark.parametrize("cache_dtype", ("float32", "bfloat16", "int8"))
def test_bits_do_not_depend_on_chunks_batch_or_threads(cache_dtype):
    """Longer than a segment of 512 keys, with a window, decoded and in chunks; experts in several pieces."""
    model = make_model(0, LONG.with_changes(moe_intermediate_size=192))
    prompts = make_prompts(4, (560, 700), LONG.vocab_size)
    alone = []
    for i, prompt in enumerate(prompts):
        empty: list[Sequence[int]] = [[] for _ in range(i)]
        chunks = [[] for _ in range(i)] + [[len(prompt)]]
        alone.append(run_one(make_runner(model, cache_dtype=cache_dtype), [*empty, prompt], chunks, i))
    draw = random.Random(1)
    cuts = [cut(len(prompt) - 9, draw, 150) + [1] * 9 for prompt in prompts]
    for threads in (1, 2, 3):
        logits, _ = run(make_runner(model, cache_dtype=cache_dtype, num_threads=threads), prompts, cuts)
        for got, want in zip(logits, alone, strict=True):
            assert torch.equal(got, want)


def run_one(runner: Runner, prompts: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]], index: int) -> Tensor:
    """Only sequence ``index``, at its own place."""
    done, parts = 0, []
    for size in chunks[index]:
        work = [StepSequence(prompts[index][done : done + size], done, index, table(index), "all")]
        parts.append(runner.step(work).logits)
        done += size
    return torch.cat(parts)


@pytest.mark.parametrize(("cache_dtype", "tolerance"), [("bfloat16", 2e-2), ("int8", 3e-2)])
def test_narrow_caches_stay_near_the_wide_one(cache_dtype, tolerance):
    """And near PyTorch's runner with the same cache, whose queries are not rounded."""
    model = make_model(0, LONG)
    prompts = make_prompts(3, (80, 150), LONG.vocab_size, 2)
    cuts = [[len(prompt)] for prompt in prompts]
    exact, experts = run(make_runner(model), prompts, cuts)
    narrow, _ = run(make_runner(model, cache_dtype=cache_dtype), prompts, cuts, experts)
    plain, _ = run(TorchRunner(model, 96, 8, cache_dtype=cache_dtype), prompts, cuts, experts)
    for got, wide, other in zip(narrow, exact, plain, strict=True):
        assert 0 < float((got - wide).norm() / wide.norm()) < tolerance
        assert float((got - other).norm() / other.norm()) < tolerance


@pytest.mark.parametrize("scheme", ("int8", "int4", "int4,down=int8,head=float"))
def test_quantised_models_equal_their_twin(scheme):
    """Where no activation stands at the border between two codes, which a difference of 1e-7 decides either way."""
    model = Zaya(TINY.with_changes(vocab_size=200, hidden_size=72, moe_intermediate_size=40), seed=3)
    perturb(model, torch.Generator().manual_seed(3))
    quantise_model(model, scheme)
    prompts = make_prompts(6, (1, 40), 200)
    logits, experts = run(make_runner(model), prompts, [[len(prompt)] for prompt in prompts])
    differences = []
    for prompt, got_TV, got_TL in zip(prompts, logits, experts, strict=True):
        want_TV, want_TL = whole(model, prompt)
        assert torch.equal(got_TL, want_TL)
        differences += ((got_TV - want_TV).abs().amax(1) / want_TV.abs().max()).tolist()
    assert sorted(differences)[len(differences) // 2] < 1e-5
    assert max(differences) < 3e-2


def test_bfloat16_weights():
    """Against the same weights in fp32 with the same experts: as near as PyTorch's own bfloat16."""
    model = make_model(0, LONG)
    narrow = Zaya(LONG)
    narrow.load_state_dict(model.state_dict())
    narrow.bfloat16().eval()
    wide = Zaya(LONG)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    prompts = make_prompts(2, (60, 90), LONG.vocab_size)
    cuts = [[len(prompt)] for prompt in prompts]
    _, experts = run(make_runner(wide.eval()), prompts, cuts)
    exact, _ = run(make_runner(wide), prompts, cuts, experts)
    ours, _ = run(make_runner(narrow), prompts, cuts, experts)
    plain, _ = run(TorchRunner(narrow, 96, 8), prompts, cuts, experts)
    for got, want, other in zip(ours, exact, plain, strict=True):
        assert float((got - want).norm()) <= 1.2 * float((other - want).norm())


@pytest.mark.parametrize("width", (LONG.moe_intermediate_size, 192, 200))
def test_forced_experts_and_the_skip_class(width):
    """Experts in one piece and in several, and a step in which all tokens skip them."""
    model = make_model(0, LONG.with_changes(moe_intermediate_size=width))
    prompt = make_prompts(1, (40, 40), LONG.vocab_size)[0]
    forced = torch.randint(0, LONG.num_experts + 1, (40, LONG.num_hidden_layers), dtype=torch.uint8)
    forced[:7] = LONG.num_experts
    logits, experts = run(make_runner(model), [prompt], [[7, 33]], [forced])
    assert torch.equal(experts[0], forced) and bool((forced == LONG.num_experts).any())
    with torch.inference_mode():
        want_TV = model(torch.tensor([prompt]), forced_experts=forced[None].long())[0]
    assert_close(logits[0], want_TV)


def test_going_on_from_a_snapshot_and_from_a_fork_gives_the_same_bits():
    model = make_model(0, LONG)
    runner = make_runner(model)
    prompt = make_prompts(1, (170, 170), LONG.vocab_size)[0]
    blocks = table(0)
    whole_TV = runner.step([StepSequence(prompt, 0, 0, blocks, "all")]).logits
    # From the end of the second block, in another slot; its first two blocks are shared.
    start = 2 * BLOCK_TOKENS
    runner.restore_slot(blocks[1], 1)
    tail = StepSequence(prompt[start:], start, 1, [*blocks[:2], 90], "all")
    assert torch.equal(runner.step([tail]).logits, whole_TV[start:])
    # A fork in the middle of a block writes into its own copy.
    runner.copy_slot(0, 2)
    runner.copy_block(blocks[2], 91)
    # So does who goes on from a copy with a snapshot of its own.
    runner.copy_block(blocks[2], 92)
    runner.save_slot(0, 92)
    runner.copy_block(92, 93)
    runner.restore_slot(93, 3)
    forks = [
        StepSequence([5], 170, 0, blocks, "last"),
        StepSequence([6], 170, 2, [*blocks[:2], 91], "last"),
        StepSequence([7], 170, 3, [*blocks[:2], 93], "last"),
    ]
    logits = runner.step(forks).logits
    fresh = make_runner(model)
    for token, got in zip((5, 6, 7), logits, strict=True):
        assert torch.equal(fresh.step([StepSequence([*prompt, token], 0, 0, blocks, "last")]).logits[0], got)


def test_one_token_steps_across_block_ends_leave_the_snapshots_of_one_chunk():
    model = make_model(0, LONG)
    prompt = make_prompts(1, (130, 130), LONG.vocab_size)[0]
    stepped, chunked = make_runner(model), make_runner(model)
    run(stepped, [prompt], [[63, 1, 1, 62, 1, 2]])
    run(chunked, [prompt], [[130]])
    used = table(0)[:2]
    assert torch.equal(stepped.snapshots[used], chunked.snapshots[used])
    assert torch.equal(stepped.slots[0], chunked.slots[0])
    assert not torch.equal(chunked.snapshots[used[0]], chunked.snapshots[used[1]])


def test_changed_weights_are_seen_after_refresh():
    model = make_model(4)
    prompt = make_prompts(1, (20, 20), 200)[0]
    other = Zaya(model.config, seed=9)
    perturb(other, torch.Generator().manual_seed(9))
    copy = Zaya(model.config)
    copy.load_state_dict(model.state_dict())
    runner = make_runner(copy.eval())
    before = run(runner, [prompt], [[20]])[0][0]
    with torch.no_grad():
        copy.load_state_dict(other.state_dict())
    runner.refresh()
    after = run(runner, [prompt], [[20]])[0][0]
    assert not torch.equal(before, after)
    assert_close(after, whole(other.eval(), prompt)[0])


def test_refuses_what_it_cannot_run():
    assert "ablation" in str(CpuRunner.supports(Zaya(TINY.with_changes(attention="gqa"))))
    assert "float64" in str(CpuRunner.supports(Zaya(TINY).double()))
    with pytest.raises(EngineError, match="torch"):
        CpuRunner(Zaya(TINY.with_changes(router="linear")), 4, 1)
    runner = CpuRunner(Zaya(TINY), 4, 1)
    with pytest.raises(EngineError, match="64"):
        runner.step([StepSequence([1] * 65, 0, 0, [0])])
    with pytest.raises(EngineError):
        runner.step([StepSequence([], 0, 0, [0])])


def test_wide_heads_and_many_experts():
    """Beyond what the other shapes reach: heads of several lines, hidden sizes of many groups."""
    config = ZayaConfig(
        vocab_size=70,
        hidden_size=320,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=144,
        num_experts=40,
        moe_intermediate_size=136,
        router_hidden_size=96,
        max_position_embeddings=512,
        eos_token_id=4,
    )
    model = make_model(1, config)
    prompts = make_prompts(2, (70, 130), 70)
    logits, _ = run(make_runner(model), prompts, [[len(prompt)] for prompt in prompts])
    for prompt, got_TV in zip(prompts, logits, strict=True):
        assert_close(got_TV, whole(model, prompt)[0])
