"""One process at a time in a run directory, also where the disk is shared by many machines."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from glmft.errors import UserError
from glmft.files import write_json

BEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which the holder on another machine counts as gone


class RunLock:
    """Holds `.lock` in a folder: who works there, and when it was last alive.

    A bare process id means nothing on a shared disk. The holder is known to be gone where its process does not run on
    this machine any more, or where it gave no sign of life for a minute, by the clock of the file system.

    Raises:
        UserError: somebody else works there; who, where, since when.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".lock"
        process = psutil.Process()
        self.me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "create_time": process.create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.time(),
        }
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            holder = self._holder()
            if holder is None:  # given back in the meantime
                continue
            if not self._gone(holder):
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
                job = f", SLURM job {holder['job']}" if holder.get("job") else ""
                raise UserError(
                    f"{self.file.parent}: process {holder['pid']} on {holder['host']}{job} works here since {since}; "
                    "wait for it, or choose another run.name"
                )
            aside = self.file.with_name(f".lock.{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                self.file.rename(aside)
                aside.unlink()
            print(
                f"glmft: the lock of process {holder['pid']} on {holder['host']}, which is gone, is taken over",
                flush=True,
            )
        self._beat = threading.Thread(target=self._live, name="run lock", daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beat.join()
        if self._holder() == self.me:
            self.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a run that was refused leaves no folder
            self.file.parent.rmdir()
            self.file.parent.parent.rmdir()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return False
        except OSError as e:
            raise UserError(f"{self.file.parent}: cannot be written ({e.strerror})") from None
        with os.fdopen(descriptor, "w") as f:
            json.dump(self.me, f)
        return True

    def _holder(self) -> dict[str, Any] | None:
        for _ in range(20):
            try:
                return dict(json.loads(self.file.read_text(encoding="utf-8")))
            except FileNotFoundError:
                return None
            except ValueError:  # being written at this moment
                time.sleep(0.05)
        return {"host": "an unknown machine", "pid": 0, "create_time": 0.0, "since": self.file.stat().st_mtime}

    def _gone(self, holder: dict[str, Any]) -> bool:
        if holder["host"] == self.me["host"]:
            try:
                return psutil.Process(holder["pid"]).create_time() != holder["create_time"]
            except (psutil.NoSuchProcess, ValueError):
                return True
        try:
            return self._now() - self.file.stat().st_mtime > STALE
        except FileNotFoundError:
            return True

    def _now(self) -> float:
        """The time by the clock that stamps files there."""
        probe = self.file.with_name(f".clock.{os.getpid()}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            if self._holder() == self.me:
                write_json(self.file, self.me)
