"""A step does not depend on how its batch was cut; the loop's loss, load and balancing are those of the whole step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openzaya.data.packing import Batch
from openzaya.errors import CheckpointError, ConfigError, DataError
from openzaya.model.balancing import load_entropy
from openzaya.model.router import SKIP_BIAS
from openzaya.model.transformer import ForwardRecord
from openzaya.train.loop import Trainer, train
from openzaya.train.loss import plain_cross_entropy
from tests.train import miniature
from tests.train.test_loss import batch_of

SUPERVISED_SHARES = (1.0, 0.02, 0.9, 0.0, 0.05, 1.0, 0.02, 0.5)
"""Of the tokens of each of eight windows: very different from one micro-batch to the next."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write_phase(tmp_path_factory.mktemp("stages"))


def trainer(recipe: Path, *overrides: str) -> Trainer:
    return Trainer(miniature.resolve(recipe, *overrides).value, recipe.parent)


def windows() -> Batch:
    """Eight windows of documents of several lengths, some with padding at their end."""
    draw = random.Random(0)
    documents, masks = [], []
    for share in SUPERVISED_SHARES:
        lengths = [draw.randint(1, 20) for _ in range(5)]
        documents.append([[draw.randrange(11, miniature.VOCAB_SIZE) for _ in range(n)] for n in lengths])
        masks.append([[i > 0 and draw.random() < share for i in range(n)] for n in lengths])
    return batch_of(documents, 100, masks)


def cut(batch: Batch, size: int) -> list[Batch]:
    fields = (batch.tokens, batch.loss_mask, batch.document_ids, batch.positions)
    return [Batch(*parts) for parts in zip(*(field.split(size) for field in fields), strict=True)]


def one_step(recipe: Path, batches: list[Batch], *overrides: str) -> tuple[dict[str, Tensor], dict, Trainer]:
    """Gradients before the optimiser takes them, metrics, and the trainer, for one step over ``batches``."""
    subject = trainer(recipe, f"accumulation={len(batches)}", *overrides)
    subject.batches = iter(batches)  # type: ignore[assignment]
    gradients: dict[str, Tensor] = {}
    plain_step = subject.optimizer.step

    def step(number: int) -> dict[str, float]:
        gradients.update({n: p.grad.clone() for n, p in subject.model.named_parameters() if p.grad is not None})
        return plain_step(number)

    subject.optimizer.step = step  # type: ignore[method-assign]
    return gradients, subject.train_step(), subject


@pytest.mark.parametrize("balancing", ["adamw_pid", "sign", "none"])
def test_one_batch_of_eight_windows_is_four_of_two_and_eight_of_one(recipe: Path, balancing: str) -> None:
    setting = f"balancing.kind={balancing}"
    whole, metrics, subject = one_step(recipe, [windows()], setting)
    for size in (2, 1):
        parts, part_metrics, other = one_step(recipe, cut(windows(), size), setting)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            scale = max(float(gradient.abs().max()), 1e-8)
            assert float((gradient - parts[name]).abs().max()) <= 1e-5 * scale, name
        assert part_metrics["loss/ce_nats"] == pytest.approx(metrics["loss/ce_nats"], rel=1e-6)
        for key in ("train/tokens", "train/supervised_tokens", "route/load_entropy", "route/expert_load", "data/fill"):
            assert part_metrics[key] == metrics[key], key
        for ours, theirs in zip(other.balancer.routers, subject.balancer.routers, strict=True):
            assert torch.equal(ours.balancing_biases, theirs.balancing_biases)


def test_the_gradient_is_that_of_the_mean_over_supervised_tokens(recipe: Path) -> None:
    batch = windows()
    gradients, metrics, _ = one_step(recipe, cut(batch, 2))
    twin = trainer(recipe)
    hidden = twin.model.hidden_states(batch.tokens, document_ids=batch.document_ids)
    mask = batch.loss_mask[:, 1:] & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
    loss = plain_cross_entropy(
        hidden[:, :-1].flatten(0, 1), twin.model.head_weight, batch.tokens[:, 1:].flatten(), mask.flatten()
    )
    (loss / mask.sum()).backward()
    assert metrics["loss/ce_nats"] == pytest.approx(float(loss.detach()) / int(mask.sum()), rel=1e-5)
    assert metrics["train/supervised_tokens"] == int(mask.sum())
    for name, parameter in twin.model.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-8)
        assert float((gradients[name] - parameter.grad).abs().max()) <= 2e-5 * scale, name


def test_dividing_each_micro_batch_by_its_own_tokens_would_be_seen(recipe: Path, monkeypatch) -> None:
    """The planted fault of plain averaging: the test above must be able to fail."""
    whole, _, _ = one_step(recipe, [windows()])
    plain = Trainer._forward_backward

    def averaged(self: Trainer, batch: Batch, record: ForwardRecord, supervised: int, tokens: int):
        own = int(batch.loss_mask[:, 1:].sum())
        return plain(self, batch, record, 4 * max(1, own), tokens)

    monkeypatch.setattr(Trainer, "_forward_backward", averaged)
    parts, _, _ = one_step(recipe, cut(windows(), 2))
    name = "model.embed_tokens.weight"
    assert float((whole[name] - parts[name]).abs().max()) > 0.05 * float(whole[name].abs().max())


def test_a_step_without_supervised_tokens_changes_no_direction(recipe: Path) -> None:
    batch = windows()
    silent = Batch(batch.tokens, torch.zeros_like(batch.loss_mask), batch.document_ids, batch.positions)
    gradients, metrics, _ = one_step(recipe, cut(silent, 4))
    assert metrics["loss/ce_nats"] == 0.0
    assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_load_counts_the_whole_step_without_padding(recipe: Path) -> None:
    batch = windows()
    _, metrics, _ = one_step(recipe, cut(batch, 2), "balancing.kind=none")
    record = ForwardRecord()
    fresh = trainer(recipe)
    fresh.model.hidden_states(batch.tokens, document_ids=batch.document_ids, record=record)
    is_token = (batch.document_ids >= 0).flatten()
    for layer, route in enumerate(record.routes):
        counts = torch.bincount(route.choice_N[is_token], minlength=5)
        assert metrics["route/expert_load"][layer] == pytest.approx((counts[:-1] / counts.sum()).tolist())
    assert metrics["train/tokens"] == int(is_token.sum()) < is_token.numel()


# --- balancing in the loop ------------------------------------------------------------------------


def random_batches() -> Iterator[Batch]:
    """Endless batches in which every token id is equally likely."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(11, miniature.VOCAB_SIZE, (8, 128), generator=generator)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        yield Batch(tokens, mask, torch.zeros_like(tokens), torch.arange(128).repeat(8, 1))


def skewed(recipe: Path, *overrides: str) -> Trainer:
    """A trainer whose routers favour some experts clearly, and differently for different tokens."""
    rates = ("optimizer.warmup_steps=0", "optimizer.muon_learning_rate=1e-3", "optimizer.adamw_learning_rate=1e-3")
    subject = trainer(recipe, "steps=400", *rates, *overrides)
    subject.batches = random_batches()  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        subject.model.model.embed_tokens.weight.normal_(generator=generator)
        for block in subject.model.model.layers:
            for parameter in block.mlp.gate.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=2 / parameter.shape[1] ** 0.5, generator=generator)
            block.mlp.gate.router_mlp.out_proj.weight.mul_(0.5)
            block.mlp.gate.router_mlp.fc2.bias.normal_(std=0.5, generator=generator)
    return subject


def entropies(subject: Trainer, num_steps: int) -> list[float]:
    return [float(subject.train_step()["route/load_entropy_min"]) for _ in range(num_steps)]  # type: ignore[arg-type]


def mean_of_last(values: list[float], num: int) -> float:
    return sum(values[-num:]) / num


@pytest.mark.parametrize("kind", ["adamw_pid", "sign"])
def test_a_skewed_router_becomes_even_while_it_trains(recipe: Path, kind: str) -> None:
    subject = skewed(recipe, f"balancing.kind={kind}", "balancing.learning_rate=0.01")
    found = entropies(subject, 80)
    assert found[0] < 0.75
    assert mean_of_last(found, 15) > 0.98, found[::8]
    for router in subject.balancer.routers:
        assert float(router.balancing_biases[-1]) == SKIP_BIAS


def test_without_balancing_it_stays_skewed(recipe: Path) -> None:
    subject = skewed(recipe, "balancing.kind=none")
    assert max(entropies(subject, 15)) < 0.8
    assert not any(bool(router.balancing_biases[:-1].any()) for router in subject.balancer.routers)


def test_the_auxiliary_loss_trains_the_router_itself(recipe: Path) -> None:
    subject = skewed(recipe, "balancing.kind=aux_loss", "balancing.aux_loss_coefficient=3")
    found = entropies(subject, 30)
    assert mean_of_last(found, 5) > found[0] + 0.08
    assert not any(bool(router.balancing_biases[:-1].any()) for router in subject.balancer.routers)


def test_the_auxiliary_loss_is_in_the_gradient_and_not_in_the_reported_loss(recipe: Path) -> None:
    plain, metrics, _ = one_step(recipe, cut(windows(), 4), "balancing.kind=none")
    with_loss, auxiliary_metrics, _ = one_step(recipe, cut(windows(), 4), "balancing.kind=aux_loss")
    assert auxiliary_metrics["loss/ce_nats"] == metrics["loss/ce_nats"]
    name = "model.layers.0.mlp.gate.router_mlp.out_proj.weight"
    assert not torch.allclose(plain[name], with_loss[name], rtol=1e-3, atol=0)


def test_the_balancing_rate_follows_the_schedule(recipe: Path) -> None:
    subject = trainer(recipe, "balancing.kind=sign", "balancing.learning_rate=0.1", "optimizer.warmup_steps=4")
    subject.train_step()
    moved = {
        round(float(bias.abs()), 6) for router in subject.balancer.routers for bias in router.balancing_biases[:-1]
    }
    assert moved <= {0.0, 0.025} and 0.025 in moved


def test_load_entropy_of_the_metrics_is_that_of_the_load(recipe: Path) -> None:
    subject = trainer(recipe)
    metrics = subject.train_step()
    shares = torch.tensor(metrics["route/expert_load"])
    counts = torch.cat((shares, torch.zeros(shares.shape[0], 1)), dim=1)
    torch.testing.assert_close(torch.tensor(metrics["route/load_entropy"]), load_entropy(counts), atol=1e-5, rtol=0)


# --- phases ---------------------------------------------------------------------------------------


def test_the_loss_falls_and_a_later_phase_starts_from_the_exported_weights(recipe: Path) -> None:
    stages = recipe.parent
    exported = train(miniature.resolve(recipe, "steps=25"), stages / "02-pretrain")
    assert (exported / "tokenizer.json").is_file()
    losses = [record["loss/ce_nats"] for record in miniature.metrics_without_clock(stages / "02-pretrain")]
    assert losses[-1] < 0.85 * losses[0]
    later = recipe.with_name("03-later.toml")
    text = recipe.read_text().replace('tokenizer = "01-tokenizer"\n', "")
    model = text.index("[model]")
    later.write_text(
        text[:model]
        + '[model]\nstart_from = "02-pretrain"\nchanges = { rope_theta = 1e6 }\n'
        + text[text.index("[opt") :]
    )
    subject = trainer(later)
    assert subject.model.config.rope_theta == 1e6
    finished = torch.load(stages / "02-pretrain" / "checkpoints" / "step-00000025.pt", weights_only=True)
    assert miniature.differences(dict(subject.model.state_dict()), dict(finished["model"])) == []
    # The biases are what the balancer goes on from.
    for router, row in zip(subject.balancer.routers, subject.balancer.biases_LE, strict=True):
        assert torch.equal(router.balancing_biases[:-1], row.detach())
    assert subject.train_step()["loss/ce_nats"] < 0.95 * losses[0]
    with pytest.raises(ConfigError, match=r"hidden_size.*would change the shapes of 02-pretrain"):
        trainer(later, "model.changes.hidden_size=48")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.preset=huge"], ConfigError, "unknown preset 'huge'; choose one of"),
        (["model.changes.hiden_size=3"], ConfigError, "hiden_size"),
        (["model.changes.vocab_size=290"], ConfigError, "tokenizer has 300 tokens, the model's vocabulary 290"),
        (["context_length=513"], ConfigError, "context_length=513 exceeds the model's max_position_embeddings=512"),
        (["tokenizer=09-missing"], DataError, "09-missing"),
        (["model.start_from=09-missing"], CheckpointError, "09-missing"),
        (["data.sources.1.families=['sortng']"], DataError, "unknown problem family 'sortng'; did you mean 'sorting'"),
        (["data.sources.0.paths=['/nowhere/at/all']"], DataError, "/nowhere/at/all"),
        (["data.sources.1.difficulties=[3, 1]"], DataError, "lowest <= highest"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_says_why(recipe: Path, overrides, error, message: str) -> None:
    with pytest.raises(error, match=message):
        trainer(recipe, *overrides)


def test_without_tokenizer_or_start_it_says_so(recipe: Path) -> None:
    bare = recipe.with_name("04-bare.toml")
    bare.write_text(recipe.read_text().replace('tokenizer = "01-tokenizer"\n', ""))
    with pytest.raises(ConfigError, match="tokenizer is not set"):
        trainer(bare)
