"""python -m glmft.train: composes a configuration, checks it, trains, and leaves a run directory.

The only place that sees `cfg`. Checks that need no torch come first: a refusal takes a second or two.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict

from glmft import config, runs
from glmft.artefacts import read_manifest, remove_leftovers
from glmft.data.corpus import CorpusSpec, prepare
from glmft.data.packing import Schedule
from glmft.data.registry import direct_file, find_datasets
from glmft.errors import DamagedError, ProblemList, UserError
from glmft.files import read_json
from glmft.locks import RankGuard, RunLock
from glmft.models import hub, published
from glmft.models.tokenizer import load_tokenizer
from glmft.quiet import quiet_libraries
from glmft.runs import Run

if TYPE_CHECKING:
    import lightning as L

TOPS = (
    *("model", "strategy", "data", "optimizer", "scheduler", "trainer", "callbacks", "logger"),
    *("run", "resume", "seed", "metric", "paths"),
)
FACTS = {"base": "base model", "data": "training records"}  # that a checkpoint belongs to


def main(cfg: DictConfig) -> float | None:
    """One run; returns the metric that a sweep optimises."""
    config.check(cfg, TOPS)
    run = name_run(cfg)
    if is_main_process() or cfg.resume.mode != "never":  # by now the first process may have begun it
        complete, metric = already_done(cfg, run)
        if complete:
            return metric
    if not is_main_process():
        with RankGuard(run.path, rank()):
            return train(cfg, run, run.newest_checkpoint()[0], {})
    facts = check_inputs(cfg)
    run.check_free()
    with RunLock(run.path), RankGuard(run.path, 0) if distributed(cfg) else nullcontext():
        return train(cfg, run, checkpoint_to_continue(run, facts), facts)


def rank() -> int:
    """Of this process in a distributed run, as far as the environment tells it before Lightning starts."""
    return max(int(os.environ.get(k, "0")) for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def is_main_process() -> bool:
    """False in the other processes of a distributed run: they take the checks as made."""
    return rank() == 0


def distributed(cfg: DictConfig) -> bool:
    """Whether several processes will make this run."""
    return cfg.trainer.devices not in (1, [0], "1") or cfg.trainer.get("num_nodes", 1) != 1


def name_run(cfg: DictConfig) -> Run:
    """Fixes run.name, the same for all ranks; jobs of a multirun get their number behind it.

    Raises:
        UserError: a multirun with several devices a job: Lightning would start the whole sweep on each.
    """
    sweep = config.sweep()
    if sweep and cfg.trainer.devices != 1:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: a job of a multirun has one device")
    name, job = cfg.run.name, sweep[1] if sweep else None
    if name is not None:
        name = str(name) if job is None else f"{name}-{job}"
    elif is_main_process():
        name = runs.default_name(config.choice("experiment"), config.overrides(), job)
    else:
        name = os.environ["GLMFT_RUN_NAME"]
    os.environ["GLMFT_RUN_NAME"] = name
    run = Run.named(cfg.paths.output_dir, name)
    with open_dict(cfg):
        cfg.run.name, cfg.run.dir = run.path.name, str(run.path)
        if sweep and cfg.logger and cfg.logger.get("wandb") and cfg.logger.wandb.group is None:
            cfg.logger.wandb.group = sweep[0]
    return run


def already_done(cfg: DictConfig, run: Run) -> tuple[bool, float | None]:
    """Compares with what the directory holds: (is there nothing left to do, the metric of the finished run).

    Raises:
        UserError: the run exists and may not be continued like this; the differences are listed.
    """
    if not run.exists:
        return False, None
    if cfg.resume.mode == "never":
        raise UserError(f"run.name={run.path.name}: exists; resume=auto continues it, another run.name starts anew")
    old = config.read(run.path / ".hydra" / "config.yaml")
    if changed := config.differences(config.identity(old), config.identity(cfg)):
        title = f"run.name={run.path.name} exists with another configuration; choose another run.name"
        raise ProblemList(title, changed)
    lengths = [(f"trainer.{k}", old.trainer.get(k), cfg.trainer.get(k)) for k in ("max_epochs", "max_steps")]
    longer = [f"{key}: {before} -> {now}" for key, before, now in lengths if before != now]
    if any((now or 0) < (before or 0) for _, before, now in lengths):
        raise ProblemList(f"run.name={run.path.name}: a run can only be made longer", longer)
    depends = "min_ratio" in cfg.scheduler or cfg.scheduler.get("warmup_ratio", 0) > 0
    if longer and depends and not cfg.resume.force:
        title = (
            f"run.name={run.path.name}: the learning rate depends on the length; resume.force=true goes on all the same"
        )
        raise ProblemList(title, longer)
    if not longer and runs.read_status(run.path).get("state") == "done":
        if is_main_process():
            print(f"glmft: {run.path} is complete; nothing to do (another run.name starts anew)")
        return True, metric_of(read_json(run.path / "summary.json"), cfg.metric)
    return False, None


def checkpoint_to_continue(run: Run, facts: dict[str, str]) -> Path | None:
    """The newest checkpoint that is whole; None for a new run. Says what is wrong with newer ones.

    Raises:
        DamagedError: there are checkpoints, and none of them is whole.
        ProblemList: it was made with another base model or other data.
    """
    for place in (run.path, run.checkpoints):
        remove_leftovers(place)
    folder, damaged = run.newest_checkpoint()
    if folder is None and damaged:
        told = "\n  - ".join(damaged)
        raise DamagedError(
            f"{run.checkpoints}: no checkpoint to continue from; remove the run to start anew\n  - {told}"
        )
    if folder is None:
        return None
    manifest = read_manifest(folder)
    for problem in damaged:
        print(f"glmft: {problem}: set aside, going on from step {manifest['step']} instead", flush=True)
    run.set_aside(int(manifest["step"]))
    changed = [
        f"{what}: {manifest.get(key)} -> {facts[key]}" for key, what in FACTS.items() if manifest.get(key) != facts[key]
    ]
    if changed:
        title = f"run.name={run.path.name}: {folder.name} was made with something else; choose another run.name"
        raise ProblemList(title, changed)
    return folder


def check_inputs(cfg: DictConfig) -> dict[str, str]:
    """Model folder, data and token budgets, before torch is imported; downloads a hub model where that is needed.
    Returns fingerprints of what a checkpoint belongs to.

    Raises:
        GlmftError: what is missing or does not fit, model and data together.
    """
    data = config.plain(cfg.data)
    missing = hub.missing_locally(cfg.model.path, cfg.model.source, cfg.model.revision)
    compared = (cfg.callbacks.get("compare") or {}).get("datasets", [])
    problems = find_datasets([*data["datasets"], *data["val_datasets"], *compared], data["dir"])[1]
    if cfg.trainer.max_epochs in (None, -1) and cfg.trainer.max_steps == -1:
        problems.append("trainer.max_epochs and trainer.max_steps are both without a limit; give one")
    if 0 in (cfg.trainer.max_epochs, cfg.trainer.max_steps):
        problems.append("trainer.max_epochs or trainer.max_steps is 0: there is nothing to do")
    if data["path"] is not None:
        try:
            direct_file(data["path"])
        except UserError as e:
            problems.append(str(e))
    if problems:
        raise ProblemList("before training", [*([missing] if missing else []), *problems])
    folder = hub.fetch(cfg.model.path, cfg.model.source, cfg.model.revision)
    model, _, _ = published.check_folder(folder)
    published.check_tokenizer(len(load_tokenizer(folder)), model, folder)
    if data["max_length"] > model.seq_length:
        raise UserError(f"data.max_length={data['max_length']}: the model reads {model.seq_length} tokens at most")
    Schedule(data["tokens_per_step"], data["tokens_per_batch"], data["max_length"])
    corpus = prepare(CorpusSpec.of(folder, **data | {"replay": None}))  # its records are made with the model
    return {"base": published.fingerprint(folder), "data": corpus.fingerprint()}


def train(cfg: DictConfig, run: Run, checkpoint: Path | None, facts: dict[str, str]) -> float | None:
    """Instantiates the pieces, fits, and writes what remains."""
    import lightning as L

    from glmft.callbacks import find_callback
    from glmft.callbacks.record import RunRecord
    from glmft.callbacks.stop import GracefulStop
    from glmft.failures import as_failure
    from glmft.loggers import WandB

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    quiet_libraries()
    stop = GracefulStop()
    trainer, tuner, data = build(cfg, stop)
    tuner.facts = facts
    record = find_callback(trainer, RunRecord)
    if record is None:
        raise UserError("callbacks.record=null: the run record cannot be left out")
    command = config.command({"run.name": run.path.name})
    if trainer.is_global_zero:
        run.start(config.yaml_files(cfg), command, str(trainer.strategy.root_device))
    failed: BaseException | None = None
    stop.install()
    try:
        with runs.logged(run) if trainer.is_global_zero else nullcontext():
            trainer.loggers = config.instantiate_all(cfg.logger)  # they write into the run directory
            for logger in trainer.loggers:
                logger.log_hyperparams(config.plain(cfg))
            trainer.fit(tuner, data, ckpt_path=checkpoint, weights_only=True)
            if not record.ended:  # the checkpoint was the last of the run: no step was left, the rest was
                tuner.to(trainer.strategy.root_device)
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    callback.on_train_end(trainer, tuner)
            return finish(cfg, run, trainer, tuner, record)
    except BaseException as e:
        failed = as_failure(e, trainer)
        raise failed from None
    finally:
        stop.restore()
        if failed and trainer.is_global_zero:
            stopped = isinstance(failed, (SystemExit, KeyboardInterrupt))
            reason = stop.signal.name if stop.signal else str(failed) or type(failed).__name__
            with suppress(OSError):
                record.fail("stopped" if stopped else "failed", reason)
            if stopped:
                print(
                    f"glmft: stopped ({reason}) after step {trainer.global_step}; to go on:\n    {command}", flush=True
                )
            with suppress(OSError), (run.path / "run.log").open("a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception(failed)))
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.finish(failed=failed is not None)


def build(cfg: DictConfig, stop: Any) -> tuple[L.Trainer, Any, Any]:
    """(trainer, tuner, data), with the strategy checked against the model's configuration."""
    import torch

    from glmft import precision
    from glmft.checkpoints import CheckpointFiles
    from glmft.data.replay import make_replay

    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    name, dtype = precision.choose(cfg.trainer.precision, cfg.model.dtype, on_gpu)
    tuner = config.instantiate(cfg.model, dtype=dtype)
    tuner.check()
    if on_gpu and not precision.real_bf16() and tuner.tuning.quantization(torch.float32) is None:
        shapes = published.read_config(tuner.folder)[0].tensors().values()
        precision.check_fp32_fits(sum(map(math.prod, shapes)), torch.cuda.get_device_properties(0).total_memory)
    if cfg.data.replay:
        make_replay(tuner.folder, lambda: tuner.load(torch.device("cuda" if on_gpu else "cpu"), dtype))
    data = config.instantiate(cfg.data)
    trainer = config.instantiate(
        {k: v for k, v in cfg.trainer.items() if k != "precision"},
        plugins=[precision.plugin(name), CheckpointFiles()],
        callbacks=[*config.instantiate_all(cfg.callbacks), stop],
        logger=False,
    )
    trainer.accumulate_grad_batches = data.schedule(trainer.world_size).accumulate
    return trainer, tuner, data


def finish(cfg: DictConfig, run: Run, trainer: L.Trainer, tuner: Any, record: Any) -> float | None:
    """summary.json, loss.png and the end panel; returns the metric."""
    from dataclasses import asdict

    from glmft.callbacks.compare import Compare
    from glmft.callbacks.panels import console, end_panel
    from glmft.callbacks.verdict import verdict_of

    if not trainer.is_global_zero:
        return None
    compared = {
        name: asdict(c)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, Compare)
        for name, c in callback.results.items()
    }
    verdict = verdict_of(trainer)
    more: dict[str, Any] = {"compare": compared} if compared else {}
    if verdict:
        more |= {"learned": verdict.learned, "kept": verdict.kept}
    summary = record.finish(trainer, more)
    steps = [*next_steps(verdict.advice if verdict else []), f"longer   {longer_command(cfg, run)}"]
    console().print(end_panel(trainer, summary, run.path, tuner.tuning.output, steps))
    return metric_of(summary, cfg.metric)


def next_steps(advice: list[Any]) -> list[str]:
    """What the verdict suggests, each as a command for a new run."""
    return [
        f"next     {a.why}" + (f": {config.command({'run.name': None, **a.overrides})}" if a.overrides else "")
        for a in advice
    ]


def longer_command(cfg: DictConfig, run: Run) -> str:
    """The command that goes on with this run for as long again."""
    key = "max_steps" if cfg.trainer.max_steps != -1 else "max_epochs"
    values = {f"trainer.{key}": 2 * cfg.trainer[key], "run.name": run.path.name, "resume.force": "true"}
    return config.command(values)


def metric_of(summary: dict[str, Any], metric: str) -> float | None:
    """What a sweep optimises; "auto" is the best validation loss where there is one, else the last training loss."""
    losses = {"val/loss": summary["val/loss best"], "train/loss": summary["train/loss last"]}
    if metric == "auto":
        metric = "train/loss" if losses["val/loss"] is None else "val/loss"
    return losses[metric]


if __name__ == "__main__":
    sys.exit(config.run("train", main))
