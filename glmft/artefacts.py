"""Folders that are whole or not there: staged beside their place, synced, read back, then renamed.

`manifest.json` names every file of such a folder with its size and sha256, and says what it belongs to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from glmft.errors import DamagedError, ResourceError, UserError
from glmft.files import write_json

MANIFEST = "manifest.json"
FORMAT = 1
PART, OLD = ".part", ".old"


class SaveFailed(ResourceError):
    """A folder could not be written; what stood in its place before still does."""


def check_absent(folder: Path) -> None:
    """Raises:
    UserError: the folder exists; what is there is never replaced unasked.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists; choose another folder")


def write_folder(
    folder: Path, write: Callable[[Path], Mapping[str, str] | None], facts: Mapping[str, Any], needed: int = 0
) -> None:
    """Lets `write` fill a staged folder, adds the manifest, and puts it in the place of `folder`.

    Args:
        folder: the place; an older one there is replaced.
        write: fills an empty folder with plain files; may return the sha256 of those that it hashed while writing.
        facts: what the manifest says besides the files.
        needed: bytes that it will take, if known: checked before anything is written.

    Raises:
        SaveFailed: disk full, permissions, or what was written reads back differently; with needed and free bytes.
    """
    part = folder.with_name(f".{folder.name}{PART}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"needed {needed:,} bytes, free {free:,}")
        part.mkdir()
        hashed = write(part) or {}
        files = {}
        for file in sorted(part.iterdir()):
            _sync(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": hashed.get(file.name) or file_hash(file)}
        write_json(part / MANIFEST, {"format": FORMAT, **facts, "files": files})
        verify(part)
        _sync(part)
        if folder.exists():
            old = folder.with_name(f".{folder.name}{OLD}")
            remove(old)
            folder.rename(old)
            try:
                part.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            remove(old)
        else:
            part.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError, DamagedError) as e:  # torch's writer says RuntimeError where the disk is full
        with suppress(OSError):
            remove(part)
        free = shutil.disk_usage(_existing(folder.parent)).free
        reason = e.strerror if isinstance(e, OSError) else str(e).splitlines()[0]
        raise SaveFailed(f"{folder}: not saved: {reason} ({free:,} bytes free)") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        DamagedError: it is missing, broken, or of a newer format.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        for name, told in manifest["files"].items():
            if Path(name).name != name or type(told["bytes"]) is not int or type(told["sha256"]) is not str:
                raise ValueError(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise DamagedError(f"{file}: missing or broken ({type(e).__name__})") from None
    if version != FORMAT:
        raise DamagedError(f"{file}: format {version}, this version reads {FORMAT}; update glmft")
    return dict(manifest)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it.

    Raises:
        DamagedError: a file is missing, shorter, longer, or its content changed.
    """
    manifest = read_manifest(folder)
    for name, told in manifest["files"].items():
        file = folder / name
        if file.parent != folder or file.is_symlink() or not file.is_file():
            raise DamagedError(f"{file}: missing")
        size = file.stat().st_size
        if size != told["bytes"]:
            raise DamagedError(f"{file}: {size} bytes, the manifest says {told['bytes']}")
        if file_hash(file) != told["sha256"]:
            raise DamagedError(f"{file}: its content is not what was written")
    return manifest


def verify_if_listed(folder: Path) -> dict[str, Any]:
    """As `verify`, for folders that may come from elsewhere: an empty dict where there is no manifest."""
    return verify(folder) if (folder / MANIFEST).is_file() else {}


def file_hash(file: Path) -> str:
    """sha256 in hexadecimal digits."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def remove(folder: Path) -> None:
    """A folder of plain files and its content; nothing where there is none."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def remove_leftovers(parent: Path) -> None:
    """Staged folders that a killed process left behind; where only the old one of a replaced folder is left, it goes
    back to its place."""
    for old in parent.glob(f".*{OLD}"):
        place = old.with_name(old.name[1:].removesuffix(OLD))
        if place.exists():
            remove(old)
        else:
            old.rename(place)
    for part in parent.glob(f".*{PART}"):
        remove(part)


class HashedFile:
    """A file opened for writing that knows the sha256 of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Writes and hashes."""
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Passes on."""
        self._file.flush()

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._digest.hexdigest()


def _sync(path: Path) -> None:
    """A file's content, or a folder's list of names, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
