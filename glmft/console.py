"""What the commands share: which weights to load, and how a failure ends a program."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from glmft.errors import GlmftError, ResourceError

if TYPE_CHECKING:
    from glmft.engine import Engine

DTYPES = ("float32", "bfloat16", "float16")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype and --device: the base, and how it is loaded."""
    parser.add_argument("--model", help="base model: folder or hub id (default: what the adapter was trained on)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: the GPU where there is one)")


def open_engine(options: argparse.Namespace) -> Engine:
    """The voices of `sources`, loaded as `add_weights` was told.

    Raises:
        GlmftError: see `glmft.engine`.
    """
    from glmft.engine import Engine, find_tuned

    return Engine([find_tuned(source, options.model) for source in options.sources], options.dtype, options.device)


def run(command: Callable[[], int | None], interrupted: str = "") -> int:
    """The exit code of a command: its own, 0 for None, that of its error, or 130 after Ctrl-C."""
    try:
        return command() or 0
    except GlmftError as e:
        print(f"glmft: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        if interrupted:
            print(f"\nglmft: {interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def out_of_memory(*also: type[Exception], advice: str = "") -> Iterator[None]:
    """Torch's and Python's failures of memory (and `also` others) as a ResourceError of one line."""
    try:
        yield
    except GlmftError:
        raise
    except (MemoryError, RuntimeError, *also) as e:  # type: ignore[misc]
        raise ResourceError((str(e).splitlines()[0] if str(e) else "not enough memory") + advice) from None
