"""A loader that begins in the middle gives exactly the batches that were left."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glmft.data.datamodule import InstructionData

pytestmark = pytest.mark.share("data")
KINDS = {
    "packed": {},
    "padded": {"packing": False},
    "interleaved": {"mix": "interleave", "mix_weights": [0.6, 0.4], "mix_until": "all_exhausted"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, n in (("a", 60), ("b", 25)):
        records = [{"instruction": f"{name}{i}", "output": "好" * int(rng.integers(1, 60))} for i in range(n)]
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    names = {n: {"file_name": f"{n}.json"} for n in "ab"}
    (folder / "dataset_info.json").write_text(json.dumps(names))
    return folder


def batches(tiny, folder, options, workers, rank, world, step, epochs):
    """What one rank trains on from an optimizer step to the end of an epoch."""
    data = InstructionData(
        str(tiny), datasets=["a", "b"], dir=str(folder), max_length=128, tokens_per_step=512, tokens_per_batch=128,
        num_workers=workers, seed=3, **options,
    )  # fmt: skip
    accumulate = data.schedule(world).accumulate
    data.trainer = SimpleNamespace(
        world_size=world,
        global_rank=rank,
        global_step=step,
        accumulate_grad_batches=accumulate,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    out = []
    loader = data.train_dataloader()
    steps = data.steps_per_epoch(world)
    for epoch in range(step // steps, epochs):
        out += [(b.epoch, b.index, b.step_tokens, b.input_ids.tolist()) for b in loader]
        data.trainer.global_step = (epoch + 1) * steps
    return out, steps, accumulate


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMFT_CACHE", str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_is_the_same(tiny, folder, kind, world, workers):
    for rank in range(world):
        whole, steps, accumulate = batches(tiny, folder, KINDS[kind], 0, rank, world, 0, 2)
        for stop in (steps // 2, steps - 1, steps):  # in the middle, before the last step, at the end of an epoch
            rest, _, _ = batches(tiny, folder, KINDS[kind], workers, rank, world, stop, 2)
            done = stop * accumulate if stop < steps else sum(b[0] == 0 for b in whole)  # its last step may be short
            assert rest == whole[done:]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_seen_once_an_epoch_whatever_the_ranks(tiny, folder, kind):
    def samples(world: int) -> list[tuple[int, ...]]:
        found = []
        for rank in range(world):
            whole, _, _ = batches(tiny, folder, KINDS[kind], 0, rank, world, 0, 1)
            for _, _, _, rows in whole:
                for row in rows:
                    starts = [i for i, t in enumerate(row) if t == gmask] + [len(row)]
                    found += [strip(tuple(row[a:b])) for a, b in itertools.pairwise(starts)]
        return sorted(found)

    gmask = _gmask(tiny)
    assert samples(1) == samples(2)


def strip(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Without padding."""
    end = len(ids)
    while ids[end - 1] == 0:
        end -= 1
    return ids[:end]


def _gmask(tiny) -> int:
    from glmft.models import load_tokenizer

    return load_tokenizer(tiny).control_ids["[gMASK]"]


def test_epochs_differ(tiny, folder):
    whole, _, _ = batches(tiny, folder, {}, 0, 0, 1, 0, 2)
    half = len([b for b in whole if b[0] == 0])
    assert [b[3] for b in whole[:half]] != [b[3] for b in whole[half:]]
