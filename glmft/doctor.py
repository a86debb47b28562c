"""glmft doctor: is everything here that a run needs, and if not, which line fixes it?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text as RichText

from glmft.caches import use_cache_dir
from glmft.checks import machine, model, services
from glmft.checks.finding import Check, Finding, Text, both, guarded
from glmft.models.hub import find_local

MARKS = {True: ("✔", "green"), False: ("✘", "red"), None: ("–", "dim")}


def examine(path: str, data: Sequence[str], answer: bool) -> list[Finding]:
    """All findings, in the order in which things go wrong on a new machine."""
    checks: list[tuple[Text, Check]] = [
        (both("GPU"), machine.check_gpu),
        (Text("disk", "磁盘"), machine.check_disk),
        (Text("model", "模型"), partial(model.check_model, path, answer)),
        (Text("data sets", "数据集"), partial(services.check_data, data)),
        (Text("hub", "模型库"), partial(services.check_hub, find_local(path) is None)),
        (both("W&B"), services.check_wandb),
        (Text("tab completion", "Tab 补全"), services.check_completion),
    ]
    return [finding for name, check in checks for finding in guarded(name, check)]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(prog="glmft doctor", description=__doc__)
    parser.add_argument("--model", default="zai-org/chatglm3-6b", help="folder or hub id (default: %(default)s)")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME", help="data sets that a run will use")
    parser.add_argument(
        "--answer", action="store_true", help="load the model and ask it 你好 (the 6B's answer is known)"
    )
    parser.add_argument("--lang", choices=("auto", "en", "zh"), default="auto", help="auto follows LANG")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    options = parser.parse_args(arguments)
    use_cache_dir()
    lang = options.lang
    if lang == "auto":
        spoken = os.environ.get("LC_ALL") or os.environ.get("LANG") or ""
        lang = "zh" if spoken.startswith("zh") else "en"
    findings = examine(options.model, options.data, options.answer)
    bad = sum(f.ok is False for f in findings)
    if options.json:
        print(json.dumps([f.to_json(lang) for f in findings], ensure_ascii=False, indent=2))
    else:
        show(findings, lang)
        done = Text(f"{bad} problems" if bad else "all is well", f"{bad} 个问题" if bad else "一切正常")
        print(f"\n{getattr(done, lang)}")
    return 1 if bad else 0


def show(findings: Sequence[Finding], lang: str) -> None:
    """One line a finding; the line that fixes it stands below, never wrapped."""
    console = Console(soft_wrap=True, highlight=False)
    width = max(cell_len(getattr(f.name, lang)) for f in findings)
    for finding in findings:
        mark, style = MARKS[finding.ok]
        name = set_cell_size(getattr(finding.name, lang), width)
        console.print(RichText.assemble((mark, style), f"  {name}  {getattr(finding.says, lang)}"))
        for line in getattr(finding.fix, lang).splitlines() if finding.fix else ():
            console.print(RichText(f"   {' ' * width}  {line.strip()}", style="bold"))


if __name__ == "__main__":
    sys.exit(main())
