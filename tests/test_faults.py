"""A small share of `make faults` and of the fuzzing, in programs of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.share("reliability")
FAULTS = Path(__file__).parent / "faults"


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FAULTS / program, *arguments], capture_output=True, text=True, timeout=400)


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    done = run(
        "harness.py", "--faults", "5", "--settings", "2", "--seed", "7", "--plain", "2", "--json", f"{tmp_path}/f"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "f").read_text())
    counted = [f for f in found["faults"] if f["counted"]]
    assert len(counted) >= 5
    assert all(f["identical"] and f["verified"] for f in counted)


def test_mutated_input_is_read_or_refused():
    done = run("fuzz.py", "--records", "20000", "--files", "150", "--seconds", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "records: 20,000" in done.stdout
