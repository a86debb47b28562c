"""The console script: `glmft train ...` becomes `python -m glmft.train ...`, so that argv stays true for Lightning's
DDP launcher."""

from __future__ import annotations

import os
import sys

from glmft.recipes import groups, options

COMMANDS = {  # command -> (module, what it does)
    "train": ("glmft.train", "fine-tune: glmft train experiment=lora_alpaca_zh"),
    "chat": ("glmft.chat", "base and tuned answers side by side: glmft chat RUN"),
    "predict": ("glmft.predict", "a data set through base and tuned, with scores: glmft predict RUN --data NAME"),
    "judge": ("glmft.judge", "another model compares base and tuned answers: glmft judge predictions --endpoint URL"),
    "eval": ("glmft.benchmarks", "base and tuned on lm-eval's tasks: glmft eval RUN --tasks ceval-valid"),
    "serve": ("glmft.serve", "base and adapters behind OpenAI's API: glmft serve RUN"),
    "export": ("glmft.export", "a model folder with the adapter merged: glmft export RUN FOLDER"),
    "adapters": ("glmft.adapters_cli", "sum adapters, extract one from a full run: glmft adapters combine OUT A B"),
    "data": ("glmft.data_cli", "data sets: glmft data add mine.json --name mine"),
    "bench": ("glmft.bench", "how fast training is here, beside its ceilings: glmft bench strategy=qlora"),
    "doctor": ("glmft.doctor", "is everything here that a run needs? glmft doctor --model models/chatglm3-6b"),
}
COMPLETION = """\
_glmft() {{
    COMPREPLY=()
    local words=("${{COMP_WORDS[@]:1:COMP_CWORD}}")
    while IFS= read -r line; do COMPREPLY+=("$line"); done < <({python} -m glmft.cli --complete "${{words[@]}}")
    [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace
}}
complete -F _glmft glmft
"""


def main() -> None:
    """Replaces this process by the command's module, lists the commands, or completes a word."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--complete"]:
        print("\n".join(complete(arguments[1:])))
    elif arguments[:1] == ["--completion"]:
        print(COMPLETION.format(python=sys.executable))
    elif arguments and arguments[0] in COMMANDS:
        module = COMMANDS[arguments[0]][0]
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments[1:]])
    else:
        known = "\n".join(f"  {name:8} {what}" for name, (_, what) in COMMANDS.items())
        out = sys.stdout if arguments[:1] in ([], ["--help"], ["-h"]) else sys.stderr
        print(f'usage: glmft COMMAND ...\n\n{known}\n\nTab completion: eval "$(glmft --completion)"', file=out)
        sys.exit(0 if out is sys.stdout else 2)


def complete(words: list[str]) -> list[str]:
    """Candidates for the last word. Bash cuts words at `=`, so `strategy=lo` arrives as `strategy`, `=`, `lo`."""
    if len(words) <= 1:
        return [c for c in COMMANDS if c.startswith(words[0] if words else "")]
    if "=" in words[-2:]:
        group, prefix = (words[-2], "") if words[-1] == "=" else (words[-3], words[-1])
        return [o for o in options(group) if o.startswith(prefix)]
    keys = [f"{g}=" for g in groups()]
    return [k for k in keys if k.startswith(words[-1])]


if __name__ == "__main__":
    main()
