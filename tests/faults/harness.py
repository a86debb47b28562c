"""Kills runs at random times and in the middle of saves, repeats the same command, and compares every bit.

    python tests/faults/harness.py --faults 400 --seed 1        (make faults N=400 SEED=1)

This process only imports; each run is forked from it, so that it begins within milliseconds. A run writes what it is
doing into a phase log; a fault counts only if it arrived before the run's normal end. For every configuration one run
that nothing stops is the reference: losses, learning rates, gradient norms and final weights of a run that was killed
and repeated must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ |= {
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from glmft import artefacts, config
from glmft.callbacks import checkpoint, export, record, stop, verdict  # noqa: F401  imported before forking
from glmft.callbacks.checkpoint import Checkpoints
from glmft.callbacks.export import SaveTuned
from glmft.callbacks.record import RunRecord
from glmft.errors import DamagedError
from glmft.runs import Run, read_jsonl
from glmft.strategies import full, lora  # noqa: F401
from glmft.train import main as train

SIGNALS = {"KILL": 137, "TERM": 143, "INT": 130, "HUP": 129}
IN_SAVE = 0.4  # share of faults that wait for a save to begin
SLOW = 0.004  # seconds that each sync takes longer, so that a save has a middle
LIMIT = 60.0  # seconds a run may take
ORPHAN = 15.0  # seconds that ranks may live on after one died


@dataclass(frozen=True)
class Setting:
    """What is varied."""

    strategy: str
    accumulate: int
    workers: int
    processes: int

    @property
    def name(self) -> str:
        return f"{self.strategy} accumulate={self.accumulate} workers={self.workers} processes={self.processes}"

    def command(self) -> list[str]:
        """Overrides of python -m glmft.train."""
        quiet = [f"callbacks.{c}=null" for c in ("samples", "compare", "verdict", "panels")]
        lower = ["strategy.dropout=0.1"] if self.strategy == "lora" else ["optimizer.lr=1e-4"]
        ranks = [f"trainer.devices={self.processes}", "+trainer.strategy=ddp"] if self.processes > 1 else []
        return [
            *("run.name=a", f"strategy={self.strategy}", *lower, *quiet, *ranks, "trainer.accelerator=cpu"),
            *("trainer.max_epochs=3", "data.max_samples=20", f"data.num_workers={self.workers}", "data.max_length=64"),
            *("data.tokens_per_step=512", f"data.tokens_per_batch={512 // self.accumulate // self.processes}"),
            *("callbacks.checkpoint.every_n_train_steps=2", "optimizer.weight_decay=0.01"),
        ]


SETTINGS = [Setting(*s) for s in product(("lora", "full"), (1, 4), (0, 2), (1, 2))]


# ---- one run


def log_phases(log: Path) -> None:
    """Hooks that append what the run is doing, a line each."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(phase: str) -> None:
        os.write(descriptor, f"{time.monotonic():.6f} {phase}\n".encode())

    def around(owner: Any, name: str, begin: str, end: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            say(begin)
            result = original(*args, **kwargs)
            say(end)
            return result

        setattr(owner, name, wrapped)

    say("load")
    around(RunRecord, "on_train_start", "start", "train")
    around(RunRecord, "on_validation_start", "validate", "validate")
    around(RunRecord, "on_validation_end", "validate", "train")
    around(Checkpoints, "save", "save", "saved")
    around(RunRecord, "on_train_end", "end", "end")
    around(SaveTuned, "_save", "export", "end")


def child(setting: Setting, folder: Path, rank: int, port: int, environment: dict[str, str]) -> None:
    """A run, in a forked process; never returns."""
    code = 1
    try:
        os.chdir(folder)
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ |= {"GLMFT_CACHE": str(folder.parent / "cache"), **environment}
        if setting.processes > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(setting.processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        import torch

        torch.set_num_threads(1)
        if rank == 0:
            log_phases(folder / "phases")
            slow_syncs()
        sys.argv = ["glmft.train", *setting.command()]
        code = config.run("train", train)
    except SystemExit as e:
        code = int(e.code or 0) if not isinstance(e.code, str) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def slow_syncs() -> None:
    original = artefacts._sync

    def slow(path: Path) -> None:
        time.sleep(SLOW)
        original(path)

    artefacts._sync = slow


def launch(setting: Setting, folder: Path, environment: dict[str, str] | None = None) -> list[int]:
    """Process ids of the ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(setting.processes):
        pid = os.fork()
        if pid == 0:
            child(setting, folder, rank, port, environment or {})
        pids.append(pid)
    return pids


def wait(pids: list[int], seconds: float = LIMIT) -> list[int]:
    """Exit codes (128 + n for signal n); what still runs after `seconds` is killed and counted as 124. After a rank has
    died, the others have a quarter of a minute: then they are ended, as any launcher of ranks does."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        if any(codes.values()):
            end = min(end, time.monotonic() + ORPHAN) if end - time.monotonic() > ORPHAN else end
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    codes[pid] = code if code >= 0 else 128 - code
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = 124
        time.sleep(0.001)
    return [codes[p] for p in pids]


def phases(folder: Path) -> list[str]:
    file = folder / "phases"
    return [line.split()[1] for line in file.read_text().splitlines()] if file.is_file() else []


def outcome(folder: Path) -> tuple[Any, ...]:
    """Everything that must be the same: (step, loss, lr, gradient norm) rows and the weights' digest."""
    run = folder / "runs" / "a"
    keys = ("step", "train/loss", "lr", "grad_norm")
    rows = [tuple(r[k] for k in keys) for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r]
    digest = hashlib.sha256()
    for part in ("adapter", "model"):
        for file in sorted((run / part).glob("*.safetensors")):
            digest.update(file.read_bytes())
    return rows, digest.hexdigest()


# ---- faults


@dataclass
class Result:
    """One fault."""

    setting: str
    kind: str
    phase: str  # that the run was in
    counted: bool
    exit_codes: list[int]
    verified: bool  # a whole checkpoint was there, from the first save on
    repeated: list[int]  # exit codes of the same command again
    identical: bool
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.verified and set(self.repeated) == {0} and self.identical


def strike(pids: list[int], folder: Path, rng: random.Random, kind: str, duration: float) -> str:
    """Sends the signal at a random time; returns the phase it met, or "" where the run had ended."""
    began = time.monotonic()
    if rng.random() < IN_SAVE:
        wanted = rng.randint(1, 4)
        while phases(folder).count("save") < wanted:
            if all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in pids):
                return ""
            if time.monotonic() - began > LIMIT:
                return ""
            time.sleep(0.0005)
        time.sleep(rng.random() * 8 * SLOW)
    else:
        time.sleep(rng.random() * duration)
    target = rng.choice(pids)
    if os.waitid(os.P_PID, target, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return ""
    os.kill(target, signal.Signals[f"SIG{kind}"])
    return next(reversed(phases(folder)), "load")


def verified(folder: Path) -> bool:
    """After the first save there is always a checkpoint that passes verification."""
    if "saved" not in phases(folder):
        return True
    run = Run(folder / "runs" / "a")
    with contextlib.suppress(DamagedError):
        artefacts.remove_leftovers(run.checkpoints)
        return run.newest_checkpoint()[0] is not None
    return False


def fault(
    setting: Setting, folder: Path, rng: random.Random, reference: tuple[tuple[Any, ...], float], elsewhere: Path | None
) -> Result:
    """One run that is struck, and the same command until it ends."""
    began = time.monotonic()
    kind = rng.choice(list(SIGNALS))
    environment = {"TMPDIR": str(elsewhere)} if elsewhere else {}
    pids = launch(setting, folder, environment)
    phase = strike(pids, folder, rng, kind, reference[1])
    codes = wait(pids)
    whole = verified(folder)
    note = "" if 124 not in codes else "did not end"
    repeated = wait(launch(setting, folder, environment)) if phase else codes
    same = outcome(folder) == reference[0] if set(repeated) == {0} else False
    if not same:
        note = note or difference(outcome(folder), reference[0])
    seconds = time.monotonic() - began
    return Result(
        setting.name, kind, phase or "after the end", bool(phase), codes, whole, repeated, same, seconds, note
    )


def difference(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> str:
    """The first row that is not the same."""
    for a, b in zip(found[0], wanted[0], strict=False):
        if a != b:
            return f"{a} instead of {b}"
    return f"{len(found[0])} rows instead of {len(wanted[0])}" if len(found[0]) != len(wanted[0]) else "weights differ"


def references(settings: list[Setting], root: Path) -> dict[Setting, tuple[tuple[Any, ...], float]]:
    """(outcome, seconds of training) of a run that nothing stops, for each setting."""
    found = {}
    for setting in settings:
        folder = fresh(root, "reference")
        began = time.monotonic()
        codes = wait(launch(setting, folder))
        if set(codes) != {0}:
            raise SystemExit(f"{setting.name}: the reference ended with {codes}\n{(folder / 'stderr.0').read_text()}")
        found[setting] = (outcome(folder), time.monotonic() - began)
    return found


def fresh(root: Path, name: str) -> Path:
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of that size at the folder; False where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], capture_output=True
    )
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def other_faults(root: Path, reference: dict[Setting, tuple[tuple[Any, ...], float]]) -> list[Result]:
    """Disk full, a folder that cannot be written, output deleted while running."""
    setting = Setting("lora", 1, 0, 1)
    wanted = reference[setting]
    results = []

    def attempt(kind: str, prepare: Callable[[Path], None], repair: Callable[[Path], None], expected: set[int]) -> None:
        folder = fresh(root, "fault")
        began = time.monotonic()
        prepare(folder)
        codes = wait(launch(setting, folder))
        note = "" if set(codes) <= expected else (folder / "stderr.0").read_text()[-300:]
        repair(folder)
        repeated = wait(launch(setting, folder))
        same = outcome(folder) == wanted[0]
        seconds = time.monotonic() - began
        ok = set(codes) <= expected and "Traceback" not in (folder / "stderr.0").read_text()
        results.append(Result(setting.name, kind, "save", True, codes, ok, repeated, same, seconds, note))

    with small_disk(fresh(root, "full"), 4) as mounted:
        if mounted:
            filler = root / "full" / "filler"

            def fill(folder: Path) -> None:
                (folder / "runs").symlink_to(root / "full")
                filler.write_bytes(b"x" * (2 << 20))

            attempt("disk full", fill, lambda folder: filler.unlink(), {0, 4})

    def read_only(folder: Path) -> None:
        (folder / "runs").write_text("a file stands where the folder should be")

    attempt("folder not writable", read_only, lambda folder: (folder / "runs").unlink(), {2})
    return results


# ---- the same kills of plain Lightning


def plain_lightning(root: Path, elsewhere: Path, kills: int, rng: random.Random) -> int:
    """How many of so many kills inside a save leave a checkpoint that cannot be loaded, where $TMPDIR is on another
    device: plain Lightning writes there and copies over the last good file."""
    broken = 0
    for _ in range(kills):
        folder = fresh(root, "plain")
        pid = os.fork()
        if pid == 0:
            save_plainly(folder, elsewhere)
        file = folder / "last.ckpt"
        while not file.exists() or phases(folder).count("saved") < 1:
            time.sleep(0.001)
        whole, end = file.stat().st_size, time.monotonic() + 5
        while file.stat().st_size >= whole and time.monotonic() < end:  # until the copy has begun
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        check = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
        done = subprocess.run([sys.executable, "-c", check, str(file)], capture_output=True)
        broken += done.returncode != 0
    return broken


def save_plainly(folder: Path, elsewhere: Path) -> None:
    """Saves a model of 40 MB over and over with plain Lightning, in a forked process; never returns."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(elsewhere)
    import lightning
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", **quiet)
    module = lightning.LightningModule()
    module.weight = torch.nn.Parameter(torch.zeros(10_000_000))
    trainer.strategy.connect(module)
    while True:
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
        (folder / "phases").write_text("0 saved\n")


# ---- the table


def table(results: list[Result]) -> str:
    """Counts by kind and setting, and the phases that faults met."""
    counted = [r for r in results if r.counted]
    lines = [f"{'setting':52} {'faults':>6} {'identical':>9}"]
    for name in dict.fromkeys(r.setting for r in counted):
        mine = [r for r in counted if r.setting == name]
        lines.append(f"{name:52} {len(mine):>6} {sum(r.passed for r in mine):>9}")
    lines.append("")
    for title, key in (("kind", "kind"), ("phase", "phase")):
        counts = Counter(getattr(r, key) for r in counted)
        lines.append(f"{title}: " + ", ".join(f"{k} {n}" for k, n in counts.most_common()))
    lines += [
        f"FAILED {r.setting} {r.kind} in {r.phase}: {r.exit_codes} {r.repeated} {r.note}"
        for r in counted
        if not r.passed
    ]
    passed = sum(r.passed for r in counted)
    lines.append(f"{len(counted)} faults, {passed} identical, {len(counted) - passed} not")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="use only so many, chosen by seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no fault after so long")
    parser.add_argument("--plain", type=int, default=8, help="kills of plain Lightning, for comparison")
    parser.add_argument("--json", type=Path, help="write every fault here")
    options = parser.parse_args()
    gc.freeze()
    rng = random.Random(options.seed)
    settings = SETTINGS if options.settings >= len(SETTINGS) else rng.sample(SETTINGS, options.settings)
    if Setting("lora", 1, 0, 1) not in settings:
        settings = [Setting("lora", 1, 0, 1), *settings[1:]]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="glmft-faults-") as name:
        root = Path(name)
        reference = references(settings, root)
        results = other_faults(root, reference)
        made = sum(r.counted for r in results)
        end = time.monotonic() + options.seconds
        while made < options.faults and time.monotonic() < end:
            setting = settings[made % len(settings)]
            other_device = memory if memory.is_dir() and rng.random() < 0.5 else None
            results.append(fault(setting, fresh(root, "fault"), rng, reference[setting], other_device))
            made += results[-1].counted
            if made % 20 == 0 and results[-1].counted:
                print(f"{made} faults, {sum(r.passed for r in results if r.counted)} identical", flush=True)
            if not results[-1].passed and results[-1].counted:
                print(f"failed: {results[-1]}", flush=True)
        plain = {}
        if options.plain and memory.is_dir() and memory.stat().st_dev != root.stat().st_dev:
            plain = {"kills": options.plain, "unreadable": plain_lightning(root, memory, options.plain, rng)}
    print(table(results))
    if plain:
        told = f"{plain['kills']} kills inside a save, $TMPDIR elsewhere: {plain['unreadable']} unreadable"
        print(f"plain Lightning, {told}")
    if options.json:
        options.json.write_text(json.dumps({"faults": [vars(r) for r in results], "plain": plain}, indent=1))
    if plain and not plain["unreadable"]:
        print("plain Lightning lost nothing: this harness does not kill inside saves")
        return 1
    return 0 if all(r.passed for r in results if r.counted) else 1


if __name__ == "__main__":
    sys.exit(main())
