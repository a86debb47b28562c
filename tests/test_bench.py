"""The bench: what it counts, when it calls a comparison void, and one small run of all its sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glmft.bench.documents import ALPACA_ZH, Documents, GeneratedData
from glmft.bench.model import flops
from glmft.bench.report import judge
from glmft.errors import UserError

pytestmark = pytest.mark.share("speed")


def test_documents_follow_their_seed_and_their_lengths():
    one, same, other = (Documents.make("alpaca_zh", 500, seed, 65024) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    assert abs(one.lengths.mean() - 134.8) < 10
    assert all(ids.min() > 0 and ids.max() < 65024 for ids, _ in one.samples)
    assert {(int((~m).sum()), int(m.sum())) for _, m in one.samples} <= set(ALPACA_ZH)
    assert set(Documents.make(2048, 5, 0, 65024).lengths) == {2048}


def test_operations_of_a_step():
    """The published counts: 4 a parameter and token with a frozen base, 6 in full, and 25.5 GFLOP at 2,048 tokens."""
    lengths = np.array([2048] * 4)
    frozen = flops("6b", lengths, int(lengths.sum()), full=False) / lengths.sum() / 1e9
    full = flops("6b", lengths, int(lengths.sum()), full=True) / lengths.sum() / 1e9
    assert frozen == pytest.approx(25.3, abs=0.3)
    assert full == pytest.approx(37.3, abs=0.3)


def test_padded_twins_have_the_steps_of_the_packed():
    packed, padded = (GeneratedData("alpaca_zh", 200, "tiny", packing=p) for p in (True, False))
    assert packed.steps(2) == padded.steps(2)
    with pytest.raises(UserError, match="too few for 99 optimizer steps"):
        packed.steps(99)


def side(rate: float, losses: float = 7.0) -> dict:
    return {"tokens_per_sec": rate, "losses": [losses] * 20}


@pytest.mark.parametrize(
    ("last", "theirs", "void"),
    [(100.0, 7.0, []), (90.0, 7.0, ["between its first and its last run"]), (100.0, 7.5, ["apart on the same"])],
)
def test_a_comparison_that_does_not_hold_is_void(last, theirs, void):
    parts = {
        **{"ours": side(100.0), "ours_last": side(last), "baseline_default": side(10.0, theirs)},
        **{"as_baseline_default": side(50.0), "bounds": {"frozen_base": side(110.0), "matmul": side(200.0)}},
    }
    found = judge(parts)
    assert len(found["void"]) == len(void)
    assert all(text in reason for text, reason in zip(void, found["void"], strict=True))
    assert found["ratios"]["baseline_default"] == pytest.approx((100 + last) / 20, rel=1e-3)


def bench(folder: Path, *options: str) -> str:
    """The command on the tiny model; what it printed."""
    command = [
        *(sys.executable, "-m", "glmft.bench", "bench.size=tiny", "data.tokens_per_step=2048"),
        *("data.tokens_per_batch=2048", "model.compile_layers=auto", "trainer.accelerator=cpu", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_sides_on_the_tiny_model(tmp_path):
    """Ours learns what PEFT with the Trainer learns on the same documents, and is at least as fast."""
    steps = ("bench.steps=6", "bench.warmup=2", "bench.baseline_steps=4", "data.documents=300")
    bench(tmp_path, *steps, "bench.baselines=[default]", "bench.bounds=false", f"bench.out={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["parts"]["ours"]["losses"] == result["parts"]["ours_last"]["losses"]
    assert result["verdict"]["losses_apart"]["baseline_default"] < 1e-4
    assert result["verdict"]["ratios"]["baseline_default"] > 1
    assert result["parts"]["baseline_default"]["settings"]["gradient_checkpointing"] is True
    assert len(result["documents_sha256"]) == 64


@pytest.mark.slow
def test_ceilings_on_the_tiny_model(tmp_path):
    file = tmp_path / "bounds.json"
    bench(tmp_path, "bench.steps=4", "bench.warmup=1", "data.documents=200", "bench.part=bounds", f"bench.file={file}")
    found = json.loads(file.read_text())
    assert found["matmul"]["tokens_per_sec"] > found["frozen_base"]["tokens_per_sec"] > 0
    assert found["copy_gb_per_sec"] > 0.1


def test_the_bench_runs_the_real_step(tmp_path):
    """Our side alone; all sides are in the slow tests."""
    steps = ("bench.steps=4", "bench.warmup=1", "data.documents=100")
    bench(tmp_path, *steps, "bench.bounds=false", "bench.baselines=[]", f"bench.out={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    part = result["parts"]["ours"]
    data = GeneratedData("alpaca_zh", 100, "tiny", tokens_per_batch=2048, tokens_per_step=2048, seed=42)
    assert result["documents_sha256"] == data.documents.sha256
    assert part["tokens"] == [int(data.documents.lengths[step].sum()) for step in data.steps(4)]
    assert len(part["losses"]) == len(part["seconds"]) == 4
    assert part["settings"]["padding_share"] == pytest.approx(1 - sum(part["tokens"]) / (4 * 2048), abs=1e-3)
