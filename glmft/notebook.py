"""For notebooks: start a run as its own process, follow it, and put base and tuned answers side by side."""

from __future__ import annotations

import html
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from IPython.display import HTML, Image, clear_output, display

from glmft.callbacks.plot import plot_losses
from glmft.errors import GlmftError
from glmft.messages import Message, Sample
from glmft.models.generation import answer
from glmft.models.tokenizer import ChatGLM3Tokenizer
from glmft.quiet import quiet_libraries
from glmft.runs import Run, read_status

quiet_libraries()
ENDED = ("done", "stopped", "failed")


def train(name: str, *overrides: str, every_seconds: float = 2.0, root: str = "runs") -> Path:
    """Runs `python -m glmft.train run.name=NAME ...` and redraws its loss curve until it ends; its folder.

    Raises:
        GlmftError: the run failed; the message is its own.
    """
    run = Run.named(root, name)
    command = [sys.executable, "-m", "glmft.train", f"run.name={name}", f"paths.output_dir={root}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None:
            show_progress(run)
            time.sleep(every_seconds)
    except KeyboardInterrupt:
        process.terminate()  # it saves and stops
        raise
    finally:
        process.wait()
    show_progress(run)
    if process.returncode:
        assert process.stderr is not None
        raise GlmftError(process.stderr.read().strip())
    return run.path


def show_progress(run: Run) -> None:
    """The loss curve so far, and where the run stands."""
    rows, status = run.metrics(), read_status(run.path)
    clear_output(wait=True)
    if rows:
        picture = run.path / ".live.png"
        plot_losses(rows, picture)
        display(Image(filename=str(picture), width=640))
        picture.unlink()
    eta = status.get("eta")
    left = f", {eta:.0f} s left" if eta and status.get("state") not in ENDED else ""
    print(f"{status.get('state', 'starting')}: step {status.get('step', 0)} of {status.get('total', '?')}{left}")


def show_sample(tokenizer: ChatGLM3Tokenizer, sample: Sample) -> None:
    """Every token of a sample; what is learned has a green background."""
    marks = []
    for i, label in zip(sample.input_ids, sample.labels, strict=True):
        text = html.escape(tokenizer.token_text(i)).replace("\n", "↵")
        style = "background:#c8efcd" if label >= 0 else "color:#888"
        marks.append(f'<span style="{style};padding:1px 3px;margin:1px;border-radius:3px">{text}</span>')
    display(HTML('<div style="line-height:2">' + " ".join(marks) + "</div>"))


def side_by_side(tuned: Any, tokenizer: ChatGLM3Tokenizer, prompts: Sequence[str], max_new_tokens: int = 64) -> None:
    """Answers of base and tuned model from one set of weights: the base is the tuned model with its adapter off."""
    asked = [[Message("user", p)] for p in prompts]
    after = answer(tuned, tokenizer, asked, max_new_tokens)
    with tuned.disable_adapter():
        before = answer(tuned, tokenizer, asked, max_new_tokens)
    rows = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in zip(prompts, before, after, strict=True)
    )
    head = "".join(f'<th style="text-align:left">{h}</th>' for h in ("prompt 问题", "base 原模型", "tuned 微调后"))
    display(HTML(f"<table><tr>{head}</tr>{rows}</table>"))
