"""The LightningDataModule: a corpus, its plan, and loaders whose position follows from the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader, Dataset, Sampler

from glmft.data.collate import Batch, pack, pad
from glmft.data.corpus import Corpus, CorpusSpec, prepare
from glmft.data.encoding import OnBadRecord, OnTooLong
from glmft.data.mixing import Mix, Samples, Until
from glmft.data.packing import MicroBatch, Schedule, plan_padded_rows, plan_rows
from glmft.data.replay import replay_file
from glmft.errors import UserError
from glmft.models.hub import Source, fetch
from glmft.schema import Count, NonNegative, Positive, ReplayShare, Share

Position = tuple[int, int]  # epoch, micro-batches of it already done


class EpochPlan:
    """The micro-batches of one rank in any epoch; plans of the last two epochs are kept."""

    def __init__(self, store: Samples, schedule: Schedule, packed: bool, seed: int, rank: int) -> None:
        self.store, self.schedule, self.packed, self.seed, self.rank = store, schedule, packed, seed, rank
        self.rows = lru_cache(maxsize=2)(self._rows)
        self.batches = lru_cache(maxsize=2)(self._batches)

    def __getstate__(self) -> dict[str, Any]:  # for loader workers that are spawned
        return {k: v for k, v in vars(self).items() if k not in ("rows", "batches")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _rows(self, epoch: int) -> list[list[int]]:
        plan = plan_rows if self.packed else plan_padded_rows
        return plan(self.store.lengths, self.schedule.row_budget, self.seed, epoch)

    def _batches(self, epoch: int) -> list[MicroBatch]:
        return self.schedule.micro_batches(self.rows(epoch), self.store.num_supervised, epoch, self.rank)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.schedule.num_steps(len(self.rows(0)))

    def position(self, global_step: int) -> Position:
        """Where the data stands after so many optimizer steps."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        return epoch, step * self.schedule.accumulate


class PlannedDataset(Dataset[Batch]):
    """(epoch, position) -> Batch."""

    def __init__(self, plan: EpochPlan, pad_id: int) -> None:
        self.plan, self.pad_id = plan, pad_id
        self.longest = int(plan.store.lengths.max())

    def __getitem__(self, at: Position) -> Batch:
        plan, (epoch, position) = self.plan, at
        micro = plan.batches(epoch)[position]
        samples = [plan.store[i] for i in micro.samples]
        where = {"step_tokens": micro.step_tokens, "epoch": epoch, "index": micro.index}
        if not plan.packed:
            return Batch(**pad(samples, self.pad_id, **where))
        rows = -(-sum(len(s[0]) for s in samples) // plan.schedule.row_budget)
        return Batch(**pack(samples, rows * plan.schedule.row_budget, self.pad_id, self.longest, **where))


class PlannedSampler(Sampler[Position]):
    """Positions of one epoch, from where the optimizer stands: a resumed run needs no saved loader state."""

    def __init__(self, plan: EpochPlan, position: Callable[[], Position]) -> None:
        self.plan, self.position = plan, position

    def __iter__(self) -> Iterator[Position]:
        epoch, done = self.position()
        for i in range(done, len(self)):
            yield epoch, i

    def __len__(self) -> int:
        return self.plan.schedule.num_batches(len(self.plan.rows(0)))


class InstructionData(L.LightningDataModule):
    """Instruction records from registry names or a file, packed into token budgets.

    Args:
        model_path: folder or hub id whose tokenizer encodes the text; `model_source`, `model_revision` as in `model`.
        datasets: names in dataset_info.json.
        path: a data file or folder named directly, beside or instead of `datasets`; its format is detected.
        dir: folder of dataset_info.json, looked into before the working directory and ./data.
        val_datasets: names of sets that are only validated on, each with a loss of its own.
        val_fraction: share of the training records held out for validation, chosen by `seed`.
        mix: "concat" takes every sample of every set once an epoch, "interleave" draws from the sets by weight.
        mix_weights: probability of each set, by name or in the order of `datasets`; they sum to 1.
        mix_until: an interleaved epoch ends when the first set is used up, or when all are (smaller sets repeat).
        max_length: longest sample in tokens.
        on_too_long: a longer one is cut (its end is not learned), dropped, split between turns, or stops the run.
        on_bad_record: a record that cannot be used stops the run, or is dropped and counted.
        train_on_prompt: learn the questions too.
        mask_history: learn only what follows the last question.
        max_samples: use only so many samples of each set, chosen by `seed`; or by name, {set: number}.
        fill: values of {{name}}-style blanks in the records.
        packing: whole samples share a row, kept apart by attention; false pads each to the longest instead.
        tokens_per_batch: tokens of a micro-batch, which decides memory.
        tokens_per_step: tokens of an optimizer step, over all devices and micro-batches, which decides the result.
        num_workers: loader processes.
        cache: keep token files for later runs (`glmft data cache list`); false for sets that should not be kept.
        replay: "self" mixes in the base model's own answers to packaged prompts, against forgetting; train.py has
            them made before the data is read (`glmft.data.replay`).
        replay_share: of all training records, and at least 64 records.
        seed: of the validation split and of the order of each epoch.

    Raises:
        UserError, ProblemList: see `glmft.data.corpus.prepare` and `glmft.data.packing.Schedule`.
    """

    def __init__(
        self,
        model_path: str,
        model_source: Source = "auto",
        model_revision: str | None = None,
        datasets: list[str] | None = None,
        path: str | None = None,
        dir: str | None = None,
        val_datasets: list[str] | None = None,
        val_fraction: Share = 0.0,
        mix: Mix = "concat",
        mix_weights: dict[str, NonNegative] | list[NonNegative] | None = None,
        mix_until: Until = "first_exhausted",
        max_length: Positive = 2048,
        on_too_long: OnTooLong = "truncate",
        on_bad_record: OnBadRecord = "error",
        train_on_prompt: bool = False,
        mask_history: bool = False,
        max_samples: Positive | dict[str, Positive] | None = None,
        fill: dict[str, str | int | float] | None = None,
        packing: bool = True,
        tokens_per_batch: Positive = 8192,
        tokens_per_step: Positive = 2048,
        num_workers: Count = 0,
        cache: bool = True,
        replay: Literal["self"] | None = None,
        replay_share: ReplayShare = 0.5,
        seed: Count = 0,
    ) -> None:
        super().__init__()
        folder = fetch(model_path, model_source, model_revision)
        self.spec = CorpusSpec.of(
            folder,
            datasets=datasets,
            path=path,
            dir=dir,
            val_datasets=val_datasets,
            val_fraction=val_fraction,
            mix=mix,
            mix_weights=mix_weights,
            mix_until=mix_until,
            max_length=max_length,
            on_too_long=on_too_long,
            on_bad_record=on_bad_record,
            train_on_prompt=train_on_prompt,
            mask_history=mask_history,
            max_samples=max_samples,
            fill=fill,
            replay=str(replay_file(folder)) if replay else None,
            replay_share=replay_share,
            seed=seed,
            cache=cache,
        )
        self.packing, self.num_workers, self.replay, self.seed = packing, num_workers, replay, seed
        self.max_length, self.tokens_per_batch, self.tokens_per_step = max_length, tokens_per_batch, tokens_per_step
        self.corpus: Corpus = prepare(self.spec)
        self.pad_id = 0

    def schedule(self, world_size: int = 1) -> Schedule:
        """The budgets in rows. A padded micro-batch is one row."""
        row = Schedule(self.tokens_per_step, self.tokens_per_step, self.max_length).row_budget
        budget = self.tokens_per_batch if self.packing else row
        return Schedule(self.tokens_per_step, budget, self.max_length, world_size)

    def plan(self, store: Samples, world_size: int = 1, rank: int = 0) -> EpochPlan:
        """The plan of a store for one rank."""
        return EpochPlan(store, self.schedule(world_size), self.packing, self.seed, rank)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Optimizer steps of an epoch."""
        return self.schedule(world_size).num_steps(self.num_rows)

    @cached_property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.plan(self.corpus.train).rows(0))

    def sources(self, epoch: int, index: int, world_size: int) -> list[str]:
        """Where the records of an optimizer step stand: that of micro-batch `index` (over all ranks) of an epoch."""
        schedule = self.schedule(world_size)
        step = index // (schedule.accumulate * world_size)
        rows = self.plan(self.corpus.train, world_size).rows(epoch)
        chosen = rows[step * schedule.rows_per_step : (step + 1) * schedule.rows_per_step]
        return self.corpus.sources(self.corpus.train, sorted(i for row in chosen for i in row))

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        plan = self.plan(self.corpus.train, self.trainer.world_size, self.trainer.global_rank)
        trainer = self.trainer
        if trainer.accumulate_grad_batches != plan.schedule.accumulate:
            raise UserError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, but the token budgets make it "
                f"{plan.schedule.accumulate}; set data.tokens_per_batch and data.tokens_per_step instead"
            )
        return self._loader(plan, lambda: plan.position(trainer.global_step))

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader a validation set, in the order of `val_sets`."""
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        plans = [self.plan(samples, world, rank) for samples in self.corpus.validation.values()]
        return [self._loader(plan, lambda: (0, 0)) for plan in plans]

    @property
    def val_sets(self) -> list[str]:
        """Names of the validation sets."""
        return list(self.corpus.validation)

    def _loader(self, plan: EpochPlan, position: Callable[[], Position]) -> DataLoader[Batch]:
        assert self.trainer is not None
        return DataLoader(
            PlannedDataset(plan, self.pad_id),
            sampler=PlannedSampler(plan, position),
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


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
