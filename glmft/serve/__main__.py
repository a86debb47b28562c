"""glmft serve: base and adapters behind OpenAI's chat API, for this machine and its programs. In production, serve an
export with vLLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from glmft import console
from glmft.caches import use_cache_dir
from glmft.errors import ResourceError, UserError
from glmft.quiet import quiet_libraries

if TYPE_CHECKING:
    from glmft.serve.app import Server

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft serve", description=__doc__)
    parser.add_argument("sources", nargs="+", help="runs, adapter folders or models; each is a model name, with 'base'")
    parser.add_argument("--host", default="127.0.0.1", help="another than this machine's own needs an API key")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api-key", help="what clients must send; or GLMFT_API_KEY, which no list of processes shows")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that may wait; more get 429")
    parser.add_argument("--batch-size", type=int, default=32)
    console.add_weights(parser)
    options = parser.parse_args(arguments)
    key = options.api_key or os.environ.get("GLMFT_API_KEY")

    def command() -> None:
        check(options.host, options.port, key, options.max_waiting, options.batch_size)
        use_cache_dir()
        quiet_libraries()
        from glmft.serve.app import Server

        server = Server(console.open_engine(options), key, options.max_waiting, options.batch_size)
        with suppress(KeyboardInterrupt):
            serve(server, options.host, options.port)

    return console.run(command)


def check(host: str, port: int, key: str | None, waiting: int, rows: int) -> None:
    """Raises:
    UserError: another host without a key, or a number below 1.
    ResourceError: the extra `serve` is not installed.
    """
    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host}: reachable from elsewhere, which needs --api-key (or GLMFT_API_KEY)")
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be 0 to 65535")
    if min(waiting, rows) < 1:
        raise UserError("--max-waiting and --batch-size must be 1 or more")
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise ResourceError("glmft serve needs starlette and uvicorn: pip install 'glmft[serve]'")


def serve(server: Server, host: str, port: int) -> None:
    """Until a signal; open answers have ten seconds to end.

    Raises:
        UserError: the port is taken.
    """
    import socket

    import uvicorn

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as e:
        raise UserError(f"--host {host} --port {port}: {e.strerror}; another port, or 0 for a free one") from None
    port = listening.getsockname()[1]
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    config = uvicorn.Config(
        server.app(hosts), log_level="warning", access_log=False, timeout_graceful_shutdown=10, timeout_keep_alive=5
    )
    print(f"glmft: http://{host}:{port}/v1 answers as {', '.join(server.engine.names)}; Ctrl-C ends", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
