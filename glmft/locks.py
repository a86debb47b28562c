"""One process at a time in a run directory, also where the disk is shared by many machines."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from glmft.errors import ResourceError, UserError
from glmft.files import write_json

BEAT = 10.0  # seconds between two signs of life
WATCH = 3.0  # seconds between two looks at the other ranks
STALE = 60.0  # seconds without one after which the holder on another machine counts as gone


class RunLock:
    """Holds `.lock` in a folder: who works there, and when it was last alive.

    A bare process id means nothing on a shared disk. The holder is known to be gone where its process does not run on
    this machine any more, or where it gave no sign of life for a minute, by the clock of the file system.

    Raises:
        UserError: somebody else works there; who, where, since when.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.file = folder / name
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
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{self.file.parent}: cannot be written ({e.strerror})") from None
        while not self._create():
            holder = read_holder(self.file)
            if holder is None:  # given back in the meantime
                continue
            if not gone(self.file, holder):
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
                job = f", SLURM job {holder['job']}" if holder.get("job") else ""
                raise UserError(
                    f"{self.file.parent}: process {holder['pid']} on {holder['host']}{job} works here since {since}; "
                    "wait for it, or choose another run.name"
                )
            aside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                self.file.rename(aside)
                if read_holder(aside) != holder:  # it was another's by then: give it back
                    aside.rename(self.file)
                    continue
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
        if read_holder(self.file) == self.me:
            self.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a run that was refused leaves no folder
            self.file.parent.rmdir()
            self.file.parent.parent.rmdir()

    def _create(self) -> bool:
        """Makes the file, with its content, if it is not there: a name is linked to a finished file, so that nobody
        ever sees half of it, even if this process dies here."""
        part = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(self.me), encoding="utf-8")
            try:
                os.link(part, self.file)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                with self.file.open("x", encoding="utf-8") as f:
                    json.dump(self.me, f)
            return True
        except FileExistsError:
            return False
        except OSError as e:
            raise UserError(f"{self.file.parent}: cannot be written ({e.strerror})") from None
        finally:
            part.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that hangs or is full for a while
                if read_holder(self.file) == self.me:
                    write_json(self.file, self.me)


def read_holder(file: Path) -> dict[str, Any] | None:
    """What a lock file says; None where there is none."""
    for _ in range(20):
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError:  # being written at this moment
            time.sleep(0.05)
    return {"host": "an unknown machine", "pid": 0, "create_time": 0.0, "since": file.stat().st_mtime}


def gone(file: Path, holder: dict[str, Any]) -> bool:
    """Whether the holder of a lock file does not live any more."""
    if holder["host"] == socket.gethostname():
        try:
            process = psutil.Process(holder["pid"])
            return process.create_time() != holder["create_time"] or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):
            return True
    try:
        return _now(file) - file.stat().st_mtime > STALE
    except FileNotFoundError:
        return True


def _now(beside: Path) -> float:
    """The time by the clock that stamps files there."""
    probe = beside.with_name(f".clock.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


class RankGuard:
    """Ends this process soon after another process of the same run died: it would wait for it for a long time.

    Every rank holds `.rank-N` in the run directory, and leaves it behind when it fails.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.own = RunLock(folder, f".rank-{rank}")
        self._ended = threading.Event()

    def __enter__(self) -> RankGuard:
        self.own.__enter__()
        for file in self._others():  # of an earlier start
            if gone(file, read_holder(file) or {"host": ""}):
                file.unlink(missing_ok=True)
        threading.Thread(target=self._watch, name="rank guard", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        if kind is None or isinstance(error, SystemExit):
            self.own.__exit__(kind, error, _)

    def _others(self) -> list[Path]:
        return [f for f in self.own.file.parent.glob(".rank-*") if f != self.own.file]

    def _watch(self) -> None:
        began = _now(self.own.file)
        seen: set[Path] = set()  # that gave a sign of life since this process began: others are of an earlier start
        while not self._ended.wait(WATCH):
            for file in self._others():
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_mtime >= began - WATCH:
                        seen.add(file)
                holder = read_holder(file) if file in seen else None
                if holder and gone(file, holder) and not self._ended.wait(WATCH):  # it may just have ended well
                    if not file.exists():
                        continue
                    who = f"process {holder['pid']} on {holder['host']} ({file.name[1:]})"
                    print(f"glmft: {who} of this run died; ending", file=sys.stderr, flush=True)
                    os._exit(ResourceError.exit_code)
