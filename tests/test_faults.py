"""A small share of `make faults` and of the fuzzing, in programs of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.share("reliability")
FAULTS = Path(__file__).parent / "faults"
SEEDS = ("17", "26")  # LoRA and full, with one process each; `make faults` has two as well


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FAULTS / program), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """Thirty-six faults and two of the disk each, by two harnesses at a time."""
    options = ("--faults", "18", "--settings", "2", "--plain", "1")
    harnesses = [start("harness.py", *options, "--seed", seed, "--json", str(tmp_path / seed)) for seed in SEEDS]
    for harness in harnesses:
        out, _ = harness.communicate(timeout=400)
        assert harness.returncode == 0, out
    found = [fault for seed in SEEDS for fault in json.loads((tmp_path / seed).read_text())["faults"]]
    counted = [f for f in found if f["counted"]]
    assert len(counted) >= 36
    assert all(f["identical"] and f["verified"] for f in counted)


def test_mutated_input_is_read_or_refused():
    fuzz = start("fuzz.py", "--records", "20000", "--files", "150", "--seconds", "30")
    out, _ = fuzz.communicate(timeout=400)
    assert fuzz.returncode == 0, out
    assert "records: 20,000" in out
