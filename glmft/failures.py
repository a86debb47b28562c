"""What the exceptions of torch, Lightning and the system mean to the user of a run."""

from __future__ import annotations

import errno
import re

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from glmft.errors import ResourceError, UserError

LESS_MEMORY = (
    "less memory, cheapest first: data.tokens_per_batch=2048, model.gradient_checkpointing=true, strategy=qlora, "
    "optimizer=adamw_8bit (full)"
)


def as_failure(e: BaseException, trainer: L.Trainer) -> BaseException:
    """What a failure means to the user. Lightning turns Ctrl-C into exit(1)."""
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"the disk is full ({e.filename or e}); free some space, and run the same command again")
    if isinstance(e, OSError) and e.filename:
        return ResourceError(f"{e.filename}: {e.strerror}; the run cannot be written any more")
    if isinstance(e, RuntimeError) and "DataLoader worker" in str(e):
        return ResourceError(
            f"a loader process ended ({str(e).splitlines()[0]}): out of memory? data.num_workers=0 needs none"
        )
    if isinstance(e, MisconfigurationException):
        return UserError(f"trainer: {e}")
    if isinstance(e, torch.OutOfMemoryError):
        return ResourceError(f"out of memory: {str(e).splitlines()[0]}\n{LESS_MEMORY}")
    if trainer.world_size > 1 and isinstance(e, RuntimeError) and re.search("peer|[Gg]loo|NCCL", str(e)):
        return ResourceError(f"another process of this run ended or hangs: {str(e).splitlines()[0]}")
    if isinstance(e, SystemExit) and trainer.interrupted and e.code == 1:
        return KeyboardInterrupt()
    return e
