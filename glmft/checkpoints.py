"""Checkpoint folders: Lightning's checkpoint dict, with its many small tensors stored as few large ones.

A LoRA run has over a thousand small tensors; an archive entry for each would add more to the file than it says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from glmft.artefacts import HashedFile, SaveFailed, remove, write_folder
from glmft.errors import DamagedError, UserError

FILE = "trainer.ckpt"
SMALL = 2**20  # bytes; larger tensors are stored as they are
MARK = "<tensor>"  # (MARK, dtype, shape) stands in the tree for the next elements of that dtype

Tree = Any


def pack_tensors(tree: Tree) -> Tree:
    """{"tree": the same tree with small tensors replaced by (MARK, dtype, shape), "small": {dtype: [N]}}.

    Every small tensor of one dtype lies in one flat tensor, in the order of a depth-first walk.
    """
    flat: dict[str, list[Tensor]] = {}
    marks: dict[Any, Any] = {}  # one object per shape: pickle writes it once

    def mark(tensor: Tensor) -> Any:
        if tensor.numel() * tensor.element_size() >= SMALL:
            return tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        flat.setdefault(dtype, []).append(tensor.detach().reshape(-1))
        key = (MARK, dtype, tuple(tensor.shape))
        return marks.setdefault(key, key)

    packed = _walk(tree, Tensor, mark)
    devices = {t.device for tensors in flat.values() for t in tensors}
    target = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return {"tree": packed, "small": {d: torch.cat([t.to(target) for t in ts]) for d, ts in flat.items()}}


def unpack_tensors(packed: Tree) -> Tree:
    """The tree that was given to `pack_tensors`.

    Raises:
        DamagedError: marks and elements do not match.
    """
    start = dict.fromkeys(packed["small"], 0)

    def take(mark: tuple[str, str, tuple[int, ...]]) -> Tensor:
        _, dtype, shape = mark
        begin, count = start[dtype], torch.Size(shape).numel()
        start[dtype] = begin + count
        return packed["small"][dtype][begin : begin + count].reshape(shape).clone()

    tree = _walk(packed["tree"], tuple, lambda t: take(t) if t and t[0] == MARK else t)
    if any(start[dtype] != tensor.numel() for dtype, tensor in packed["small"].items()):
        raise DamagedError("checkpoint: its tensors are not those that it lists")
    return tree


def _walk(node: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of nested dicts, lists and tuples in which every `kind` went through `change`."""
    if isinstance(node, kind):
        node = change(node)
    if type(node) is tuple and node[:1] != (MARK,):
        return tuple(_walk(child, kind, change) for child in node)
    if type(node) is list:
        return [_walk(child, kind, change) for child in node]
    if isinstance(node, dict):
        return {key: _walk(child, kind, change) for key, child in node.items()}
    return node


def recount(progress: dict[str, dict[str, Any]], epochs: int, step: int, accumulate: int, whole: int) -> None:
    """Writes Lightning's counters of micro-batches anew for a run that cuts its steps otherwise: after `epochs` epochs
    of `whole` micro-batches each and `step` optimizer steps of `accumulate` micro-batches."""
    for name, batches in (("current", step * accumulate), ("total", epochs * whole + step * accumulate)):
        at_end = name == "current" and step == 0 and progress[name]["ready"] > 0
        for key in ("ready", "started", "processed", "completed"):
            behind = progress[name]["ready"] - progress[name][key]  # saved before Lightning counted the last one
            progress[name][key] = max((whole if at_end else batches) - behind, 0)


class CheckpointFiles(TorchCheckpointIO):
    """Writes and reads checkpoint folders: `trainer.ckpt`, packed, with a manifest of what it belongs to.

    Local folders only, and never code out of them. A save that fails does not raise, since other ranks wait for this
    one: `failure` holds it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: SaveFailed | None = None
        self._size = 0  # bytes of the last one

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        facts = checkpoint["glmft"]
        try:
            write_folder(_local(path), partial(self._write, checkpoint), facts, needed=self._size)
            self.failure = None
        except SaveFailed as e:
            self.failure = e

    def _write(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, str]:
        with (folder / FILE).open("wb") as f:
            hashed = HashedFile(f)
            torch.save(pack_tensors(checkpoint), hashed)  # type: ignore[arg-type]  # it only calls write
            self._size = f.tell()
        return {FILE: hashed.sha256}

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        file = _local(path) / FILE
        try:
            found = torch.load(file, weights_only=True, map_location=map_location)
            tree = dict(unpack_tensors(found))
            _ = [tree[key] for key in ("state_dict", "loops", "optimizer_states", "glmft")]
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'empty'}"
            raise DamagedError(f"{file}: not a checkpoint of this program ({reason})") from None
        return tree

    def remove_checkpoint(self, path: Any) -> None:
        remove(_local(path))


def _local(path: Any) -> Path:
    if "://" in str(path):
        raise UserError(f"{path}: checkpoints are read from local folders only")
    return Path(path)
