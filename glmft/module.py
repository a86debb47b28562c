"""The LightningModule: a model, a strategy that decides what learns, an optimizer, and an exact loss."""

from __future__ import annotations

import gc
import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glmft.checkpoints import recount
from glmft.data.collate import Batch
from glmft.data.datamodule import total_steps
from glmft.errors import DamagedError, ProblemList
from glmft.guards import Spikes, TrainingStopped
from glmft.kernels import compiling
from glmft.kernels.attention import has_varlen, no_mask
from glmft.kernels.loss import cross_entropy_sum
from glmft.models.hub import Source, fetch
from glmft.models.loading import as_dtype, glm, load_model
from glmft.models.published import check_folder, tensor_differences
from glmft.models.tokenizer import load_tokenizer
from glmft.optim import OptimizerFactory, SchedulerFactory
from glmft.parts import Parts
from glmft.precision import DTYPE_OF
from glmft.schema import Budget, Count, DtypeName, Name
from glmft.strategies.base import Strategy

NAMED = 20  # records of a step that a message names


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
        memory_budget: share of their activations that compiled layers keep, above 0 and at most 1; the cheapest of the
            rest is computed again in the backward pass.
        skip_nonfinite: so many steps whose loss or gradient is not finite are skipped; the next one ends the run.
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
        memory_budget: Budget = 1.0,
        skip_nonfinite: Count = 0,
        seed: Count = 0,
    ) -> None:
        super().__init__()
        self.skip_nonfinite, self.spikes, self.memory_budget = skip_nonfinite, Spikes(), memory_budget
        self.path, self.source, self.revision, self.dtype_name = path, source, revision, dtype
        self.tuning, self.optimizer_factory, self.scheduler_factory = strategy, optimizer, scheduler
        self.gradient_checkpointing, self.compile_layers, self.seed = gradient_checkpointing, compile_layers, seed
        self.strict_loading = False  # a checkpoint holds what was trained; `load_state_dict` checks it exactly
        self.network: Any = None
        self.step_metrics: dict[str, float] | None = None
        self._step_loss: Tensor | float = 0.0
        self.wants = {"stop": 0, "save": 0}  # of this rank: a signal's number, whether a save is due
        self.agreed = dict(self.wants)  # of all ranks, as of the last step
        self.validated: dict[str, Any] = {}  # the last validation's step and loss
        self.facts: dict[str, Any] = {}  # what a checkpoint's manifest says it belongs to
        self.skipped, self.compiles = 0, False
        self.parts = Parts(
            self._share,
            self._forget_step,
            accumulate=lambda: self.trainer.accumulate_grad_batches,
            allowed=lambda: self.trainer.world_size == 1,
        )
        self._window: list[Batch] = []  # micro-batches of the current optimizer step
        self._seen: Tensor | None = None  # loss and gradient norm of the step, on the device
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
        self.compiles = self._compiles(model)
        if self.gradient_checkpointing or self.compiles:  # compiled: so that the first layer shares the others' graph
            glm(self.network).enable_input_require_grads()
        if self.compiles:
            compiling.compile_layers(glm(self.network).model.layers, self.memory_budget)
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
            input_ids=batch.input_ids,
            attention_mask=no_mask(batch.input_ids),
            position_ids=batch.position_ids,
            use_cache=False,
            **packing,
        ).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, batch.loss_index)
        return cross_entropy_sum(rows, model.lm_head.weight, batch.targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's share of the step's loss, or a zero without a graph where `backward` computes it in parts."""
        share = self.parts.forward(batch)
        return torch.zeros((), device=self.device) if share is None else share

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.parts.backward(loss if loss.requires_grad else None, self._window, *args, **kwargs)

    def _share(self, batch: Batch) -> Tensor:
        loss = self.loss_sum(batch) / batch.step_tokens
        self._step_loss = self._step_loss + loss.detach()
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _forget_step(self) -> None:
        self._drop_gradients()
        self._step_loss = 0.0

    def _drop_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.step_metrics = None
        self._window.append(batch)
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
        """Clips by the global norm, and has the update left out, on the device, where loss or gradient of any rank is
        not finite. What the step was like is read after the update was queued (`optimizer_step`): one read a step.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        limit = gradient_clip_val if gradient_clip_val else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        seen = torch.stack([torch.as_tensor(self._step_loss, device=self.device).float(), norm.float()])
        self._step_loss = 0.0
        if self.trainer.world_size > 1:
            wants = seen.new_tensor([float(v) for v in self.wants.values()])
            ranks = self._gathered(torch.cat([seen, wants]))  # [ranks, 4]
            seen = torch.cat([ranks[:, :1].sum(0), ranks[:, 1:].max(0).values])
        self._seen = seen
        if optimizer.defaults.get("fused"):
            optimizer.grad_scale, optimizer.found_inf = None, (~seen[:2].isfinite()).any().float()  # type: ignore[attr-defined]
        else:  # cannot leave out an update by itself
            self._look(optimizer.param_groups[0]["lr"])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The update, and then a look at it.

        Raises:
            TrainingStopped: the loss or the gradient is not finite, or the loss is exactly zero, on any rank.
        """
        lr = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._look(lr)

    def _look(self, lr: float) -> None:
        if self._seen is None:
            return
        loss, grad_norm, *wanted = self._seen.tolist()
        self._seen = None
        self.agreed = {k: int(v) for k, v in zip(self.wants, wanted, strict=True)} if wanted else dict(self.wants)
        self._guard(loss, grad_norm)
        self._window.clear()
        self.step_metrics = {"train/loss": loss, "lr": lr, "grad_norm": grad_norm}

    def _gathered(self, values: Tensor) -> Tensor:
        """values [N] of this rank -> [ranks, N], or [N] on one device."""
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered

    def _guard(self, loss: float, grad_norm: float) -> None:
        """Lets a step pass, skips it, or ends training before the weights change."""
        step = self.trainer.global_step + 1
        advice = "try a lower optimizer.lr, or trainer.gradient_clip_val=1.0"
        if loss == 0.0:
            raise TrainingStopped(
                f"step {step}: the loss is exactly 0, so nothing can be learned; in half precision this is underflow: "
                "use trainer.precision=bf16-true or 32-true"
            )
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if self.spikes.seen(loss):
                print(f"glmft: step {step}: loss {loss:.4g} is far above the {self.spikes.mean:.4g} before", flush=True)
            return
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite"
        records = self._records_of_window()
        if self.skipped < self.skip_nonfinite:
            self.skipped += 1
            self._drop_gradients()  # optimizers leave out what has none
            print(
                f"glmft: {what}; skipped ({self.skipped} of {self.skip_nonfinite}). It learned from {records}",
                flush=True,
            )
            return
        raise TrainingStopped(f"{what}. Weights are as before it; {advice}. It learned from {records}")

    def _records_of_window(self) -> str:
        """Where the records of the current optimizer step stand, on all ranks."""
        if not self._window:
            return "no record"
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        found = data.sources(self._window[0].epoch, self._window[0].index, self.trainer.world_size)
        return ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.step_metrics is not None:
            self.log_dict(self.step_metrics)
        if self.compiles and not gc.get_freeze_count():
            gc.freeze()  # what compiling left: going through it takes 0.4 s each time, with the GPU waiting

    def teardown(self, stage: str) -> None:
        gc.unfreeze()

    # ---- checkpoints hold what was trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The part of the checkpoint that its manifest repeats."""
        step = self.trainer.global_step
        loss = self.validated["val/loss"] if self.validated.get("step") == step else None
        checkpoint["glmft"] = {
            "step": step,
            "val/loss": loss,
            "accumulate": self.trainer.accumulate_grad_batches,
            "world_size": self.trainer.world_size,
            **self.facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches of a rank: where a step is cut into another number of them, its counters are
        written anew from the optimizer steps of the epoch."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        before, now = checkpoint["glmft"], data.schedule(self.trainer.world_size)
        if (before["accumulate"], before["world_size"]) == (now.accumulate, self.trainer.world_size):
            return
        epochs, step = divmod(before["step"], data.steps_per_epoch(self.trainer.world_size))
        recount(progress, epochs, step, now.accumulate, now.num_batches(data.num_rows))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters only."""
        return {n: p.detach() for n, p in self.trained_parameters.items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Takes exactly the trained parameters.

        Raises:
            DamagedError: a name or shape differs; all are named.
        """
        own = self.trained_parameters
        shapes = [{n: tuple(t.shape) for n, t in of.items()} for of in (state_dict, own)]
        problems = tensor_differences(*shapes)
        if problems:
            raise DamagedError("checkpoint: not of this model and strategy:\n  - " + "\n  - ".join(problems[:20]))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])
