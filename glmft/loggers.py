"""W&B through Lightning's logger, so that it never hangs and always belongs to its run directory."""

from __future__ import annotations

import netrc
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

from glmft.runs import Run

Mode = Literal["auto", "online", "offline"]


def reachable(seconds: float = 3.0) -> bool:
    """A key is set and the W&B server accepts a connection."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc(urlparse(url).hostname or "")
    return has_key and connects(url, seconds)


def connects(url: str, seconds: float = 3.0) -> bool:
    """A TCP connection to the URL's host can be opened."""
    parts = urlparse(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True


def _in_netrc(host: str) -> bool:
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandB(WandbLogger):
    """Weights & Biases.

    Args:
        save_dir: the run directory; the run's id is kept there, so that resuming continues the same W&B run.
        mode: "auto" is online where a key is set and the server answers, else offline.
        project: of W&B.
        group: runs of one sweep; filled by a multirun.
        name: shown in W&B; the run's name.
    """

    def __init__(
        self,
        save_dir: str,
        mode: Mode = "auto",
        project: str = "glmft",
        group: str | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        run = Run(Path(save_dir))
        offline = mode == "offline" or (mode == "auto" and not reachable())
        super().__init__(
            name=name or run.path.name,
            save_dir=save_dir,
            id=run.wandb_id(),
            project=project,
            group=group,
            tags=tags,
            resume="allow",
            mode="offline" if offline else "online",
            settings={"init_timeout": 30},
        )
        if mode == "auto" and not offline:
            self._online_or_offline()

    def _online_or_offline(self) -> None:
        """A key that is refused, or a server that accepts and does not answer, must not end a run."""
        try:
            _ = self.experiment
        except Exception as e:
            print(f"glmft: W&B is not to be reached ({str(e).splitlines()[0]}); logging offline", flush=True)
            self._wandb_init["mode"] = "offline"

    def finish(self, failed: bool = False) -> None:
        """Ends the W&B run; without it, the next job of a sweep would log into this one."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))

    def log_rows(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Dicts with the same keys, as a W&B table."""
        if rows:
            self.log_table(key, columns=list(rows[0]), data=[list(r.values()) for r in rows])


def log_rows(loggers: Iterable[Any], key: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a table in each W&B run among the loggers."""
    for logger in loggers:
        if isinstance(logger, WandB):
            logger.log_rows(key, rows)
