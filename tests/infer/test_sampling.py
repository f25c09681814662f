"""The sampling distribution: against plain reference code, and what is drawn against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from openzaya.infer.sampling import (
    SamplingParams,
    UniformStream,
    draw,
    draw_with_logprobs_on_cpu,
    logprobs_on_cpu,
    probabilities,
    uniforms,
)
from openzaya.kernels import build


def plain_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """One row, one filter after the other, in Python numbers."""
    if params.temperature == 0:
        best = logits.index(max(logits))
        return [float(index == best) for index in range(len(logits))]
    highest = max(logits)
    weights = [math.exp((logit - highest) / params.temperature) for logit in logits]
    shares = [weight / sum(weights) for weight in weights]
    if params.top_k:
        kept = sorted(range(len(shares)), key=lambda index: -shares[index])[: params.top_k]
        shares = [share if index in kept else 0.0 for index, share in enumerate(shares)]
    if params.top_p < 1:
        target, reached, kept = params.top_p * sum(shares), 0.0, []
        for index in sorted(range(len(shares)), key=lambda index: -shares[index]):
            if reached >= target:
                break
            kept.append(index)
            reached += shares[index]
        shares = [share if index in kept else 0.0 for index, share in enumerate(shares)]
    if params.min_p:
        shares = [share if share >= params.min_p * max(shares) else 0.0 for share in shares]
    return [share / sum(shares) for share in shares]


SETTINGS = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.5, "top_p": 1.0},
    {"temperature": 2.5, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_p": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 10**9},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 6, "min_p": 0.05},
    {"temperature": 0.0},
    {"temperature": 0.0, "top_p": 0.1, "top_k": 3},
]


def distinct_logits(num_rows: int, vocab: int, seed: int) -> torch.Tensor:
    """No two of a row are close: which token a filter keeps last does not hang on rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([0.37 * torch.randperm(vocab, generator=generator).float() for _ in range(num_rows)])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_distribution_is_that_of_the_plain_reference(setting: dict) -> None:
    params = SamplingParams(**setting)
    logits = distinct_logits(6, 12, 3)
    found = probabilities(logits, params)
    for row, wanted in zip(found, (plain_probabilities(row, params) for row in logits.tolist()), strict=True):
        torch.testing.assert_close(row, torch.tensor(wanted), atol=1e-6, rtol=1e-5)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.integers(1, 40),
    st.floats(0.05, 5),
    st.floats(0.01, 1),
    st.integers(0, 45),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_any_setting_gives_a_distribution_that_holds_the_best_token(vocab, temperature, top_p, top_k, min_p, seed):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    logits = 4 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    found = probabilities(logits, params)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert bool((found.gather(1, logits.argmax(1, keepdim=True)) > 0).all())
    if top_k:
        assert int((found > 0).sum(1).max()) <= max(1, min(top_k, vocab))
    for uniform in (0.0, 0.5, 1 - 2**-24):
        drawn = draw(logits, params, torch.full((3,), uniform))
        assert bool((found.gather(1, drawn[:, None]) > 0).all()), "drew a token that was filtered out"


def chi_square(counts: torch.Tensor, shares: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom over the tokens that can be drawn."""
    possible = shares > 0
    expected = shares[possible].double() * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


def chi_square_limit(freedom: int) -> float:
    """The 99.9 % point (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "setting",
    [
        s
        for s in SETTINGS
        if s["temperature"] and s.get("top_k") != 1 and s.get("min_p") != 1.0 and s.get("top_p") != 1e-6
    ],
    ids=str,
)
def test_draws_follow_the_distribution(setting: dict) -> None:
    params = SamplingParams(**setting)
    logits = 0.5 * distinct_logits(1, 12, 1)
    shares = torch.tensor(plain_probabilities(logits[0].tolist(), params))
    uniform = torch.rand(6_000, generator=torch.Generator().manual_seed(11))
    counts = torch.bincount(draw(logits.expand(6_000, -1), params, uniform), minlength=12)
    assert not counts[shares == 0].any()
    statistic, freedom = chi_square(counts, shares)
    assert statistic < chi_square_limit(freedom)


def test_the_chi_square_test_sees_another_temperature() -> None:
    logits = 0.5 * distinct_logits(1, 12, 1)
    shares = torch.tensor(plain_probabilities(logits[0].tolist(), SamplingParams(temperature=1.0, top_p=1.0)))
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(11))
    other = SamplingParams(temperature=1.1, top_p=1.0)
    counts = torch.bincount(draw(logits.expand(20_000, -1), other, uniform), minlength=12)
    statistic, freedom = chi_square(counts, shares)
    assert statistic > chi_square_limit(freedom)


def test_the_uniform_numbers_of_seeds_in_a_row_are_independent() -> None:
    """Sample j of prompt i has a seed next to others': their first numbers must still be uniform."""
    first = uniforms(list(range(4000)), 2)
    for column in (first[:, 0], first[:, 1], (first[:, 0] + first[:, 1]) % 1, (first[1:, 0] - first[:-1, 0]) % 1):
        counts = torch.histc(column, bins=20, min=0, max=1)
        statistic, freedom = chi_square(counts, torch.full((20,), 0.05))
        assert statistic < chi_square_limit(freedom)


def test_uniform_numbers_belong_to_the_seed_and_the_step_alone() -> None:
    longest = uniforms([5, 6, 7], 300)
    assert bool((longest >= 0).all()) and bool((longest < 1).all())
    for steps in (1, 3, 15, 16, 17, 64, 299):
        assert torch.equal(uniforms([7], steps)[0], longest[2, :steps]), steps
    assert torch.equal(uniforms([6, 5], 9), longest[[1, 0], :9])


def test_numbers_made_as_asked_for_are_the_same_for_any_seed() -> None:
    for seed in (0, 7, -1, -(2**80), 2**63, 2**64 - 1, 2**200 + 3):
        stream, wanted = UniformStream(seed), uniforms([seed], 400)[0].tolist()
        assert [stream[step] for step in (399, 0, 130, 15)] == [wanted[step] for step in (399, 0, 130, 15)]
    assert UniformStream(2**32)[0] == UniformStream(0)[0] != UniformStream(-1)[0]


def shaped_logits(shape: str, vocab: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(vocab, generator=generator)
    if shape == "peaked":
        return 1.5 * noise - 2 * torch.arange(1, vocab + 1).log()[torch.randperm(vocab, generator=generator)]
    return {
        "flat": noise,
        "equal": 0 * noise,
        "ties": (3 * noise).round(),
        "masked": noise.where(noise > 2, -math.inf),
    }[shape]


@pytest.mark.parametrize("shape", ["peaked", "flat", "equal", "ties", "masked"])
@pytest.mark.parametrize("vocab", [7, 50, 2047, 6144])
def test_the_fast_draw_keeps_the_tokens_that_the_plain_form_keeps(shape: str, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = shaped_logits(shape, vocab, generator)[None]
    filters = [
        *({"top_p": top_p} for top_p in (1e-6, 0.02, 0.3, 0.5, 0.95, 0.999, 0.9999)),
        {"top_p": 0.9, "top_k": 9},
        {"top_p": 0.9, "top_k": vocab - 3, "temperature": 3.0},
        {"top_p": 1, "top_k": vocab // 2},
        {"top_p": 0.8, "top_k": vocab // 3, "min_p": 0.3},
        {"top_p": 1, "min_p": 0.05},
        {"top_p": 1},
        {"temperature": 0},
    ]
    for setting in filters:
        params = SamplingParams(**setting)
        plain = probabilities(logits, params)
        kept = plain[0] > 0
        uniform = torch.rand(20, generator=generator)
        ends = torch.tensor([0.0, 1 - 2**-24])
        drawn = draw(logits.expand(22, -1), params, torch.cat([uniform, ends]))
        assert bool(kept[drawn].all()), setting
        # The first and the last token that can be drawn are those of the plain form: none is missing at the borders.
        # (With 1e-7 of the mass a token is not reached by a 24-bit number.)
        possible = kept.nonzero()[:, 0]
        reachable = possible[plain[0, possible] > 1e-6]
        if len(reachable) and len(reachable) == len(possible):
            assert [int(drawn[-2]), int(drawn[-1])] == [int(possible[0]), int(possible[-1])], setting
        cumulative = plain[0].double().cumsum(0)
        wanted = torch.searchsorted(cumulative, uniform.double() * cumulative[-1], right=True)
        # Rounding of a share may move a number across a border between two tokens, no more.
        places = torch.cumsum(kept, 0)
        assert int((places[wanted] - places[drawn[:-2]]).abs().max()) <= 1, setting


@pytest.mark.parametrize("shape", ["peaked", "flat", "equal", "ties", "masked"])
@pytest.mark.parametrize("setting", [{"top_p": 0.3}, {"top_p": 0.95}, {"top_p": 1, "top_k": 40}, {"top_p": 1}], ids=str)
def test_a_number_in_the_middle_of_a_share_draws_its_token(shape: str, setting: dict) -> None:
    generator = torch.Generator().manual_seed(5)
    for vocab in (7, 1024):
        logits, params = shaped_logits(shape, vocab, generator), SamplingParams(**setting)
        if not bool(logits.isfinite().any()):
            continue
        shares = probabilities(logits[None], params)[0]
        wide = shares.double()
        middles = (wide.cumsum(0) - wide / 2) / wide.sum()
        tokens = (shares > 1e-4).nonzero()[:, 0]
        drawn = draw(logits.expand(len(tokens), -1), params, middles[tokens].float())
        assert drawn.tolist() == tokens.tolist()


def test_logprobs_are_the_log_softmax_of_each_row_alone() -> None:
    generator = torch.Generator().manual_seed(6)
    for vocab in (1, 15, 1024, 5000):
        logits = 4 * torch.randn(20, vocab, generator=generator)
        logits[0, 0], logits[1, : vocab // 2] = 80.0, -math.inf
        tokens = torch.randint(vocab // 2, vocab, (20,), generator=generator).tolist()
        found = logprobs_on_cpu(logits, tokens)
        wanted = logits.double().log_softmax(1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found).double(), wanted, atol=1e-6, rtol=1e-6)
        assert found == [logprobs_on_cpu(logits[row : row + 1], tokens[row : row + 1])[0] for row in range(20)]
    broken = torch.tensor([[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
    assert all(map(math.isnan, logprobs_on_cpu(broken, [0, 0, 0])))


@pytest.mark.parametrize("has_kernels", [True, False])
def test_logprobs_that_come_with_the_draw_are_those_of_the_pass_behind_it(monkeypatch, has_kernels: bool) -> None:
    """Bit for bit: temperature 1 and others, filters, tokens that cannot come, and rows that hold no numbers."""
    if not has_kernels:
        monkeypatch.setattr(build, "inference", lambda: build.Loaded(None))
    generator = torch.Generator().manual_seed(5)
    rows = [SamplingParams(**setting) for setting in (*SETTINGS, {"temperature": 1.0, "top_p": 1.0})]
    for vocab in (5, 1000, 1024):
        logits = 4 * torch.randn(len(rows), vocab, generator=generator)
        logits[0, 0], logits[1, : vocab // 2] = 80.0, -math.inf
        uniform = torch.rand(len(rows), generator=generator).tolist()
        tokens, logprobs = draw_with_logprobs_on_cpu(logits, rows, uniform)
        assert tokens == draw(logits, rows, torch.tensor(uniform)).tolist()
        assert logprobs == logprobs_on_cpu(logits, tokens)
    broken = torch.tensor([[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
    assert all(map(math.isnan, draw_with_logprobs_on_cpu(broken, rows[:1] * 3, [0.5] * 3)[1]))


def test_top_p_of_a_large_vocabulary_keeps_what_sorting_keeps() -> None:
    """Flat and peaked rows, ties at the border, shares next to nothing and to all."""
    generator = torch.Generator().manual_seed(6)
    for vocab, spread in ((30_001, 0.1), (30_001, 3.0), (4096, 12.0)):
        logits = torch.randn(4, vocab, generator=generator).mul(spread)
        logits[3] = logits[3].mul(2).round() / 2
        for top_p in (1e-6, 0.1, 0.5, 0.95, 0.9999):
            rows = [SamplingParams(top_p=top_p)] * 4
            shares = probabilities(logits, rows)
            for uniform in (0.0, 0.3, 0.9, 1 - 2**-24):
                drawn = draw(logits, rows, torch.full((4,), uniform))
                assert bool((shares.gather(1, drawn[:, None]) > 0).all())
                before = shares.double().cumsum(1).gather(1, drawn[:, None])[:, 0]
                width = shares.gather(1, drawn[:, None])[:, 0].double()
                assert bool(((before - width - 1e-4 <= uniform) & (uniform <= before + 1e-4)).all())


def test_without_kernels_the_plain_form_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = distinct_logits(len(SETTINGS), 12, 8) / 4
    rows = [SamplingParams(**setting) for setting in SETTINGS]
    uniform = torch.rand(len(rows), generator=torch.Generator().manual_seed(1))
    tokens = draw(logits, rows, uniform)
    logprobs = logprobs_on_cpu(logits, tokens.tolist())
    monkeypatch.setattr(build, "inference", lambda: build.Loaded(None))
    assert torch.equal(draw(logits, rows, uniform), tokens)
    assert logprobs_on_cpu(logits, tokens.tolist()) == pytest.approx(logprobs, abs=1e-6)


def test_many_rows_are_drawn_as_each_alone() -> None:
    """Bit for bit: numbers at the borders of tokens, odd sizes, ties, all kinds of filters side by side."""
    generator = torch.Generator().manual_seed(4)
    for vocab in (1, 3, 37, 1000, 1024, 4095):
        logits = torch.randn(50, vocab, generator=generator).mul(4).round() / 2
        rows = [SamplingParams(**SETTINGS[row % len(SETTINGS)]) for row in range(50)]
        cumulative = torch.stack([probabilities(logits[row : row + 1], rows[row])[0].cumsum(0) for row in range(50)])
        borders = cumulative.gather(1, torch.randint(0, vocab, (50, 1), generator=generator))[:, 0].clamp_max(
            1 - 2**-24
        )
        for uniform in (borders, torch.rand(50, generator=generator)):
            together = draw(logits, rows, uniform)
            alone = [draw(logits[row : row + 1], rows[row], uniform[row : row + 1]) for row in range(50)]
            assert torch.equal(together, torch.cat(alone))


def test_rows_with_settings_of_their_own_are_as_if_alone() -> None:
    logits = distinct_logits(len(SETTINGS), 12, 8)
    rows = [SamplingParams(**setting) for setting in SETTINGS]
    together = probabilities(logits, rows)
    uniform = torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, rows, uniform)
    for row, params in enumerate(rows):
        assert torch.equal(together[row], probabilities(logits[row : row + 1], params)[0])
        assert drawn[row] == draw(logits[row : row + 1], params, uniform[row : row + 1])[0]


def test_greedy_is_the_maximum_whatever_else_is_set() -> None:
    logits = distinct_logits(5, 30, 2)
    params = SamplingParams(temperature=0, top_p=0.1, top_k=2, min_p=0.9)
    assert torch.equal(draw(logits, params, torch.rand(5)), logits.argmax(1))


def test_extreme_logits_do_not_break_the_draw() -> None:
    rows = torch.tensor([[0.0, -1e30, -1e30], [3e38, 3e38, -3e38], [-1e30, -1e30, 0.0]])
    drawn = draw(rows, SamplingParams(temperature=0.01, top_p=0.9), torch.tensor([0.999, 0.999, 0.0]))
    assert drawn.tolist() == [0, 1, 2]
    for temperature in (1e-6, 1e-30, 1e-300):
        logits = distinct_logits(4, 9, 0)
        params = SamplingParams(temperature=temperature, top_p=1.0)
        assert torch.equal(draw(logits, params, torch.full((4,), 0.5)), logits.argmax(1))
    assert draw(rows.bfloat16(), SamplingParams(top_p=1.0), torch.full((3,), 0.5)).tolist()[::2] == [0, 2]


@pytest.mark.parametrize(
    "setting",
    [
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"temperature": -1},
        {"max_new_tokens": 0},
        {"topp": 1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.nan},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"logit_bias": {1: 101}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {token: 0.0 for token in range(2000)}},
        {"stop": ("",)},
        {"stop": ("a",) * 17},
        {"stop": ("a" * 1001,)},
        {"stop_token_ids": (-1,)},
        {"min_new_tokens": -1},
        {"min_new_tokens": 300},
        {"logprobs": 21},
        {"logprobs": -1},
        {"thinking_budget": -1},
        {"json_schema": False},
        {"json_schema": True, "grammar": "start: /a/"},
    ],
    ids=lambda setting: str(setting)[:40],
)
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        SamplingParams(**setting)


@pytest.mark.parametrize(
    "setting", [{"temperature": math.nan}, {"temperature": math.inf}, {"top_p": math.nan}], ids=str
)
def test_settings_that_are_no_numbers_are_refused(setting: dict) -> None:
    with pytest.raises(ValidationError):
        SamplingParams(**setting)
