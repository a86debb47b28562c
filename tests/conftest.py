"""Shared pieces of the tests: the tiny model, the reference data (skipped where absent), runs of the real program."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("WANDB_API_KEY", None)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GLMFT_SHARED", ROOT.parent / "shared"))
SHARES = {  # seconds of `make test`
    **{"main job": 120.0, "fifteen minutes": 60.0, "data": 60.0, "reliability": 100.0},
    **{"speed": 90.0, "use": 90.0, "board": 60.0},
}
_spent: dict[str, float] = defaultdict(float)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := item.get_closest_marker("share"):
            item.user_properties.append(("share", marker.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    share = next((v for k, v in report.user_properties if k == "share"), "main job")
    _spent[share] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, seconds in _spent.items():
        terminalreporter.write_line(f"share of {name}: {seconds:.0f} s of {SHARES[name]:.0f} s")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one kept."""
    monkeypatch.setenv("GLMFT_CACHE", str(tmp_path / "glmft_cache"))


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The packaged model."""
    return ROOT / "glmft" / "assets" / "tiny-chatglm3"


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


def reference(name: str) -> Path:
    """A file or folder of the reference data; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data absent: {path}")
    return path


@dataclass
class Outcome:
    """What a run of the program left."""

    code: int
    out: str
    err: str
    folder: Path
    seconds: float

    @property
    def runs(self) -> list[Path]:
        """Run directories, oldest first."""
        root = self.folder / "runs"
        found = [p for p in root.iterdir() if not p.name.startswith(".")] if root.is_dir() else []
        return sorted(found, key=lambda p: p.stat().st_ctime)


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs `python -m glmft.train ARGUMENTS` in this process and a working directory of its own."""
    from glmft import config
    from glmft.train import main

    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GLMFT_CACHE", str(folder / ".glmft_cache"))

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["glmft.train", *arguments])
        capsys.readouterr()
        began = time.time()
        try:
            code = config.run("train", main)
        except SystemExit as e:
            code = int(e.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, folder, time.time() - began)

    return run


FAST = ("debug=fast", "callbacks.samples=null", "callbacks.compare=null", "callbacks.verdict=null")
"""Overrides that make a run as short as a test needs."""
