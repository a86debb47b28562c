"""The loss and the gradient of an optimizer step do not depend on how the step is cut up."""

from __future__ import annotations

import functools

import lightning as L
import numpy as np
import pytest
import torch

from glmft import optim
from glmft.checkpoints import CheckpointFiles
from glmft.data.collate import Batch, pack, pad
from glmft.data.datamodule import EpochPlan, InstructionData, PlannedDataset
from glmft.data.packing import Schedule
from glmft.errors import DamagedError
from glmft.guards import TrainingStopped
from glmft.models import load_model
from glmft.module import FineTuner
from glmft.precision import plugin
from glmft.strategies.full import Full
from glmft.strategies.lora import LoRA

ADAMW = functools.partial(optim.adamw, lr=1e-2)
CONSTANT = functools.partial(optim.constant)


def trainer(**options) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        accelerator="cpu",
        plugins=[plugin("32-true"), CheckpointFiles()],
        use_distributed_sampler=False,
        **quiet | options,
    )


def tuner(tiny, strategy=None, optimizer=ADAMW, **options) -> FineTuner:
    return FineTuner(str(tiny), strategy or Full(), optimizer, CONSTANT, **options)


@pytest.fixture(scope="module")
def data(tiny) -> InstructionData:
    return InstructionData(str(tiny), datasets=["tiny"], max_length=128, max_samples=80, tokens_per_step=1024)


@pytest.fixture(scope="module")
def perturbed(tiny) -> FineTuner:
    """The tiny model moved off its optimum, so that losses and gradients are not near zero."""
    module = tuner(tiny)
    module.network = load_model(tiny, dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.network.parameters():
            p.add_(torch.randn_like(p) * p.abs().mean() * 1.5)
    return module.train()


def gradients(module: FineTuner, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """(loss, flat gradient) of one optimizer step made of these micro-batches."""
    module.zero_grad()
    total = 0.0
    for batch in batches:
        loss = module.loss_sum(batch) / batch.step_tokens
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def close(a: tuple[float, torch.Tensor], b: tuple[float, torch.Tensor]) -> None:
    assert abs(a[0] - b[0]) <= 1e-5 * abs(b[0])
    assert (a[1] - b[1]).norm() <= 1e-5 * b[1].norm()


def samples(data: InstructionData, ids) -> list:
    return [data.corpus.train[i] for i in ids]


def test_packed_equals_padded_equals_one_by_one(perturbed, data):
    chosen = samples(data, range(12))
    tokens = int(data.corpus.train.num_supervised[:12].sum())
    packed = gradients(perturbed, [Batch(**pack(chosen, 512, step_tokens=tokens))])
    padded = gradients(perturbed, [Batch(**pad(chosen, step_tokens=tokens))])
    single = gradients(perturbed, [Batch(**pad([s], step_tokens=tokens)) for s in chosen])
    assert packed[0] > 0.1
    close(packed, single)
    close(padded, single)


def steps_of(data: InstructionData, per_batch: int, world: int, step: int) -> list[Batch]:
    """All ranks' micro-batches of one optimizer step."""
    out = []
    for rank in range(world):
        schedule = Schedule(1024, per_batch * 128, 128, world)
        plan = EpochPlan(data.corpus.train, schedule, packed=True, seed=3, rank=rank)
        dataset = PlannedDataset(plan, 0)
        last = len(plan.batches(0))
        window = range(step * schedule.accumulate, min(last, (step + 1) * schedule.accumulate))
        out += [dataset[0, i] for i in window]
    return out


@pytest.mark.parametrize("step", [0, -1])
@pytest.mark.parametrize(("per_batch", "world"), [(1, 1), (2, 1), (4, 1), (3, 1), (2, 2), (1, 4)])
def test_every_cut_of_a_step_gives_the_same_gradient(perturbed, data, per_batch, world, step):
    plan = data.plan(data.corpus.train)
    steps = plan.steps_per_epoch
    assert len(plan.rows(0)) % 8  # the last step is smaller than the others
    whole = gradients(perturbed, steps_of(data, 8, 1, step % steps))
    close(gradients(perturbed, steps_of(data, per_batch, world, step % steps)), whole)


def test_lightning_takes_the_same_steps_however_a_step_is_cut(tiny):
    """Real fits with plain SGD, a ragged last window included: weights equal after two epochs."""
    sgd = lambda named: torch.optim.SGD([p for _, p in named], lr=1e-3)  # noqa: E731
    weights, losses = [], []
    for per_batch in (1024, 128, 256):
        options = {"max_length": 128, "max_samples": 90, "datasets": ["tiny_identity"]}
        data = InstructionData(str(tiny), tokens_per_step=1024, tokens_per_batch=per_batch, **options)
        module = tuner(tiny, optimizer=sgd)
        fit = trainer(max_epochs=2, accumulate_grad_batches=data.schedule().accumulate)
        record = Losses()
        fit.callbacks.append(record)
        fit.fit(module, data)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        losses.append(record.values)
    for other, values in zip(weights[1:], losses[1:], strict=True):
        assert np.allclose(values, losses[0], rtol=1e-5)
        assert (other - weights[0]).norm() <= 1e-6 * weights[0].norm()
    assert len(losses[0]) == 2 * data.plan(data.corpus.train).steps_per_epoch


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if module.step_metrics:
            self.values.append(module.step_metrics["train/loss"])


def test_logged_loss_is_the_mean_over_supervised_tokens(tiny, data, perturbed):
    plan = data.plan(data.corpus.train)
    rows = [i for r in plan.rows(0)[:8] for i in r]
    nll = sum(perturbed.loss_sum(Batch(**pad([s], step_tokens=1))).item() for s in samples(data, rows))
    tokens = int(data.corpus.train.num_supervised[rows].sum())
    loss, _ = gradients(perturbed, [PlannedDataset(plan, 0)[0, 0]])
    assert loss == pytest.approx(nll / tokens, rel=1e-5)


# ---- guards, checkpoints, precision


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny, data):
    module = tuner(tiny)
    fit = trainer(max_steps=2)

    class Poison(L.Callback):
        def on_train_start(self, *_) -> None:
            with torch.no_grad():
                module.network.model.norm.weight[0] = torch.nan
            self.before = module.network.lm_head.weight.clone()

    poison = Poison()
    fit.callbacks.append(poison)
    with pytest.raises(TrainingStopped, match="step 1: loss nan"):
        fit.fit(module, data)
    assert torch.equal(module.network.lm_head.weight, poison.before)


def test_a_gradient_that_is_not_finite_changes_no_weight(tiny, data):
    """The loss is in order, one gradient is not."""
    module = tuner(tiny)
    fit = trainer(max_steps=3)

    class Poison(L.Callback):
        def on_after_backward(self, trainer, module) -> None:
            if trainer.global_step == 1:
                self.before = module.network.lm_head.weight.detach().clone()
                module.network.model.norm.weight.grad[0] = torch.inf

    poison = Poison()
    fit.callbacks.append(poison)
    with pytest.raises(TrainingStopped, match=r"step 2: loss .*, gradient norm inf: not finite"):
        fit.fit(module, data)
    assert torch.equal(module.network.lm_head.weight, poison.before)


def test_a_loss_of_zero_stops(tiny, data, monkeypatch):
    monkeypatch.setattr(FineTuner, "loss_sum", lambda self, batch: self.network.lm_head.weight.sum() * 0)
    with pytest.raises(TrainingStopped, match="exactly 0"):
        trainer(max_steps=2).fit(tuner(tiny), data)


def test_a_checkpoint_holds_what_was_trained_and_nothing_else(tiny, data, tmp_path):
    module = tuner(tiny, LoRA(r=4))
    fit = trainer(max_steps=2)
    fit.fit(module, data)
    fit.save_checkpoint(tmp_path / "a")
    state = CheckpointFiles().load_checkpoint(tmp_path / "a")["state_dict"]
    assert len(state) == 4 * 6 * 2
    assert all("lora_" in name for name in state)
    for change, says in (
        (lambda s: s.pop(next(iter(s))), "missing"),
        (lambda s: s.update(other=torch.zeros(1)), "unexpected other"),
        (lambda s: s.update({next(iter(s)): torch.zeros(3)}), r"has shape \[3\]"),
    ):
        broken = dict(state)
        change(broken)
        with pytest.raises(DamagedError, match=says):
            module.load_state_dict(broken)


def test_precision_casts_nothing(tiny, data):
    module = FineTuner(str(tiny), LoRA(), ADAMW, CONSTANT)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(accelerator="cpu", plugins=plugin("bf16-true"), max_steps=1, **quiet).fit(module, data)
    model = module.network.get_base_model()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in module.trained_parameters.values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(tiny, data):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = tuner(tiny, LoRA(), gradient_checkpointing=checkpointing)
        record = Losses()
        fit = trainer(max_steps=3)
        fit.callbacks.append(record)
        fit.fit(module, data)
        results.append(record.values)
    assert np.allclose(results[0], results[1], rtol=1e-6)
    assert results[0][0] != results[0][-1]
