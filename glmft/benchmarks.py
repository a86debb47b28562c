"""glmft eval: base and what was trained on the tasks of lm-eval, from one set of weights, without an export."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmft import console
from glmft.caches import use_cache_dir
from glmft.errors import ResourceError, UserError
from glmft.files import write_json
from glmft.quiet import quiet_libraries
from glmft.tables import as_text

if TYPE_CHECKING:
    from glmft.engine import Engine


def evaluate(engine: Engine, tasks: Sequence[str], folder: Path | None, **options: Any) -> dict[str, dict[str, Any]]:
    """Results of each voice: {voice: {task: {metric: value}}}.

    Args:
        engine: the voices.
        tasks: names that lm-eval knows, or that lie in `folder`.
        folder: own tasks, in lm-eval's YAML.
        options: of `lm_eval.simple_evaluate`: num_fewshot, limit, batch_size, apply_chat_template.

    Raises:
        UserError: a task is unknown.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from glmft.models.fast import fast_tokenizer
    from glmft.models.loading import glm

    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [t for t in tasks if not manager.match_tasks([t])]:
        raise UserError(
            f"--tasks: lm-eval knows no '{unknown[0]}'; lm-eval ls tasks lists them, --include adds a folder"
        )
    tokenizer = fast_tokenizer(engine.tokenizer, engine.limit)
    found: dict[str, dict[str, Any]] = {}
    for voice in engine.names:
        with engine.speaking(voice) as model:
            scored = HFLM(pretrained=glm(model), tokenizer=tokenizer, batch_size=options.get("batch_size", 8))
            result = simple_evaluate(
                model=scored, tasks=list(tasks), task_manager=manager, log_samples=False, **options
            )
        found[voice] = {
            task: {k: v for k, v in values.items() if isinstance(v, (int, float))}
            for task, values in (result or {})["results"].items()
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of text: task and metric, a value for each voice with its standard error."""
    voices = list(found)
    rows = [["", *voices]]
    for task, values in found[voices[0]].items():
        for metric in values:
            name, _, how = metric.partition(",")
            if name.endswith("_stderr") or name in ("sample_len", "alias"):
                continue
            error = f"{name}_stderr,{how}"
            cells = [found[v][task] for v in voices]
            told = (f"{c[metric]:.4f}" + (f" ± {c[error]:.4f}" if error in c else "") for c in cells)
            rows.append([f"{task} {name}" + (f" ({how})" if how != "none" else ""), *told])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft eval", description=__doc__)
    parser.add_argument("sources", nargs="+", help="runs, adapter folders or models; the base is always scored too")
    parser.add_argument("--tasks", nargs="+", required=True, help="ceval-valid, cmmlu, mmlu ...: lm-eval ls tasks")
    parser.add_argument("--include", type=Path, help="a folder of own tasks, in lm-eval's YAML")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=int, help="only so many examples of each task")
    parser.add_argument("--chat", action="store_true", help="ask in ChatGLM3's chat layout")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    console.add_weights(parser)
    given = parser.parse_args(arguments)
    use_cache_dir()
    quiet_libraries()

    def command() -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise ResourceError("glmft eval needs lm-eval: pip install 'glmft[benchmarks]'")
        engine = console.open_engine(given)
        options = {"num_fewshot": given.num_fewshot, "limit": given.limit, "batch_size": given.batch_size}
        found = evaluate(engine, given.tasks, given.include, apply_chat_template=given.chat, **options)
        if given.out:
            write_json(given.out, {"results": found, "options": vars(given)})
        print(as_text(table(found)))

    return console.run(command)


if __name__ == "__main__":
    sys.exit(main())
