"""The run directory: written by training, read by everything else.

RUN/ .hydra/{config,overrides,hydra}.yaml  command.txt  env.json  run.log
     metrics.jsonl  samples.jsonl  status.json  summary.json  loss.png
     adapter/ (or model/)  checkpoints/  wandb_run_id.txt
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import psutil

from glmft import __version__
from glmft.artefacts import read_manifest, remove, verify
from glmft.errors import DamagedError, UserError
from glmft.files import append_jsonl, read_json, write_atomic, write_json

State = Literal["starting", "running", "validating", "saving", "done", "stopped", "failed"]
PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "hydra-core", "wandb", "safetensors")


def default_name(task: str, overrides: list[str], job: int | None) -> str:
    """Task, overrides and time; under SLURM the job and array id, so that a requeued job finds its own run."""
    slurm = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if slurm and job is None:
        index = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"{task}-slurm{slurm}" + (f"_{index}" if index else "")
    told = [o for o in overrides if not o.startswith(("experiment=", "run.", "paths.", "logger", "callbacks.", "~"))]
    start = "-".join([task, *(safe_name(o) for o in told)])
    end = time.strftime("-%Y%m%d-%H%M%S") + ("" if job is None else f"-{job}")
    return start.encode()[:120].decode(errors="ignore") + end


def safe_name(text: str) -> str:
    """An override as part of a file name: `data.fill.name=小明` -> `name=小明`."""
    key, equals, value = text.lstrip("+").partition("=")
    return re.sub(r"[^\w.=-]+", "_", f"{key.rpartition('.')[2]}{equals}{value}")[:40].strip("_")


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path

    @classmethod
    def named(cls, root: str | Path, name: str) -> Run:
        """RUN = root/name.

        Raises:
            UserError: the name is not a plain folder name.
        """
        if not name or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name) or len(name.encode()) > 250:
            raise UserError(f"run.name={name!r}: must be a plain folder name without / or \\")
        return cls(Path(root).expanduser().resolve() / name)

    @property
    def exists(self) -> bool:
        """A run was started here before."""
        return (self.path / ".hydra" / "config.yaml").is_file()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many optimizer steps."""
        return self.checkpoints / f"step-{step:07d}"

    def manifests(self) -> dict[int, dict[str, Any]]:
        """step -> what its checkpoint's manifest says; those without a readable one are left out."""
        found = {}
        for folder in self.checkpoints.glob("step-*"):
            with contextlib.suppress(DamagedError):
                manifest = read_manifest(folder)
                found[int(manifest["step"])] = manifest
        return found

    def newest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """(the verified checkpoint of the highest step, what is wrong with newer ones)."""
        problems: list[str] = []
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            try:
                verify(folder)
                return folder, problems
            except DamagedError as e:
                problems.append(str(e))
        return None, problems

    def set_aside(self, step: int) -> None:
        """Checkpoints above a step, which are damaged, get another name, so that none is taken for the newest."""
        for folder in self.checkpoints.glob("step-*"):
            if folder.name > self.checkpoint(step).name:
                aside = folder.with_name(f"damaged-{folder.name}")
                remove(aside)
                folder.rename(aside)

    def check_free(self) -> None:
        """Nothing but a run may be in the folder.

        Raises:
            UserError: it holds something else.
        """
        ours = (".lock", ".rank-", ".clock.", ".hydra")  # also of a run that was killed while it began
        if self.path.exists() and not self.exists and not all(p.name.startswith(ours) for p in self.path.iterdir()):
            raise UserError(f"{self.path}: exists and is not a run of glmft; choose another run.name")

    def start(self, yaml_files: dict[str, str], command: str, device: str) -> None:
        """Makes the directory, with what was asked and where it runs; status is "starting".

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            for name, content in yaml_files.items():  # first: they make the folder a run
                write_atomic(self.path / ".hydra" / name, content)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with (self.path / "command.txt").open("a", encoding="utf-8") as f:
                f.write(command + "\n")
            write_json(self.path / "env.json", environment(device))
            Status(self).write("starting")
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror})") from None

    def log_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        append_jsonl(self.path / "metrics.jsonl", row)

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl."""
        return read_jsonl(self.path / "metrics.jsonl")

    def drop_metrics_after(self, step: int) -> None:
        """Before a run goes on from a checkpoint, or starts again without one (step -1): later steps will be made,
        and written, again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            if file.is_file():
                rows = [r for r in read_jsonl(file) if r.get("step", 0) <= step]
                write_atomic(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    def wandb_id(self) -> str:
        """The W&B run id of this directory, the same after every resume."""
        file = self.path / "wandb_run_id.txt"
        if not file.is_file():
            write_atomic(file, os.urandom(4).hex())
        return file.read_text().strip()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json, at the end."""
        write_json(self.path / "summary.json", summary)


class Status:
    """status.json, replaced atomically and at most once a second."""

    def __init__(self, run: Run) -> None:
        self._file = run.path / "status.json"
        process = psutil.Process()
        self._fixed = {"pid": process.pid, "create_time": process.create_time(), "host": socket.gethostname()}
        self._written = 0.0
        self._last: dict[str, Any] = {}

    def write(self, state: State, **more: Any) -> None:
        """A change of state is always written, progress within a state once a second. What is not given stays."""
        now = time.time()
        if state == self._last.get("state") and now - self._written < 1.0:
            return
        self._written = now
        self._last |= {"state": state, **self._fixed, "time": now, **more}
        write_json(self._file, self._last)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that is still being written is left out."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def read_status(run: Path) -> dict[str, Any]:
    """status.json, or an empty dict where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(read_json(run / "status.json"))
    return {}


def environment(device: str) -> dict[str, Any]:
    """What "it worked on the other node" needs: versions, host, device, driver."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "glmft": __version__,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device,
        "gpus": gpu_rows(),
        "packages": versions,
        "variables": {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID") if k in os.environ},
    }


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    return output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"])


def gpu_rows() -> list[str]:
    """`name, uuid, driver, memory` of each NVIDIA GPU."""
    out = output(["nvidia-smi", "--query-gpu=name,uuid,driver_version,memory.total", "--format=csv,noheader"])
    return out.splitlines() if out else []


def output(command: list[str]) -> str | None:
    """stdout of a program, or None where it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class _Tee:
    """Writes to the terminal and to run.log."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
        self._log.flush()
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def logged(run: Run) -> Iterator[None]:
    """stdout and stderr go to run.log too."""
    out, err = sys.stdout, sys.stderr
    with (run.path / "run.log").open("a", encoding="utf-8") as log:
        sys.stdout, sys.stderr = _Tee(out, log), _Tee(err, log)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err
