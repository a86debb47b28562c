"""The LightningModule: a model, a strategy that decides what learns, an optimizer, and an exact loss."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glmft.data.collate import Batch
from glmft.data.datamodule import InstructionData
from glmft.errors import DamagedError, GlmftError, ProblemList, UserError
from glmft.kernels import compiling
from glmft.kernels.attention import has_varlen
from glmft.kernels.loss import cross_entropy_sum
from glmft.models.hub import Source, fetch
from glmft.models.loading import as_dtype, glm, load_model
from glmft.models.published import check_folder
from glmft.models.tokenizer import load_tokenizer
from glmft.optim import OptimizerFactory, SchedulerFactory
from glmft.precision import DTYPE_OF
from glmft.schema import Count, DtypeName, Name
from glmft.strategies.base import Strategy


class TrainingStopped(GlmftError):
    """Training cannot go on: the loss or a gradient is not finite, or the loss is exactly zero."""


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run, from the data's plan.

    Lightning's `estimated_stepping_batches` would start the loader before a checkpoint is restored, at position 0.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, InstructionData)
    limits = [trainer.max_steps] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1):
        limits.append(trainer.max_epochs * data.steps_per_epoch(trainer.world_size))
    return min(limits)


class FineTuner(L.LightningModule):
    """Fine-tunes a causal language model.

    The loss of an optimizer step is the mean over all its supervised tokens, however they are spread over
    micro-batches, packed rows and devices: each micro-batch carries that number (`Batch.step_tokens`) and contributes
    sum / step_tokens. Lightning's own division by the accumulation and DDP's by the world size are undone here.

    Args:
        path: model folder or hub id.
        source: where `path` is looked for.
        revision: commit or tag of the hub.
        dtype: of the loaded weights; "auto" follows trainer.precision.
        strategy: what learns.
        optimizer, scheduler: factories, see `glmft.optim`.
        gradient_checkpointing: keep only each layer's input and compute the rest again in the backward pass.
        compile_layers: compile each decoder layer; "auto" does so on a GPU with torch's variable-length attention, for
            runs that are long enough to gain by it.
        seed: of dropout; every micro-batch is seeded by (seed, epoch, index).
    """

    def __init__(
        self,
        path: Name,
        strategy: Strategy,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        source: Source = "auto",
        revision: str | None = None,
        dtype: DtypeName = "auto",
        gradient_checkpointing: bool = False,
        compile_layers: bool | Literal["auto"] = "auto",
        seed: Count = 0,
    ) -> None:
        super().__init__()
        self.path, self.source, self.revision, self.dtype_name = path, source, revision, dtype
        self.tuning, self.optimizer_factory, self.scheduler_factory = strategy, optimizer, scheduler
        self.gradient_checkpointing, self.compile_layers, self.seed = gradient_checkpointing, compile_layers, seed
        self.strict_loading = False  # a checkpoint holds what was trained; `load_state_dict` checks it exactly
        self.network: Any = None
        self.step_metrics: dict[str, float] | None = None
        self._step_loss: Tensor | float = 0.0
        self._val_sums: dict[int, Tensor] = {}  # validation set -> [loss, supervised tokens]

    # ---- the model

    def check(self) -> None:
        """Finds the model and asks the strategy whether it fits, before any weight is loaded.

        Raises:
            ProblemList: everything that does not fit.
        """
        self.folder = fetch(self.path, self.source, self.revision)
        self.tokenizer = load_tokenizer(self.folder)
        config, _, _ = check_folder(self.folder)
        if problems := self.tuning.check(config):
            raise ProblemList("strategy", problems)

    def configure_model(self) -> None:
        """Loads the weights to this rank's device, once, and lets the strategy transform them."""
        if self.network is not None:
            return
        self.check()
        precision = str(self.trainer.precision)
        dtype = DTYPE_OF.get(precision, "float32") if self.dtype_name == "auto" else self.dtype_name
        model = self.load(self.trainer.strategy.root_device, dtype)
        model.requires_grad_(False)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.network = self.tuning.apply(model)
        compiles = self._compiles(model)
        if self.gradient_checkpointing or compiles:  # compiled: so that the first layer shares the others' graph
            glm(self.network).enable_input_require_grads()
        if compiles:
            compiling.compile_layers(glm(self.network).model.layers)
        self.network.train()

    def _compiles(self, model: Any) -> bool:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.compile_layers != "auto":
            return self.compile_layers
        tokens = total_steps(self.trainer) * data.tokens_per_step
        return bool(data.packing and tokens >= compiling.PAYS_FROM and has_varlen(model.lm_head.weight))

    def load(self, device: torch.device, dtype: str) -> Any:
        """The base model, in the form that the strategy trains on."""
        quantization = self.tuning.quantization(as_dtype(dtype))
        return load_model(self.folder, dtype=dtype, device=device, quantization=quantization)

    @property
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by its name in this module."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    # ---- steps

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of -log p over the supervised tokens of a batch, fp32 scalar; the head sees only their rows."""
        model = glm(self.network)
        packing = {}
        if batch.cu_seqlens is not None:
            packing = {"cu_seq_lens_q": batch.cu_seqlens, "max_length_q": batch.max_seqlen}
        hidden = model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packing
        ).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, batch.loss_index)
        return cross_entropy_sum(rows, model.lm_head.weight, batch.targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss_sum(batch) / batch.step_tokens
        self._step_loss = self._step_loss + loss.detach()
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.step_metrics = None
        torch.manual_seed(hash((self.seed, batch.epoch, batch.index)) % 2**63)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        sums = torch.stack([self.loss_sum(batch).double(), batch.targets.new_tensor(batch.targets.numel()).double()])
        seen = self._val_sums.get(dataloader_idx)
        self._val_sums[dataloader_idx] = sums if seen is None else seen + sums

    def on_validation_epoch_end(self) -> None:
        """`val/loss` over all validation sets, and `val/<set>/loss` of each where there are several."""
        names = self.trainer.datamodule.val_sets  # type: ignore[attr-defined]
        sums = self._gathered(torch.stack([self._val_sums[i] for i in range(len(names))]))
        sums = sums.reshape(-1, len(names), 2).sum(0)
        losses = {f"val/{name}/loss": loss / tokens for name, (loss, tokens) in zip(names, sums, strict=True)}
        total = {"val/loss": sums[:, 0].sum() / sums[:, 1].sum()}
        values = {k: v.float() for k, v in (losses | total if len(names) > 1 else total).items()}
        self.log_dict(values, rank_zero_only=True)
        self._val_sums = {}

    # ---- the optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.named_parameters())
        schedule = self.scheduler_factory(optimizer, total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm and looks at the step before it is taken: one read from the device a step.

        Raises:
            TrainingStopped: the loss or the gradient is not finite, or the loss is exactly zero, on any rank.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        limit = gradient_clip_val if gradient_clip_val else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        seen = torch.stack([torch.as_tensor(self._step_loss, device=self.device).float(), norm.float()])
        if self.trainer.world_size > 1:
            seen = self._gathered(seen)
            seen = torch.stack([seen[:, 0].sum(), seen[:, 1].max()])
        loss, grad_norm = seen.tolist()
        self._step_loss = 0.0
        self._guard(loss, grad_norm)
        lr = optimizer.param_groups[0]["lr"]
        self.step_metrics = {"train/loss": loss, "lr": lr, "grad_norm": grad_norm}

    def _gathered(self, values: Tensor) -> Tensor:
        """values [N] of this rank -> [ranks, N], or [N] on one device."""
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered

    def _guard(self, loss: float, grad_norm: float) -> None:
        step = self.trainer.global_step + 1
        advice = "try a lower optimizer.lr, or trainer.gradient_clip_val=1.0"
        if loss == 0.0:
            raise TrainingStopped(
                f"step {step}: the loss is exactly 0, so nothing can be learned; in half precision this is underflow: "
                "use trainer.precision=bf16-true or 32-true"
            )
        if not torch.isfinite(torch.tensor([loss, grad_norm])).all():
            raise TrainingStopped(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite. Weights are as before it; {advice}"
            )

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.step_metrics is not None:
            self.log_dict(self.step_metrics)

    # ---- checkpoints hold what was trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["glmft"] = {"micro_batches": self._micro_batches()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's counters are in micro-batches, so a run goes on with the micro-batches it was cut into.

        Raises:
            UserError: another data.tokens_per_batch or number of devices.
        """
        before, now = checkpoint["glmft"]["micro_batches"], self._micro_batches()
        if before != now:
            raise UserError(
                f"the checkpoint was made with {before} micro-batches a step, this run has {now}; "
                "set data.tokens_per_batch and trainer.devices as they were"
            )

    def _micro_batches(self) -> int:
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters only."""
        return {n: p.detach() for n, p in self.trained_parameters.items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Takes exactly the trained parameters.

        Raises:
            DamagedError: a name or shape differs; all are named.
        """
        own = self.trained_parameters
        problems = [f"missing {n}" for n in own if n not in state_dict]
        problems += [f"unexpected {n}" for n in state_dict if n not in own]
        problems += [
            f"{n} has shape {list(state_dict[n].shape)}, expected {list(p.shape)}"
            for n, p in own.items()
            if n in state_dict and state_dict[n].shape != p.shape
        ]
        if problems:
            raise DamagedError("checkpoint: not of this model and strategy:\n  - " + "\n  - ".join(problems[:20]))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])
