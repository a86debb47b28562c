"""Where recipes lie: the packaged ones and the user's own. Needs nothing but the standard library."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
USER_FOLDER = "glmft_conf"


def conf_dir() -> Path:
    """The packaged recipes: inside the wheel, or beside the package in a checkout."""
    inside = PACKAGE / "conf"
    return inside if (inside / "train.yaml").is_file() else PACKAGE.parent / "conf"


def user_dirs() -> list[Path]:
    """A user's own recipes: ./glmft_conf, then $GLMFT_CONF."""
    places = [Path(USER_FOLDER), *([Path(os.environ["GLMFT_CONF"])] if os.environ.get("GLMFT_CONF") else [])]
    return [p.resolve() for p in places if p.is_dir()]


def groups() -> list[str]:
    """Config groups that a user chooses from."""
    folders = {d.name for root in (*user_dirs(), conf_dir()) for d in root.iterdir() if any(d.glob("*.yaml"))}
    return sorted(folders - {"hydra", "paths"})


def options(group: str) -> list[str]:
    """The choices of a config group, packaged and the user's."""
    folders = [d / group for d in (*user_dirs(), conf_dir())]
    return sorted({f.stem for folder in folders if folder.is_dir() for f in folder.glob("*.yaml")})
