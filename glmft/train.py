"""python -m glmft.train: composes a configuration, checks it, trains, and leaves a run directory.

The only place that sees `cfg`. Checks that need no torch come first: a refusal takes a second or two.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, get_args

from omegaconf import DictConfig, OmegaConf, open_dict

from glmft import config, runs
from glmft.data.corpus import CorpusSpec, prepare
from glmft.data.packing import Schedule
from glmft.data.registry import direct_file, find_datasets
from glmft.errors import GlmftError, ProblemList, UserError
from glmft.files import read_json
from glmft.models import hub, published
from glmft.models.tokenizer import load_tokenizer
from glmft.runs import Run
from glmft.schema import PrecisionName

if TYPE_CHECKING:
    import lightning as L

TOPS = (
    *("model", "strategy", "data", "optimizer", "scheduler", "trainer", "callbacks", "logger"),
    *("run", "resume", "seed", "metric", "paths"),
)


def main(cfg: DictConfig) -> float | None:
    """One run; returns the metric that a sweep optimises."""
    config.check(cfg, TOPS)
    run = name_run(cfg)
    if is_main_process():
        if done := already_done(cfg, run):
            return done
        check_inputs(cfg)
    return train(cfg, run)


def is_main_process() -> bool:
    """False in the processes that Lightning's DDP launcher starts: they take the checks as made."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def name_run(cfg: DictConfig) -> Run:
    """Fixes run.name, the same for all ranks."""
    sweep = config.sweep()
    name = os.environ.get("GLMFT_RUN_NAME") if not is_main_process() else cfg.run.name
    if name is None:
        name = runs.default_name(config.choice("experiment"), config.overrides(), sweep[1] if sweep else None)
    os.environ["GLMFT_RUN_NAME"] = str(name)
    run = Run.named(cfg.paths.output_dir, str(name))
    with open_dict(cfg):
        cfg.run.name, cfg.run.dir = run.path.name, str(run.path)
        if sweep and cfg.logger and cfg.logger.get("wandb") and cfg.logger.wandb.group is None:
            cfg.logger.wandb.group = sweep[0]
    return run


def already_done(cfg: DictConfig, run: Run) -> float | None:
    """Compares with what the directory holds; the metric of a finished run that has nothing left to do.

    Raises:
        UserError: the run exists and may not be continued like this; the differences are listed.
    """
    if not run.exists:
        return None
    if cfg.resume.mode == "never":
        raise UserError(f"run.name={run.path.name}: exists; resume=auto continues it, another run.name starts anew")
    file = run.path / ".hydra" / "config.yaml"
    changed = config.differences(config.read_identity(file), config.identity(cfg))
    old = OmegaConf.load(file)
    assert isinstance(old, DictConfig)
    length = [f"trainer.{k}: {old.trainer.get(k)} -> {cfg.trainer.get(k)}" for k in ("max_epochs", "max_steps")
              if old.trainer.get(k) != cfg.trainer.get(k)]  # fmt: skip
    if length and not str(cfg.scheduler._target_).endswith("constant"):
        changed += [f"{line} (the learning rate depends on it)" for line in length]
    unsafe = [c for c in changed if c.startswith(("model.", "strategy."))]
    if changed and (unsafe or not cfg.resume.force):
        how = "choose another run.name" + ("" if unsafe else ", or resume.force=true to go on all the same")
        raise ProblemList(f"run.name={run.path.name} exists with another configuration; {how}", changed)
    if not changed and not length and runs.read_status(run.path).get("state") == "done":
        print(f"glmft: {run.path} is complete; nothing to do (another run.name starts anew)")
        return metric_of(read_json(run.path / "summary.json"))
    return None


def check_inputs(cfg: DictConfig) -> None:
    """Model folder, data and token budgets, before torch is imported; downloads a hub model where that is needed.

    Raises:
        GlmftError: what is missing or does not fit, model and data together.
    """
    if cfg.trainer.precision not in get_args(PrecisionName):
        allowed = ", ".join(get_args(PrecisionName))
        raise UserError(f"trainer.precision={cfg.trainer.precision}: allowed are {allowed}")
    data = config.plain(cfg.data)
    missing = hub.missing_locally(cfg.model.path, cfg.model.source, cfg.model.revision)
    problems = find_datasets([*data["datasets"], *data["val_datasets"]], data["dir"])[1]
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
    prepare(CorpusSpec.of(folder, **data))


def train(cfg: DictConfig, run: Run) -> float | None:
    """Instantiates the pieces, fits, and writes what remains."""
    import lightning as L

    from glmft.callbacks.record import RunRecord
    from glmft.loggers import WandB

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    quiet_libraries()
    trainer, tuner, data = build(cfg)
    record = next((c for c in trainer.callbacks if isinstance(c, RunRecord)), None)  # type: ignore[attr-defined]
    if record is None:
        raise UserError("callbacks.record=null: the run record cannot be left out")
    if trainer.is_global_zero:
        run.start(config.yaml_files(cfg), sys.orig_argv, str(trainer.strategy.root_device))
    trainer.loggers = config.instantiate_all(cfg.logger)  # they write into the run directory
    with runs.logged(run):
        try:
            for logger in trainer.loggers:
                logger.log_hyperparams(config.plain(cfg))
            trainer.fit(tuner, data, ckpt_path=run.last_checkpoint, weights_only=True)
            return finish(cfg, run, trainer, tuner, record)
        except (GlmftError, SystemExit, KeyboardInterrupt) as e:
            record.fail("failed" if isinstance(e, GlmftError) else "stopped", str(e))
            raise KeyboardInterrupt from None if isinstance(e, SystemExit) and trainer.interrupted else e
        except Exception as e:
            record.fail("failed", f"{type(e).__name__}: {e}")
            raise
        finally:
            for logger in trainer.loggers:
                if isinstance(logger, WandB):
                    logger.finish()


def build(cfg: DictConfig) -> tuple[L.Trainer, Any, Any]:
    """(trainer, tuner, data), with the strategy checked against the model's configuration."""
    import torch

    from glmft import precision

    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    name, dtype = precision.choose(cfg.trainer.precision, cfg.model.dtype, on_gpu)
    data = config.instantiate(cfg.data)
    tuner = config.instantiate(cfg.model, dtype=dtype)
    tuner.check()
    trainer = config.instantiate(
        {k: v for k, v in cfg.trainer.items() if k != "precision"},
        plugins=precision.plugin(name),
        callbacks=config.instantiate_all(cfg.callbacks),
        logger=False,
    )
    trainer.accumulate_grad_batches = data.schedule(trainer.world_size).accumulate
    return trainer, tuner, data


def finish(cfg: DictConfig, run: Run, trainer: L.Trainer, tuner: Any, record: Any) -> float | None:
    """summary.json, loss.png and the end panel; returns the metric."""
    from dataclasses import asdict

    from glmft.callbacks.compare import Compare
    from glmft.callbacks.panels import console, end_panel

    if not trainer.is_global_zero:
        return None
    compared = {
        name: asdict(c)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, Compare)
        for name, c in callback.results.items()
    }
    summary = record.finish(trainer, {"metric": cfg.metric, **({"compare": compared} if compared else {})})
    console().print(end_panel(trainer, summary, run.path, tuner.tuning.output, run.path.name))
    return metric_of(summary)


def metric_of(summary: dict[str, Any]) -> float | None:
    """What a sweep optimises: `metric`, or the validation loss where there is one, else the last training loss."""
    if summary.get("metric", "auto") != "auto":
        value = summary.get(summary["metric"])
    else:
        value = summary["val/loss best"] if summary["val/loss best"] is not None else summary["train/loss last"]
    return None if value is None else float(value)


def quiet_libraries() -> None:
    """Lightning's notices and other libraries' deprecation warnings are not about the user's run."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for module in ("lightning", "torch", "bitsandbytes", "peft", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")


if __name__ == "__main__":
    sys.exit(config.run("train", main))
