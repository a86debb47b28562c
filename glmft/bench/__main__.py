"""python -m glmft.bench strategy=qlora: the real training step on a model of random weights, beside its ceilings and
what one would use else. Each side is a process of its own: this command again, with bench.part.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from glmft import config
from glmft.errors import ResourceError
from glmft.files import read_json, write_json
from glmft.runs import environment

TOPS = ("bench", "model", "strategy", "data", "optimizer", "scheduler", "trainer", "seed", "paths")


def main(cfg: DictConfig) -> None:
    """One part in this process, or all of them, each in its own."""
    config.check(cfg, TOPS)
    if cfg.bench.part is not None:
        file = Path(cfg.bench.file)
        write_json(file, part(cfg, str(cfg.bench.part), file.parent), indent=None)
        return
    began = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(cfg.bench.out or Path(cfg.paths.output_dir) / ".bench" / began)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["ours", *(["bounds"] if cfg.bench.bounds else [])]
    for kind in cfg.bench.baselines:
        names += [f"baseline_{kind}", f"as_baseline_{kind}"]
    if len(names) > 1:
        names.append("ours_last")
    parts: dict[str, Any] = {}
    for name in names:
        print(f"glmft bench: {name} ...", flush=True)
        parts[name] = run_part(name, folder)
    print(finish(cfg, parts, folder), flush=True)


def run_part(name: str, folder: Path) -> dict[str, Any]:
    """This command again, for one part.

    Raises:
        ResourceError: the part failed; the end of what it said.
    """
    file = folder / f"{name}.json"
    given = [o for o in sys.argv[1:] if not o.lstrip("+").startswith(("bench.out=", "bench.part="))]
    command = [sys.executable, "-m", "glmft.bench", *given, f"bench.part={name}", f"bench.file={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise ResourceError(f"bench.part={name} failed:\n{(done.stderr or done.stdout)[-2000:]}")
    return dict(read_json(file))


def part(cfg: DictConfig, name: str, folder: Path) -> dict[str, Any]:
    """One side. `as_X` makes the optimizer steps of X, which was measured before, for its losses."""
    from glmft.quiet import quiet_libraries

    quiet_libraries()
    if name == "bounds":
        from glmft.bench import bounds

        return bounds.measure(cfg)
    if name.startswith("baseline_"):
        from glmft.bench import baselines

        return baselines.measure(cfg, name.removeprefix("baseline_"))  # type: ignore[arg-type]
    from glmft.bench import ours

    groups = None
    if name.startswith("as_"):
        groups = read_json(folder / f"{name.removeprefix('as_')}.json")["documents"]
    return ours.measure(cfg, groups)


def finish(cfg: DictConfig, parts: dict[str, Any], folder: Path) -> str:
    """Writes result.json; the table."""
    from glmft.bench import report

    data = config.instantiate(cfg.data)
    full = parts["ours"]["settings"]["strategy"] in ("Full", "Freeze")
    result = {
        "command": " ".join(["python -m glmft.bench", *sys.argv[1:]]),
        "environment": environment(report.device_name()),
        "documents_sha256": data.documents.sha256,
        "verdict": report.judge(parts),
        "utilisation": report.utilisation(cfg.bench.size, parts["ours"], data, full, int(cfg.bench.warmup)),
        "parts": parts,
        "config": config.plain(cfg),
    }
    write_json(folder / "result.json", result, indent=None)
    return f"{report.table(result)}\n{folder / 'result.json'}"


if __name__ == "__main__":
    sys.exit(config.run("bench", main))
