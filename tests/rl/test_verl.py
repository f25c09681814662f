"""verl's tensors through our advantages and loss: against a stand-in for its registries, and through verl itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openzaya.errors import ConfigError, DataError
from openzaya.rl.adapters.verl import AGGREGATION, dppo_loss, grpo_advantages, maxrl_advantages, register
from openzaya.rl.advantages import grpo, maxrl
from openzaya.rl.loss import policy_loss

ROOT = Path(__file__).resolve().parents[2]


class Registry:
    """As verl's: advantages must not be registered twice, losses are replaced, what is missing is a ValueError."""

    def __init__(self):
        self.advantages, self.losses = {}, {}

    def register_adv_est(self, name):
        def put(function):
            if self.advantages.setdefault(name, function) is not function:
                raise ValueError(name)
            return function

        return put

    def register_policy_loss(self, name):
        def put(function):
            self.losses[name] = function
            return function

        return put

    def get_adv_estimator_fn(self, name):
        if name not in self.advantages:
            raise ValueError(name)
        return self.advantages[name]

    def get_policy_loss_fn(self, name):
        if name not in self.losses:
            raise ValueError(name)
        return self.losses[name]


def make_batch(seed=0, groups=(3, 4, 2), tokens=6):
    """Responses of several prompts in mixed order, each with its reward at its last token."""
    rng = np.random.default_rng(seed)
    uids = np.array([f"prompt-{row}" for row, num in enumerate(groups) for _ in range(num)], dtype=object)
    rng.shuffle(uids)
    lengths = rng.integers(1, tokens + 1, len(uids))
    mask_BT = torch.arange(tokens)[None] < torch.from_numpy(lengths)[:, None]
    rewards_B = torch.from_numpy(rng.integers(0, 2, len(uids))).float()
    rewards_BT = torch.zeros(len(uids), tokens)
    rewards_BT[torch.arange(len(uids)), torch.from_numpy(lengths) - 1] = rewards_B
    return rewards_BT, mask_BT.long(), uids, rewards_B


def config(**values):
    """The fields of verl's actor configuration that count."""
    batch = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None}
    base = {"clip_ratio": 0.1, "clip_ratio_low": 0.1, "clip_ratio_high": 0.1, "clip_ratio_c": 20.0}
    return SimpleNamespace(**(base | {"global_batch_info": batch | values.pop("batch", {})} | values))


def make_logprobs(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old_BT = -3 * torch.rand(shape, generator=generator)
    new_BT = (old_BT + 0.5 * torch.randn(shape, generator=generator)).clamp(max=0).requires_grad_()
    return old_BT, new_BT


@pytest.mark.parametrize(("ours", "theirs"), [(maxrl, maxrl_advantages), (grpo, grpo_advantages)])
def test_each_prompts_responses_are_compared_with_each_other(ours, theirs):
    rewards_BT, mask_BT, uids, rewards_B = make_batch()
    advantages_BT, returns_BT = theirs(rewards_BT, mask_BT, uids, config=None, reward_baselines=None)
    assert advantages_BT.shape == rewards_BT.shape and advantages_BT.dtype == rewards_BT.dtype
    assert torch.equal(advantages_BT, returns_BT)
    for uid in set(uids):
        rows = torch.from_numpy(uids == uid)
        expected_B = ours(rewards_B[rows][None].double())[0].float()
        assert torch.equal(advantages_BT[rows], expected_B[:, None] * mask_BT[rows])
    assert advantages_BT.abs().sum() > 0


def test_rewards_outside_the_response_do_not_count_and_no_verdict_counts_nowhere():
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    rewards_BT = torch.tensor([[0.0, 1, torch.nan], [0, 5, 5], [torch.nan, 0, 0]])
    advantages_BT, _ = maxrl_advantages(rewards_BT, mask_BT, ["a", "a", "a"])
    assert advantages_BT.tolist() == [[1, 1, 0], [-1, 0, 0], [0, 0, 0]]


def test_what_has_no_group_or_a_negative_reward_is_refused():
    rewards_BT, mask_BT, uids, _ = make_batch()
    with pytest.raises(DataError, match="9 responses and none uids"):
        maxrl_advantages(rewards_BT, mask_BT)
    with pytest.raises(DataError, match="9 responses and 8 uids"):
        grpo_advantages(rewards_BT, mask_BT, uids[:-1])
    with pytest.raises(DataError, match="divides by their mean"):
        maxrl_advantages(rewards_BT - 0.1, mask_BT, uids)
    assert maxrl_advantages(torch.zeros(0, 3), torch.zeros(0, 3), [])[0].shape == (0, 3)


def test_micro_batches_of_all_ranks_add_up_to_the_loss_of_the_step():
    advantages_BT = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    mask_BT = torch.arange(5)[None] < torch.tensor([5, 1, 3, 0, 4, 2, 5, 3])[:, None]
    old_BT, new_BT = make_logprobs((8, 5))
    whole = policy_loss(new_BT, old_BT, advantages_BT, mask_BT, num_rollouts=8, delta=0.1, ratio_cap=20.0).loss
    (expected_BT,) = torch.autograd.grad(whole, new_BT)
    settings = config(batch={"dp_size": 2, "global_batch_size": 8})
    for rank in range(2):
        for start in (4 * rank, 4 * rank + 2):
            part = slice(start, start + 2)
            loss, metrics = dppo_loss(
                old_BT[part],
                new_BT[part],
                advantages_BT[part],
                mask_BT[part].long(),
                AGGREGATION,
                settings,
                None,
            )
            (loss / 2).backward()  # ranks are averaged
            assert all(isinstance(value, float) for value in metrics.values())
    assert expected_BT.abs().sum() > 0
    torch.testing.assert_close(new_BT.grad, expected_BT)


def test_delta_and_cap_are_the_configurations():
    old_BT, advantages_BT = torch.tensor([[0.2, 0.001]]).log(), torch.ones(1, 2)
    mask_BT = torch.ones(1, 2, dtype=torch.long)
    for delta, cap, kept in ((0.1, 20.0, [0, 10]), (0.4, 20.0, [2.5, 10]), (0.4, 2.0, [2, 2])):
        new_BT = torch.tensor([[0.5, 0.01]]).log().requires_grad_()
        settings = config(clip_ratio=delta, clip_ratio_low=delta, clip_ratio_high=None, clip_ratio_c=cap)
        dppo_loss(old_BT, new_BT, advantages_BT, mask_BT, AGGREGATION, settings)[0].backward()
        torch.testing.assert_close(-new_BT.grad, torch.tensor([kept], dtype=torch.float32))


@pytest.mark.parametrize(
    ("problem", "settings"),
    [
        ("loss_agg_mode=token-mean", {"loss_agg_mode": "token-mean"}),
        ("rollout_is_weights", {"rollout_is_weights": torch.ones(2, 3)}),
        (r"\[0.1, 0.2\]", {"config": config(clip_ratio_high=0.2)}),
        ("no global_batch_size", {"config": config(batch={"dp_size": 2})}),
        ("loss_scale_factor", {"config": config(batch={"loss_scale_factor": 64})}),
    ],
)
def test_settings_of_another_algorithm_are_refused(problem, settings):
    old_BT, new_BT = make_logprobs((2, 3))
    values = {"loss_agg_mode": AGGREGATION, "config": config(), "rollout_is_weights": None} | settings
    with pytest.raises(ConfigError, match=problem):
        dppo_loss(old_BT, new_BT, torch.ones(2, 3), torch.ones(2, 3), **values)


def test_registration_is_looked_up_afterwards_and_can_be_repeated():
    registry = Registry()
    register(registry)
    register(registry)
    assert registry.advantages == {"openzaya_maxrl": maxrl_advantages, "openzaya_grpo": grpo_advantages}
    assert registry.losses == {"openzaya_dppo": dppo_loss}
    registry.losses["openzaya_dppo"] = print
    with pytest.raises(ConfigError, match="under 'openzaya_dppo'"):
        register(registry)
    forgetful = Registry()
    forgetful.register_policy_loss = lambda name: lambda function: function
    with pytest.raises(ConfigError, match="has None under 'openzaya_dppo'"):
        register(forgetful)


# --- with verl itself -----------------------------------------------------------------------------

THROUGH_VERL = """
import numpy as np, sys, torch, verl
assert "openzaya.rl.adapters.verl_plugin" in sys.modules, "verl has not loaded the plugin"
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig
rewards = torch.tensor([[0.0, 1], [0, 0], [1, 0], [0, 1]])
mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]])
index = np.array(["a", "a", "b", "a"], dtype=object)
for name in ("openzaya_maxrl", "openzaya_grpo"):
    advantages, _ = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=mask, config=None, index=index)
    print(advantages.tolist())
theirs, _ = core_algos.get_adv_estimator_fn("grpo")(
    token_level_rewards=rewards[[0, 1, 3]], response_mask=mask[[0, 1, 3]], index=index[[0, 1, 3]])
torch.testing.assert_close(theirs, advantages[[0, 1, 3]], rtol=1e-5, atol=1e-5)
torch.manual_seed(0)
old, advantages = -2 * torch.rand(4, 2), torch.randn(4, 2)
losses, gradients = [], []
config = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=4, clip_ratio=0.1, clip_ratio_low=0.1,
                     clip_ratio_high=0.1, clip_ratio_c=20.0)
config.global_batch_info.update(dp_size=2, batch_num_tokens=7, global_batch_size=8, loss_scale_factor=None)
for name in ("openzaya_dppo", "dppo_tv"):
    new = (old + 0.4 * torch.linspace(-1, 1, 8).view(4, 2)).requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask.bool(),
        loss_agg_mode="seq-mean-token-sum", config=config, rollout_is_weights=None)
    loss.backward()
    losses.append(float(loss))
    gradients.append(new.grad)
assert gradients[0].abs().sum() > 0 and (gradients[0] == 0).sum() > 1
torch.testing.assert_close(gradients[0], gradients[1])
torch.testing.assert_close(losses[0], losses[1])
print("ok", verl.__version__)
"""


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
def test_verl_loads_the_plugin_and_its_registries_hold_it(tmp_path):
    """In a process of its own, from an entry point as pyproject.toml states it; against verl's own of the same kind."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    distribution = tmp_path / "plugin_for_the_test-0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-for-the-test\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (distribution / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{THROUGH_VERL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("ok 0.9.")
