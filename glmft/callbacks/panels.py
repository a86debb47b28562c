"""One panel before step 1, one at the end: what will be learned, what came of it, and what to type next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from glmft.callbacks import find_callback
from glmft.callbacks.compare import Compare
from glmft.callbacks.progress import duration
from glmft.callbacks.samples import SampleAnswers
from glmft.callbacks.verdict import verdict_of
from glmft.data.datamodule import InstructionData, total_steps
from glmft.module import FineTuner
from glmft.verdict import summary_lines

FEW_STEPS = 50


def console() -> Console:
    """The terminal; where there is none, wide enough for a table of results."""
    return Console(width=None if Console().is_terminal else 112)


class Panels(L.Callback):
    """The start panel."""

    def on_train_start(self, trainer: L.Trainer, tuner: L.LightningModule) -> None:
        assert isinstance(tuner, FineTuner)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not isinstance(data, InstructionData):
            return
        rows = start_rows(trainer, tuner, data)
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(Text(name, style="dim"), Text(value))
        console().print(Panel(table, title="glmft", title_align="left", box=box.ROUNDED, expand=False))
        if (steps := total_steps(trainer)) < FEW_STEPS:
            console().print(
                f"glmft: {steps} optimizer steps are too few to change most answers; experiment=small_data goes over "
                "few records more often, at a higher rate"
            )


NOTED = (
    "split",
    "shortened",
    "replayed",
    "duplicates",
    "overlap",
    "damaged",
)  # counts that are shown where they are not 0


def start_rows(trainer: L.Trainer, tuner: FineTuner, data: InstructionData) -> dict[str, str]:
    """What the start panel says."""
    report = data.corpus.report()
    plan = data.plan(data.corpus.train, trainer.world_size)
    trained = sum(p.numel() for p in tuner.trained_parameters.values())
    total = sum(p.numel() for p in tuner.parameters())
    dropped = ", ".join(f"{n} {why}" for why, n in report["dropped"].items()) or "none"
    steps = total_steps(trainer)
    sets = ", ".join(f"{name} {of['samples']} ({of['tokens']:,} tokens)" for name, of in report["sets"].items())
    resumed = f", continued from step {trainer.global_step}" if trainer.global_step else ""
    return {
        "model": f"{tuner.folder}  {trainer.precision} on {trainer.strategy.root_device}",
        "strategy": f"{type(tuner.tuning).__name__}, {trained:,} of {total:,} parameters learn ({trained / total:.2%})",
        "records": f"{report['train']} to train, {report['validation']} to validate; dropped: {dropped}; "
        f"cut: {report['truncated']}" + "".join(f"; {k}: {report[k]}" for k in NOTED if report[k]),
        "sets": sets,
        "tokens": f"{report['tokens']:,} an epoch, {report['supervised_tokens']:,} supervised, "
        f"longest record {report['longest']}",
        "steps": f"{steps} ({plan.steps_per_epoch} an epoch), {data.tokens_per_step} tokens a step, "
        f"accumulation {plan.schedule.accumulate}{resumed}",
    }


def end_panel(trainer: L.Trainer, summary: dict[str, Any], run_dir: Path, output: str, next_steps: list[str]) -> Panel:
    """Losses, time, comparison, sample answers and the next commands."""
    parts: list[Any] = [Text(_results(summary))]
    compared = find_callback(trainer, Compare)
    if compared and compared.results:
        parts.append(_comparison_table(compared))
    samples = find_callback(trainer, SampleAnswers)
    if samples and samples.base:
        parts.append(_sample_table(samples))
    if verdict := verdict_of(trainer):
        parts.append(Text("\n".join(summary_lines(verdict)) + "\n"))
    here = os.path.relpath(run_dir)
    lines = [f"{output:8} {here}/{output}", f"loss     {here}/loss.png", *next_steps]
    parts.append(Text("\n".join(lines)))
    return Panel(Group(*parts), title=f"done: {run_dir.name}", title_align="left", box=box.ROUNDED, expand=False)


def _results(summary: dict[str, Any]) -> str:
    first, last = summary["train/loss first"], summary["train/loss last"]
    parts = [f"{summary['steps']} steps in {duration(summary['seconds'])}"]
    if first is not None:
        parts.append(f"train loss {first:.4f} -> {last:.4f}")
    if summary["val/loss best"] is not None:
        parts.append(f"best validation loss {summary['val/loss best']:.4f}")
    return ", ".join([*parts, f"{summary['tokens_per_sec']:,.0f} tokens/s", f"{summary['memory_gib']:.2f} GiB"])


def _comparison_table(compared: Compare) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("data set", "records", "base = reference", "tuned = reference", "tuned right", "answer kept"):
        table.add_column(column, justify="left" if column == "data set" else "right")
    for name, c in compared.results.items():
        shares = (c.base_equal, c.tuned_equal, c.tuned_right, c.kept)
        table.add_row(name, str(c.records), *("–" if s is None else f"{s:.1%}" for s in shares))
    return table


def _sample_table(samples: SampleAnswers) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("prompt", "base", "tuned"):
        table.add_column(column, overflow="fold")
    for row in zip(samples.prompts, samples.base, samples.tuned, strict=True):
        table.add_row(*(Text(cell) for cell in row))
    return table
