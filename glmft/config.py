"""How Hydra runs our programs: composing, checking a configuration, and what a job knows of itself."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from glmft import signatures
from glmft.caches import use_cache_dir
from glmft.command_line import prepare_argv, unquote
from glmft.errors import DamagedError, GlmftError, ProblemList, nearest
from glmft.recipes import conf_dir, user_dirs

IDENTITY = ("model", "strategy", "data", "optimizer", "scheduler", "seed")
FREE_DATA_KEYS = ("num_workers", "tokens_per_batch", "cache")
IDENTITY_OF_TRAINER = ("precision", "gradient_clip_val")
SECTIONS = ("run", "resume", "paths", "trainer", "bench")
OTHER_NAMES = {  # names that people know from LLaMA-Factory, and keys that were renamed (for one minor version)
    "model_name_or_path": "model.path",
    "finetuning_type": "strategy",
    "lora_rank": "strategy.r",
    "lora_alpha": "strategy.alpha",
    "lora_dropout": "strategy.dropout",
    "lora_target": "strategy.targets",
    "dataset": "data.datasets",
    "dataset_dir": "data.dir",
    "eval_dataset": "data.val_datasets",
    "val_size": "data.val_fraction",
    "cutoff_len": "data.max_length",
    "max_samples": "data.max_samples",
    "mix_strategy": "data.mix",
    "interleave_probs": "data.mix_weights",
    "train_on_prompt": "data.train_on_prompt",
    "mask_history": "data.mask_history",
    "packing": "data.packing",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "scheduler",
    "warmup_ratio": "scheduler.warmup_ratio",
    "warmup_steps": "scheduler.warmup_steps",
    "num_train_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps",
    "max_grad_norm": "trainer.gradient_clip_val",
    "per_device_train_batch_size": "data.tokens_per_batch",
    "gradient_accumulation_steps": "data.tokens_per_step",
    "output_dir": "paths.output_dir",
    "report_to": "logger",
}
OWN_KEYS = (  # of Lightning's Trainer: they follow from the data's plan
    *("accumulate_grad_batches", "limit_train_batches", "overfit_batches", "gradient_clip_algorithm"),
    *("reload_dataloaders_every_n_epochs", "callbacks", "logger", "plugins"),
)


class UserRecipes(SearchPathPlugin):
    """Puts a user's own recipes in front of the packaged ones."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(user_dirs()):
            search_path.prepend("user", f"file://{folder}")


# ---- running


def run(config_name: str, main: Callable[[DictConfig], Any]) -> int:
    """Composes the configuration, calls `main` (once a job of a multirun) and turns failures into exit codes."""
    use_cache_dir()
    name_crashes()
    debug = any(a.removeprefix("++") == "debug=default" for a in sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    Plugins.instance().register(UserRecipes)

    @functools.wraps(main)
    def job(cfg: DictConfig) -> Any:
        try:
            return main(cfg)
        except (KeyboardInterrupt, *EXPECTED) as e:
            raise SystemExit(_exit_code(e, debug)) from None  # past Hydra, which would add its own lines

    try:
        sys.argv[1:] = prepare_argv(sys.argv[1:])
        hydra.main(config_path=str(conf_dir()), config_name=config_name, version_base="1.3")(job)()
    except EXPECTED as e:
        return _exit_code(e, debug)
    return 0


def name_crashes() -> None:
    """What ends a process without an exception, such as weights cut off while they are mapped, leaves a stack."""
    with contextlib.suppress(OSError):  # stderr may be no file
        faulthandler.enable()


EXPECTED = (GlmftError, HydraException, OmegaConfBaseException, YAMLError)


def _exit_code(e: BaseException, debug: bool) -> int:
    """Says what went wrong and returns the exit code for it."""
    if debug:
        traceback.print_exception(e)
    if isinstance(e, KeyboardInterrupt):
        print("glmft: interrupted", file=sys.stderr)
        return 130
    print(f"glmft: {_explain(e)}", file=sys.stderr)
    return e.exit_code if isinstance(e, GlmftError) else 2


def _explain(e: BaseException) -> str:
    if isinstance(e, YAMLError):
        return f"not valid YAML: {e}"
    lines = [line for line in str(e).splitlines() if line.strip() and "hydra.searchpath" not in line]
    return "\n".join(lines)


# ---- checking


def check(cfg: DictConfig, tops: tuple[str, ...]) -> None:
    """Names, types and ranges of every value, against the signatures they are for.

    Raises:
        ProblemList: everything that is wrong, together.
    """
    problems = [f"{key}: unknown key{_other_name(key, tops)}" for key in map(str, cfg) if key not in tops]
    missing = [f"{key}: must be given (it is ???)" for key in sorted(OmegaConf.missing_keys(cfg))]
    if unusable := missing or _unresolvable(cfg):
        raise ProblemList("configuration", problems + unusable)
    single = {k: cfg[k] for k in ("seed", "metric") if k in cfg}
    problems += [p.removeprefix(".") for p in signatures.problems("glmft.schema.top", single, "", False)]
    for section in (s for s in SECTIONS if s in cfg):
        problems += signatures.problems(f"glmft.schema.{section}", plain(cfg[section]), section, False)
    for group in ("callbacks", "logger"):
        problems += _unnamed(cfg.get(group) or {}, group)
    problems += [f"trainer.{key}: glmft decides this itself; leave it out" for key in cfg.trainer if key in OWN_KEYS]
    for where, node in _targets(cfg, ""):
        values: dict[str, Any] = plain(node)
        target, partial = values.pop("_target_"), bool(values.pop("_partial_", False))
        values = {k: v for k, v in values.items() if not k.startswith("_")}
        problems += signatures.problems(str(target), values, where, partial)
    if problems:
        raise ProblemList("configuration", problems)


def _other_name(key: str, tops: tuple[str, ...]) -> str:
    return f"; here it is called {OTHER_NAMES[key]}" if key in OTHER_NAMES else nearest(key, tops)


def _unnamed(nodes: Any, group: str) -> list[str]:
    """Children of callbacks and logger that say nothing of what they are: a misspelt name, or a group not chosen."""
    known = [k for k, v in nodes.items() if v is not None and "_target_" in v]
    return [
        f"{group}.{k}: there is no such entry{nearest(k, known) or f' (choose it with {group}=..., or add a _target_)'}"
        for k, v in nodes.items()
        if v is not None and "_target_" not in v
    ]


def _unresolvable(cfg: DictConfig) -> list[str]:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as e:
        return [str(e).splitlines()[0]]
    return []


def _targets(node: DictConfig | ListConfig, where: str) -> Iterator[tuple[str, DictConfig]]:
    """Every node with a `_target_` and its key; interpolated nodes are visited where they are written."""
    if isinstance(node, DictConfig) and "_target_" in node:
        yield where, node
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_interpolation(node, key):
            continue
        child = node[key]
        if isinstance(child, (DictConfig, ListConfig)):
            yield from _targets(child, f"{where}.{key}" if where else str(key))


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What must match for a run to be continued: `strategy.r` -> 8, flat and resolved."""
    whole = plain(cfg)
    flat = dict(_flatten({k: whole[k] for k in IDENTITY if k in whole}, ""))
    flat |= {f"trainer.{k}": (whole.get("trainer") or {}).get(k) for k in IDENTITY_OF_TRAINER}
    return {
        k: v
        for k, v in flat.items()
        if not k.startswith(("model.strategy.", "model.optimizer.", "model.scheduler."))
        and k not in {f"data.{name}" for name in FREE_DATA_KEYS}
    }


def _flatten(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _flatten(child, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


# ---- what a job knows of itself


def instantiate(node: Any, **more: Any) -> Any:
    """Hydra's instantiate; the only call of it."""
    return hydra.utils.instantiate(node, **more)


def instantiate_all(nodes: DictConfig | None) -> list[Any]:
    """A dict of `_target_` nodes as a list; entries set to null are left out."""
    return [instantiate(node) for node in (nodes or {}).values() if node is not None]


def overrides() -> list[str]:
    """This job's overrides as the user wrote them, without what `prepare_argv` added."""
    return [unquote(o.removeprefix("++")) for o in HydraConfig.get().overrides.task]


def choice(group: str) -> str:
    """The chosen option of a group."""
    return str(HydraConfig.get().runtime.choices.get(group) or "default")


def sweep() -> tuple[str, int] | None:
    """(name, job number) of a multirun, or None."""
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return None
    return Path(config.sweep.dir).name, int(config.job.num)


def command(values: Mapping[str, Any]) -> str:
    """This job alone, ready to paste, with some values set anew: `{"run.name": "a"}`; None leaves one out."""
    kept = [o for o in overrides() if o.partition("=")[0] not in values]
    new = [f"{k}={v}" for k, v in values.items() if v is not None]
    return shlex.join(["python", "-m", "glmft.train", *kept, *new])


def yaml_files(cfg: DictConfig) -> dict[str, str]:
    """What Hydra itself would leave in .hydra/."""
    return {
        "config.yaml": OmegaConf.to_yaml(cfg, resolve=True),
        "overrides.yaml": OmegaConf.to_yaml(OmegaConf.create(overrides())),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()})),
    }


def plain(node: Any) -> Any:
    """A config node as resolved dicts and lists."""
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, (DictConfig, ListConfig)) else node


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`strategy.r: 8 -> 16` for every key that is not the same."""
    keys = sorted(set(old) | set(new))
    absent = "(not set)"
    return [
        f"{k}: {old.get(k, absent)} -> {new.get(k, absent)}" for k in keys if old.get(k, absent) != new.get(k, absent)
    ]


def read(file: Path) -> DictConfig:
    """A configuration that was written before.

    Raises:
        DamagedError: the file cannot be read.
    """
    try:
        cfg = OmegaConf.load(file)
    except (OSError, YAMLError) as e:
        raise DamagedError(f"{file}: cannot be read ({e})") from None
    assert isinstance(cfg, DictConfig)
    return cfg
