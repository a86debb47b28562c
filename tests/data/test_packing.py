from __future__ import annotations

import time

import numpy as np
import pytest
from conftest import reference

from glmft.data.corpus import CorpusSpec, prepare
from glmft.data.packing import Schedule, plan_padded_rows, plan_rows
from glmft.errors import ProblemList


def lengths(n: int = 500, seed: int = 0, cap: int = 256) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(3.5, 0.8, n).astype(int), 2, cap)


def test_every_sample_once_within_the_budget():
    size = lengths()
    for plan in (plan_rows, plan_padded_rows):
        rows = plan(size, 256, seed=1, epoch=0)
        assert sorted(i for row in rows for i in row) == list(range(len(size)))
    assert max(size[row].sum() for row in plan_rows(size, 256, 1, 0)) <= 256
    assert max(size[row].max() * len(row) for row in plan_padded_rows(size, 256, 1, 0)) <= 256


def test_packing_is_nearly_full():
    size = lengths()
    rows = plan_rows(size, 256, seed=1, epoch=0)
    assert size.sum() / ((len(rows) - 1) * 256) > 0.99


def test_epochs_differ_in_content_but_not_in_number():
    size = lengths()
    plans = [plan_rows(size, 256, seed=1, epoch=e) for e in range(5)]
    assert len({len(p) for p in plans}) == 1
    together = [{frozenset(row) for row in p} for p in plans]
    assert len(together[0] & together[1]) < len(plans[0]) / 4
    assert plans[0] == plan_rows(size, 256, seed=1, epoch=0)
    assert plans[0] != plan_rows(size, 256, seed=2, epoch=0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows_per_step", [1, 4, 8])
@pytest.mark.parametrize("per_batch", [1, 2, 3, 8])
def test_every_split_of_a_step_holds_the_same_samples(world, rows_per_step, per_batch):
    size = lengths(300)
    supervised = size - 1
    row = 256
    if rows_per_step < world:
        return
    schedule = Schedule(rows_per_step * row, per_batch * row, row, world)
    rows = plan_rows(size, row, 0, 0)
    ranks = [schedule.micro_batches(rows, supervised, 0, rank) for rank in range(world)]
    assert {len(r) for r in ranks} == {schedule.num_batches(len(rows))}
    for step in range(schedule.num_steps(len(rows))):
        window = slice(step * schedule.accumulate, (step + 1) * schedule.accumulate)
        micro = [m for rank in ranks for m in rank[window]]
        expected = {i for r in rows[step * rows_per_step : (step + 1) * rows_per_step] for i in r}
        assert {i for m in micro for i in m.samples} == expected
        assert {m.step_tokens for m in micro} == {sum(supervised[i] for i in expected)}
    assert max(sum(size[i] for i in m.samples) for r in ranks for m in r) <= per_batch * row
    everyone = [m.index for r in ranks for m in r]
    assert len(set(everyone)) == len(everyone)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("plan", [plan_rows, plan_padded_rows])
def test_no_rank_is_without_data(world, plan):
    size = lengths(101)
    rows = plan(size, 256, 0, 0)
    for per_batch in (1, 2):
        schedule = Schedule(4 * 256, per_batch * 256, 256, world)
        ranks = [schedule.micro_batches(rows, size, 0, rank) for rank in range(world)]
        for step in range(schedule.num_steps(len(rows))):
            micro = [m for r in ranks for m in r[step * schedule.accumulate : (step + 1) * schedule.accumulate]]
            samples = sum(len(m.samples) for m in micro)
            assert all(m.samples for m in micro) or samples < len(micro)
            tokens = [sum(size[i] for i in m.samples) for m in micro]
            assert max(tokens) <= per_batch * 256


def test_the_alpaca_rows_are_full():
    store = prepare(CorpusSpec.of(
        reference("data/chatglm3-tokenizer"), datasets=["alpaca_zh_demo"], dir=str(reference("data"))
    )).train  # fmt: skip
    for budget in (2048, 8192):
        rows = plan_rows(store.lengths, budget, 0, 0)
        filled = sorted(store.lengths[row].sum() for row in rows)
        assert sum(filled[1:]) / (budget * (len(rows) - 1)) > 0.99  # all but the emptiest, which stands anywhere


def test_a_hundred_thousand_samples():
    rng = np.random.default_rng(0)
    size = np.clip(rng.lognormal(np.log(220), 0.96, 100_000).astype(int), 1, 2048)
    plan_rows(size[:1000], 2048, 0, 0)
    began = time.process_time()  # what the plan takes, whatever else the machine does
    rows = plan_rows(size, 2048, 0, 0)
    spent = time.process_time() - began
    assert size.sum() / (2048 * len(rows)) > 0.999
    assert spent < 0.5
    order = size[[i for row in rows for i in row]]
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.05
    other = {frozenset(row) for row in plan_rows(size, 2048, 0, 1)}
    assert len(other & {frozenset(row) for row in rows}) < len(rows) / 10


def test_budgets_that_do_not_fit_are_named():
    with pytest.raises(ProblemList, match=r"data.max_length=512 does not fit data.tokens_per_step=256"):
        Schedule(256, 1024, 512)
    with pytest.raises(ProblemList, match=r"data.tokens_per_batch=128 is less than a row of 256"):
        Schedule(256, 128, 256)
    with pytest.raises(ProblemList, match="too few for 4 devices"):
        Schedule(512, 512, 256, world_size=4)


def test_rows_use_the_whole_step():
    schedule = Schedule(tokens_per_step=2048, tokens_per_batch=8192, max_length=1000)
    assert (schedule.rows_per_step, schedule.row_budget, schedule.accumulate) == (2, 1024, 1)
