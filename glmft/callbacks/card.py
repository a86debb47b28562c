"""The model card that lies beside an adapter."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from glmft import __version__
from glmft.callbacks.verdict import verdict_of
from glmft.models.saving import LICENCE
from glmft.module import FineTuner
from glmft.verdict import summary_lines

_CARD = """---
base_model: {base}
library_name: {library}
tags: [chatglm3, glmft, {strategy}]
---

# {name}

Fine-tuned from `{base}` with glmft {version}, strategy `{strategy}`,
{steps} optimizer steps.

| | |
|---|---|
| training loss, last step | {train} |
| validation loss | {val} |
| trained parameters | {trained:,} |

{verdict}
The command that made it:

```
{command}
```

{licence}"""


def model_card(trainer: L.Trainer, tuner: FineTuner, run_dir: Path) -> str:
    """README.md of an adapter or model folder: base, command, results, licence."""
    metrics = trainer.callback_metrics
    command = run_dir / "command.txt"
    verdict = verdict_of(trainer)
    return _CARD.format(
        licence=LICENCE,
        base=tuner.path,
        library="peft" if tuner.tuning.output == "adapter" else "transformers",
        strategy=type(tuner.tuning).__name__.lower(),
        name=run_dir.name,
        version=__version__,
        steps=trainer.global_step,
        train=_number(metrics.get("train/loss")),
        val=_number(metrics.get("val/loss")),
        verdict="" if verdict is None else "```\n" + "\n".join(summary_lines(verdict)) + "\n```\n",
        trained=sum(p.numel() for p in tuner.trained_parameters.values()),
        command=command.read_text(encoding="utf-8").splitlines()[-1] if command.is_file() else "",
    )


def _number(value: object) -> str:
    return "not measured" if value is None else f"{float(value):.4f}"  # type: ignore[arg-type]
