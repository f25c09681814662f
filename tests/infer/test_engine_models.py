"""The engine on real models: seeds, forks, the prefix cache, new weights, text; on both runners."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
import torch

from openzaya.errors import CheckpointError, EngineError
from openzaya.infer import loop as loop_module
from openzaya.infer import scheduler as scheduler_module
from openzaya.infer.engine import Engine
from openzaya.infer.outputs import Delta, RequestOutput
from openzaya.infer.runner import block_bytes
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.torch_runner import TorchRunner
from openzaya.model import hf
from openzaya.model.transformer import Zaya
from tests.infer.miniature import make_model, make_prompts, naive
from tests.model.reference import TINY, perturb
from tests.train import miniature as trained

SAMPLED = SamplingParams(temperature=1.5, top_p=0.98, max_new_tokens=24, seed=11, logprobs=1)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "auto"])


def tokens_of(outputs) -> list[list[int]]:
    return [completion.tokens for output in outputs for completion in output.completions]


@BACKENDS
def test_sampled_tokens_are_the_naive_loop_s_alone_and_among_others(backend: str) -> None:
    model = make_model(0)
    prompts = make_prompts(6, (1, 100), 200)
    each = [SAMPLED.model_copy(update={"seed": 50 + index}) for index in range(6)]
    expected = [naive(model, prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    assert len({tuple(tokens) for tokens in expected}) == 6
    with Engine(model, backend=backend, cache_bytes=10**7, prefix_cache=False) as engine:
        assert tokens_of(engine.generate(prompts, each)) == expected
        for prompt, params, tokens in zip(prompts, each, expected, strict=True):
            assert tokens_of(engine.generate([prompt], params)) == [tokens]


@BACKENDS
@pytest.mark.parametrize("length", [63, 64, 65, 100])
def test_forks_are_separate_runs(backend: str, length: int) -> None:
    model, prompt = make_model(0), make_prompts(1, (length, length), 200)[0]
    with Engine(model, backend=backend, cache_bytes=10**7, max_running=5) as engine:
        forks = tokens_of(engine.generate([prompt], SAMPLED, n=8))
    separate = [naive(model, prompt, SAMPLED, seed=SAMPLED.seed + index) for index in range(8)]
    assert forks == separate
    assert len({tuple(tokens) for tokens in forks}) == 8


@BACKENDS
def test_preempted_is_undisturbed(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(scheduler_module, "SPARE_BLOCKS", 0)
    model, prompts = make_model(0), make_prompts(4, (40, 60), 200)
    params = SAMPLED.model_copy(update={"max_new_tokens": 60, "ignore_eos": True})
    size = block_bytes(model.config, torch.float32)
    with Engine(model, backend=backend, cache_bytes=5 * size, max_running=4) as engine:
        assert tokens_of(engine.generate(prompts, params)) == [naive(model, prompt, params) for prompt in prompts]
        assert engine.stats().preemptions > 0


@BACKENDS
def test_a_hit_gives_what_a_cold_run_gives(backend: str) -> None:
    model, prompt = make_model(0), make_prompts(1, (200, 200), 200)[0]
    params = SAMPLED.model_copy(update={"return_experts": True})
    with Engine(model, backend=backend, cache_bytes=10**7, batch_invariant=True) as engine:
        cold, hit = (engine.generate([prompt], params)[0] for _ in range(2))
        assert (cold.num_cached_tokens, hit.num_cached_tokens) == (0, 192)
        # Logprobs are the logits' own bits.
        assert cold.completions[0].logprobs == hit.completions[0].logprobs
        assert (cold.completions[0].experts == hit.completions[0].experts).all()
    with Engine(model, backend="torch", cache_bytes=10**7) as engine:
        cold, hit = (engine.generate([prompt], params)[0] for _ in range(2))
        differences = [
            abs(a.logprob - b.logprob)
            for a, b in zip(cold.completions[0].logprobs, hit.completions[0].logprobs, strict=True)
        ]
        assert max(differences) < 1e-4


@BACKENDS
def test_prompts_sent_together_share_and_get_what_each_gets_alone(backend: str) -> None:
    model = make_model(0)
    root, left, right, *ends = make_prompts(6, (20, 50), 200, seed=3)
    stem = root + left
    # They part inside blocks, at their ends, at once, and not at all.
    prompts = [stem + ends[0], root + right, stem + ends[1], stem, stem, ends[2]]
    params = SAMPLED.model_copy(update={"return_experts": True, "max_new_tokens": 5})
    settings = {"backend": backend, "cache_bytes": 10**7, "chunk_tokens": 70}
    with Engine(model, prefix_cache=False, **settings) as engine:
        alone = [engine.generate([prompt], params)[0] for prompt in prompts]
    with Engine(model, **settings) as engine:
        together = engine.generate(prompts, params)
        num_run = engine.stats().prompt_tokens
    # The split for the last token of ``stem`` is good enough for those that go on behind it.
    begin = len(stem) - 1
    assert [output.num_cached_tokens for output in together] == [0, len(root), begin, begin, begin, 0]
    assert num_run == sum(map(len, prompts)) - len(root) - 3 * begin
    for one, other in zip(alone, together, strict=True):
        mine, others = one.completions[0], other.completions[0]
        assert mine.tokens == others.tokens and (mine.experts == others.experts).all()
        # Logprobs are the logits' own bits; the plain runner's depend on the batch.
        assert mine.logprobs == others.logprobs or backend == "torch"


@BACKENDS
def test_batch_invariant_logprobs_are_the_same_bits_in_any_company(backend: str) -> None:
    model, prompts = make_model(0), make_prompts(4, (1, 70), 200)
    with Engine(
        model, backend=backend, cache_bytes=10**7, batch_invariant=True, chunk_tokens=23, prefix_cache=False
    ) as engine:
        together = engine.generate(prompts, SAMPLED)
        alone = [engine.generate([prompt], SAMPLED)[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.completions[0].logprobs == other.completions[0].logprobs


@BACKENDS
def test_classes_are_those_of_the_forward_pass(backend: str) -> None:
    from openzaya.model.transformer import ForwardRecord

    model, prompt = make_model(0), make_prompts(1, (150, 150), 200)[0]
    params = SAMPLED.model_copy(update={"return_experts": True, "ignore_eos": True})
    with Engine(model, backend=backend, cache_bytes=10**7) as engine:
        for _ in range(2):
            for completion in engine.generate([prompt], params, n=2)[0].completions:
                record = ForwardRecord()
                with torch.inference_mode():
                    model(torch.tensor([[*prompt, *completion.tokens[:-1]]]), record=record)
                assert completion.experts is not None and completion.experts.dtype == "uint8"
                assert (torch.from_numpy(completion.experts) == record.experts_NL()).all()


@BACKENDS
def test_a_prompt_with_given_classes_takes_them_and_leaves_the_cache_alone(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(scheduler_module, "SPARE_BLOCKS", 0)
    monkeypatch.setattr(loop_module, "MAX_HOLD_SECONDS", 3600)
    model, prompt = make_model(0), make_prompts(1, (150, 150), 200)[0]
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 5, (150, 3), generator=generator).to(torch.uint8)
    params = SAMPLED.model_copy(update={"return_experts": True, "ignore_eos": True, "max_new_tokens": 60})
    size = block_bytes(model.config, torch.float32)
    # The pool holds one of the two at a time at their full length: one is preempted and run again.
    with Engine(model, backend=backend, cache_bytes=6 * size, chunk_tokens=70) as engine:
        ends: queue.Queue[RequestOutput | EngineError] = queue.Queue()
        with engine.together():  # otherwise the first may end before the second arrives, and nothing is preempted
            for _ in range(2):
                engine.submit(
                    prompt, params.model_copy(update={"max_new_tokens": 60}), on_end=ends.put, prompt_experts=classes
                )
        outputs = [ends.get(timeout=60) for _ in range(2)]
        for output in outputs:
            assert isinstance(output, RequestOutput) and output.num_cached_tokens == 0
            found = torch.from_numpy(output.completions[0].experts)
            assert torch.equal(found[:150], classes) and len(found) == 209
            tokens = [*prompt, *output.completions[0].tokens]
            with torch.inference_mode():
                given = found[None]
                logits = model(torch.tensor([tokens[:-1]]), forced_experts=given)[0, -1]
            last = output.completions[0].logprobs[-1]
            assert abs(float(logits.log_softmax(-1)[tokens[-1]]) - last.logprob) < 1e-3
        assert engine.stats().preemptions > 0
        assert engine.stats().blocks_cached == 0
        for bad, problem in (
            (classes[:-1], r"expected \(150, 3\)"),
            (classes.long(), "torch.uint8"),
            (classes + 9, "classes are 0 to 4"),
        ):
            with pytest.raises(EngineError, match=problem):
                engine.submit(prompt, params, prompt_experts=bad)


@BACKENDS
def test_new_weights_between_two_steps(backend: str) -> None:
    old, new = make_model(0), Zaya(make_model(0).config, seed=7)
    perturb(new, torch.Generator().manual_seed(7))
    model = Zaya(old.config)
    model.load_state_dict(old.state_dict())
    prompt = make_prompts(1, (130, 130), 200)[0]
    # The text fills a block with the old weights, and another one with the new weights.
    params = SamplingParams(temperature=1.5, max_new_tokens=80, ignore_eos=True)
    with Engine(model, backend=backend, cache_bytes=10**7) as engine:
        assert engine.generate([prompt], params)[0].completions[0].tokens == naive(old, prompt, params)
        assert engine.stats().blocks_cached == 3
        changed, ended = threading.Event(), threading.Event()
        outputs = []

        def on_delta(delta: Delta) -> None:
            if delta.tokens and len(seen) < 10:
                seen.append(delta.tokens[0])
            elif not changed.is_set():
                # Give the other thread the time to post its change; it takes effect after this step.
                wanted.set()
                changed.wait(0.2)

        seen: list[int] = []
        wanted = threading.Event()
        engine.submit(prompt, params, on_delta=on_delta, on_end=lambda output: (outputs.append(output), ended.set()))
        assert wanted.wait(20)
        before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        assert engine.update_weights(new.state_dict()) == 1 == engine.version
        changed.set()
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
        assert ended.wait(20)
        completion = outputs[0].completions[0]
        assert completion.versions == sorted(completion.versions) and set(completion.versions) == {0, 1}
        num_old = completion.versions.count(0)
        assert completion.tokens[:num_old] == naive(old, prompt, params)[:num_old]
        # What the old weights left in the cache, and what was run behind it, is offered to nobody.
        assert engine.stats().blocks_cached == 0
        again = engine.generate([prompt], params)[0]
        assert again.num_cached_tokens == 0 and set(again.completions[0].versions) == {1}
        assert again.completions[0].tokens == naive(new, prompt, params)
        assert engine.generate([prompt], params)[0].num_cached_tokens == 128


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = Zaya(TINY)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Engine(model, cache_bytes=10**6) as engine:
        for bad in (
            {"model.norm.weight": torch.zeros(24), "model.nothing": torch.zeros(3)},
            {"model.norm.weight": torch.zeros(25)},
            {"model.norm.weight": torch.full((24,), float("nan"))},
            {"model.norm.weight": torch.zeros(24, dtype=torch.int64)},
        ):
            with pytest.raises(CheckpointError):
                engine.update_weights(bad)
        assert engine.version == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@BACKENDS
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_leave_the_model_that_was_passed_alone(backend: str, scheme: str) -> None:
    model, prompts = make_model(0), make_prompts(3, (5, 80), 200)
    with Engine(model, quantize=scheme, backend=backend, cache_bytes=10**7) as engine:
        assert model.quantisation is None and engine._model.quantisation is not None
        found = engine.generate(prompts, SAMPLED)
        assert tokens_of(found) == [naive(engine._model, prompt, SAMPLED) for prompt in prompts]


@pytest.mark.parametrize(("attention", "router"), [("gqa", "mlp"), ("mla", "linear"), ("mha", "mlp+eda")])
def test_ablation_variants_run_on_the_plain_runner(attention, router) -> None:
    model = Zaya(TINY.with_changes(attention=attention, router=router))
    perturb(model, torch.Generator().manual_seed(0))
    prompts = make_prompts(3, (5, 60), 48)
    with Engine(model, cache_bytes=10**6) as engine:
        assert isinstance(engine._runner, TorchRunner)
        assert tokens_of(engine.generate(prompts, SAMPLED)) == [naive(model, prompt, SAMPLED) for prompt in prompts]
    with pytest.raises(EngineError, match=f"backend='cpu' cannot run this model.*attention={attention}"):
        Engine(model, backend="cpu")


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_narrow_caches_hold_more(cache_dtype) -> None:
    model, prompts = make_model(0), make_prompts(3, (70, 150), 200)
    with (
        Engine(model, backend="torch", cache_bytes=10**6) as wide,
        Engine(model, backend="torch", cache_bytes=10**6, cache_dtype=cache_dtype) as narrow,
    ):
        assert narrow.stats().blocks_total > wide.stats().blocks_total
        outputs = narrow.generate(prompts, SAMPLED)
        assert all(output.completions[0].tokens for output in outputs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = Zaya(trained.config(), seed=0)
    perturb(model, torch.Generator().manual_seed(0))
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    hf.save(model, directory, layout="native", tokenizer=trained.tokenizer())
    return directory


def test_a_checkpoint_brings_its_tokenizer(checkpoint: Path) -> None:
    params = SamplingParams(max_new_tokens=20, seed=3)
    with Engine(checkpoint, cache_bytes=10**6) as engine:
        assert engine.tokenizer is not None
        output = engine.generate(["Sort: 3 1 2"], params)[0]
        assert output.prompt_tokens == engine.encode("Sort: 3 1 2")
        completion = output.completions[0]
        assert completion.text == engine.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert completion.text


def test_a_checkpoint_without_tokenizer_takes_ids_only(checkpoint: Path, tmp_path: Path) -> None:
    hf.save(hf.load(checkpoint), tmp_path / "bare", layout="native")
    with Engine(tmp_path / "bare", cache_bytes=10**6) as engine:
        assert engine.tokenizer is None
        assert engine.generate([[7, 8]], SamplingParams(max_new_tokens=3))[0].completions[0].text == ""
        with pytest.raises(EngineError, match="no tokenizer"):
            engine.generate(["text"])
