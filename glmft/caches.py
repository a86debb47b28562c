"""One place for everything that is fetched or compiled: $GLMFT_CACHE, by default .glmft_cache in the working directory.

Rented machines lose the home folder, so caches do not go there; a Hugging Face cache that is already there is used.
"""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT = ".glmft_cache"
VARIABLES = {  # variable of a library -> folder below the cache
    "HF_HOME": "huggingface",
    "MODELSCOPE_CACHE": "modelscope",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
}


def cache_dir() -> Path:
    """The folder, absolute; it may not exist yet."""
    return Path(os.environ.get("GLMFT_CACHE") or DEFAULT).expanduser().resolve()


def use_cache_dir() -> None:
    """Points the libraries' caches there, except where a variable is set or a Hugging Face cache exists in the home
    folder. Must run before the libraries are imported; child processes inherit it."""
    os.environ["GLMFT_CACHE"] = str(cache_dir())
    for variable, name in VARIABLES.items():
        if variable == "HF_HOME" and (Path.home() / ".cache" / "huggingface" / "hub").is_dir():
            continue
        os.environ.setdefault(variable, str(cache_dir() / name))
