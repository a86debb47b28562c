"""Stopped anywhere, continued exactly: checkpoints, signals, guards, the lock."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmft.artefacts import MANIFEST, SaveFailed, remove_leftovers, verify, write_folder
from glmft.callbacks.checkpoint import Checkpoints
from glmft.callbacks.record import RunRecord
from glmft.errors import DamagedError, UserError
from glmft.guards import Spikes
from glmft.locks import RunLock
from glmft.models import load_model
from glmft.module import FineTuner
from glmft.runs import read_jsonl, read_status

pytestmark = pytest.mark.share("reliability")
RUN = (
    *("trainer.max_epochs=2", "data.max_samples=24", "data.val_datasets=[]", "strategy.dropout=0.1"),
    *("callbacks.samples=null", "callbacks.compare=null", "callbacks.verdict=null", "trainer.val_check_interval=1.0"),
    *("data.tokens_per_step=512", "data.tokens_per_batch=256"),
)


def at_step(monkeypatch, step: int, do) -> None:
    """Does something after an optimizer step, before any callback saves."""
    original = RunRecord.on_train_batch_start
    done = []

    def hook(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == step and not done:
            done.append(step)
            do(trainer)

    monkeypatch.setattr(RunRecord, "on_train_batch_start", hook)


def send(number: int):
    return lambda trainer: os.kill(os.getpid(), number)


def losses(run: Path) -> list[tuple]:
    keys = ("step", "train/loss", "lr", "grad_norm")
    return [tuple(r[k] for k in keys) for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return losses(a) == losses(b) and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def whole(train) -> Path:
    """A run that nothing stopped."""
    assert train("run.name=whole", *RUN).code == 0
    return Path("runs/whole")


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(train, whole, monkeypatch, number):
    last = losses(whole)[-1][0]
    step = last // 2 + 1 if number != signal.SIGHUP else last // 2 - 1  # SIGHUP comes in the last step of an epoch
    with monkeypatch.context() as m:
        at_step(m, step, send(number))
        stopped = train("run.name=a", *RUN)
    assert stopped.code == 128 + number
    assert f"stopped ({signal.Signals(number).name}) after step {step + 1}; to go on:" in stopped.out
    assert "    python -m glmft.train trainer.max_epochs=2 " in stopped.out
    assert "Traceback" not in stopped.err + stopped.out
    assert read_status(Path("runs/a"))["state"] == "stopped"
    assert [p.name for p in Path("runs/a/checkpoints").iterdir()] == [f"step-{step + 1:07d}"]
    resumed = train("run.name=a", *RUN)
    assert resumed.code == 0, resumed.err
    assert f"continued from step {step + 1}" in resumed.out
    assert same(whole, Path("runs/a"))


def test_a_second_ctrl_c_ends_at_once(train, monkeypatch):
    def twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    at_step(monkeypatch, 2, twice)
    assert train("run.name=a", *RUN).code == 130
    assert not list(Path("runs/a/checkpoints").iterdir())


def test_a_signal_while_loading_or_saving_does_no_harm(train, whole, monkeypatch):
    with monkeypatch.context() as m:
        original = FineTuner.load
        m.setattr(FineTuner, "load", lambda self, *a: (os.kill(os.getpid(), signal.SIGTERM), original(self, *a))[1])
        assert train("run.name=a", *RUN).code == 143
    with monkeypatch.context() as m:
        save = Checkpoints.save
        m.setattr(Checkpoints, "save", lambda self, t: (os.kill(os.getpid(), signal.SIGTERM), save(self, t))[1])
        assert train("run.name=a", *RUN, "callbacks.checkpoint.every_n_train_steps=2").code == 143
    assert verify(next(Path("runs/a/checkpoints").iterdir()))
    assert train("run.name=a", *RUN, "callbacks.checkpoint.every_n_train_steps=2").code == 0
    assert same(whole, Path("runs/a"))


def test_slurm_puts_the_job_back(train, monkeypatch, tmp_path):
    stand_in = tmp_path / "bin" / "scontrol"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    at_step(monkeypatch, 2, send(signal.SIGUSR1))
    first = train(*RUN)
    assert first.code == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    monkeypatch.undo()
    monkeypatch.chdir(first.folder)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert [p.name for p in first.runs] == ["default-slurm77"]
    second = train(*RUN)
    assert "continued from step 3" in second.out


# ---- continuing


def test_another_cut_of_the_steps_goes_on_with_the_same_data(train, whole, monkeypatch):
    with monkeypatch.context() as m:
        at_step(m, 3, send(signal.SIGTERM))
        assert train("run.name=a", *RUN).code == 143
    plain = [o for o in RUN if not o.startswith(("strategy.dropout", "data.tokens_per_batch"))]
    resumed = train("run.name=a", *plain, "strategy.dropout=0.1", "data.tokens_per_batch=128")
    assert resumed.code == 0, resumed.err
    assert [row[0] for row in losses(Path("runs/a"))] == [row[0] for row in losses(whole)]
    assert read_status(Path("runs/a"))["state"] == "done"


@pytest.mark.parametrize("stop", [3, "end of the epoch"])
def test_another_cut_without_dropout_gives_the_same_losses(train, monkeypatch, stop):
    run = [o for o in RUN if not o.startswith(("strategy.dropout", "data.tokens_per_batch"))]
    assert train("run.name=whole", *run, "data.tokens_per_batch=512").code == 0
    rows = losses(Path("runs/whole"))
    step = rows[-1][0] // 2 - 1 if stop == "end of the epoch" else stop
    with monkeypatch.context() as m:
        at_step(m, step, send(signal.SIGTERM))
        assert train("run.name=a", *run, "data.tokens_per_batch=512").code == 143
    assert train("run.name=a", *run, "data.tokens_per_batch=128").code == 0
    for (step, loss, lr, _), (other, expected, rate, _) in zip(losses(Path("runs/a")), rows, strict=True):
        assert (step, lr) == (other, rate)
        assert abs(loss - expected) < 1e-5 * expected


def stopped_with_all_checkpoints(train, monkeypatch, options: tuple[str, ...]) -> list[Path]:
    """Stops run `a` after six steps, with none of its checkpoints removed; returns them, oldest first."""
    with monkeypatch.context() as m:
        m.setattr(Checkpoints, "_rotate", lambda self, newest: None)
        at_step(m, 5, send(signal.SIGTERM))
        assert train("run.name=a", *options).code == 143
    return sorted(Path("runs/a/checkpoints").iterdir())


def damaged(kind: str, folder: Path) -> None:
    file = folder / "trainer.ckpt"
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "one bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "no manifest":
        (folder / MANIFEST).unlink()
    elif kind == "newer format":
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    else:
        shutil.rmtree(folder)
        folder.mkdir()


SAYS = {
    "cut off": "bytes, the manifest says",
    "one bit": "its content is not what was written",
    "no manifest": "manifest.json: missing or broken",
    "newer format": "format 99, this version reads 1; update glmft",
    "empty": "manifest.json: missing or broken",
}


def test_a_damaged_newest_checkpoint_is_left_for_an_older_one(train, monkeypatch):
    """Every kind of damage, one after the other; the last one leaves nothing to fall back to."""
    saved = ("callbacks.checkpoint.every_n_train_steps=2", *RUN)
    kept = stopped_with_all_checkpoints(train, monkeypatch, saved)
    shutil.copytree("runs/a", "backup")
    for kind, says in SAYS.items():
        shutil.rmtree("runs/a")
        shutil.copytree("backup", "runs/a")
        damaged(kind, kept[-1])
        result = train("run.name=a", *saved)
        assert result.code == 0, result.err
        assert says in result.out
        assert f"going on from step {int(kept[-2].name[5:])} instead" in result.out
    shutil.rmtree("runs/a")
    shutil.copytree("backup", "runs/a")
    for folder in kept:
        damaged("one bit", folder)
    result = train("run.name=a", *saved)
    assert result.code == 3
    assert "no checkpoint to continue from; remove the run to start anew" in result.err


def test_other_data_or_another_base_is_refused(train, tiny_copy):
    Path("mine.json").write_text(json.dumps([{"instruction": str(i), "output": "好"} for i in range(20)]))
    options = (f"model.path={tiny_copy}", "data.path=mine.json", "data.datasets=[]", "run.name=a", *RUN)
    assert train(*options, "trainer.max_steps=2").code == 0
    Path("runs/a/status.json").unlink()
    Path("mine.json").write_text(json.dumps([{"instruction": str(i), "output": "坏"} for i in range(20)]))
    result = train(*options, "trainer.max_steps=2")
    assert result.code == 2
    assert "step-0000002 was made with something else" in result.err
    assert "training records: " in result.err
    content = bytearray((tiny_copy / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tiny_copy / "model.safetensors").write_bytes(content)
    assert "base model: " in train(*options, "trainer.max_steps=2").err


# ---- saving


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "a"
    write_folder(target, lambda p: (p / "x").write_text("one") and None, {"step": 1})
    assert verify(target)["step"] == 1

    def breaks(part: Path) -> None:
        (part / "x").write_text("two")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveFailed, match=r"a: not saved: No space left on device \([\d,]+ bytes free\)"):
        write_folder(target, breaks, {"step": 2})
    assert (target / "x").read_text() == "one"
    with pytest.raises(SaveFailed, match=r"needed 9,999,999,999,999,999 bytes, free"):
        write_folder(target, lambda p: None, {}, needed=9_999_999_999_999_999)
    with pytest.raises(SaveFailed, match="its content is not what was written"):
        write_folder(target, lambda p: {"x": "0" * 64} if (p / "x").write_text("three") else None, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_leftovers_of_a_killed_process(tmp_path):
    for name in (".step-0000001.part", ".step-0000002.old", ".step-0000003.old", "step-0000003"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000002", "step-0000003"]


def test_a_save_that_fails_is_tried_again_and_ends_the_run_the_third_time(train, monkeypatch):
    from glmft import checkpoints

    def full(*args, **kwargs):
        raise SaveFailed("checkpoints: not saved: No space left on device (0 bytes free)")

    with monkeypatch.context() as m:
        m.setattr(checkpoints, "write_folder", full)
        result = train("run.name=a", *RUN, "callbacks.checkpoint.every_n_train_steps=2")
    assert result.code == 4
    assert result.out.count("the run goes on and tries again") == 2
    assert "No space left on device" in result.err
    assert train("run.name=a", *RUN, "callbacks.checkpoint.every_n_train_steps=2").code == 0


def test_only_the_newest_and_the_best_stay(train):
    result = train("run.name=a", *RUN, "data.val_datasets=[tiny_keep]", "data.datasets=[tiny_identity]")
    assert result.code == 0, result.err
    rows = [r for r in read_jsonl(Path("runs/a/metrics.jsonl")) if "val/loss" in r]
    best = min(rows, key=lambda r: r["val/loss"])["step"]
    kept = sorted(int(p.name[5:]) for p in Path("runs/a/checkpoints").iterdir())
    assert kept == sorted({best, rows[-1]["step"]})
    assert best != rows[-1]["step"]


def test_saves_by_the_clock(train):
    result = train("run.name=a", *RUN, "callbacks.checkpoint.every_minutes=0.00001", "trainer.max_steps=3")
    assert result.code == 0, result.err


# ---- guards


def test_records_of_a_step_that_is_not_finite_are_named(train, monkeypatch):
    original = FineTuner.loss_sum

    def spoiled(self, batch):
        loss = original(self, batch)
        return loss * float("nan") if self.trainer.global_step == 2 else loss

    monkeypatch.setattr(FineTuner, "loss_sum", spoiled)
    result = train("run.name=a", *RUN)
    assert result.code == 1
    assert "step 3: loss nan, gradient norm nan: not finite. Weights are as before it" in result.err
    assert "tiny_identity.json: record " in result.err
    skipped = train("run.name=b", *RUN, "model.skip_nonfinite=1")
    assert skipped.code == 0, skipped.err
    assert "not finite; skipped (1 of 1). It learned from " in skipped.out
    assert all(v.isfinite().all() for v in weights(Path("runs/b")).values())


def test_spikes_are_found():
    spikes = Spikes()
    seen = [spikes.seen(2.0 + 0.01 * (i % 5)) for i in range(60)]
    assert not any(seen)
    assert spikes.seen(9.0)
    assert not spikes.seen(2.02)


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_splits_and_loses_nothing(train, monkeypatch, packing, where):
    run = [*[o for o in RUN if not o.startswith("strategy.dropout")], f"data.packing={packing}", "trainer.max_steps=4"]
    assert train("run.name=whole", *run).code == 0
    original = FineTuner.loss_sum

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def short(self, batch):
        too_much = self.trainer.global_step >= 1 and batch.input_ids.numel() > (130 if packing == "true" else 70)
        if too_much and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        loss = original(self, batch)
        return Full.apply(loss) if too_much else loss

    monkeypatch.setattr(FineTuner, "loss_sum", short)
    result = train("run.name=a", *run)
    assert result.code == 0, result.err
    assert "out of memory: micro-batches are computed in 2 parts from here on" in result.out
    for (_, loss, _, norm), (_, expected, _, other) in zip(
        losses(Path("runs/a")), losses(Path("runs/whole")), strict=True
    ):
        assert abs(loss - expected) < 1e-5 * expected
        assert abs(norm - other) < 1e-4 * other


# ---- the lock


def test_one_process_at_a_time(tmp_path, capsys):
    with RunLock(tmp_path / "a"), pytest.raises(UserError, match=rf"process {os.getpid()} on .* works here since"):
        RunLock(tmp_path / "a").__enter__()
    assert not (tmp_path / "a").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, capsys):
    lock = RunLock(tmp_path)
    (tmp_path / "more").touch()
    (tmp_path / ".lock").write_text(json.dumps(lock.me | {"pid": 2**22 + 1}))
    with lock:
        assert json.loads((tmp_path / ".lock").read_text()) == lock.me
    assert "which is gone, is taken over" in capsys.readouterr().out
    (tmp_path / ".lock").write_text(json.dumps(lock.me | {"host": "elsewhere", "job": "7"}))
    with pytest.raises(UserError, match="on elsewhere, SLURM job 7 works here"):
        RunLock(tmp_path).__enter__()
    os.utime(tmp_path / ".lock", (0, time.time() - 120))
    with RunLock(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_run_at_work_refuses_a_second_one(train):
    assert train("run.name=a", *RUN, "trainer.max_steps=2").code == 0
    Path("runs/a/status.json").unlink()
    with RunLock(Path("runs/a")):
        result = train("run.name=a", *RUN, "trainer.max_steps=2")
    assert result.code == 2
    assert "wait for it, or choose another run.name" in result.err


def test_a_run_killed_while_it_began_can_begin_again(train):
    Path("runs/a/.hydra").mkdir(parents=True)
    Path("runs/a/.hydra/.config.yaml.part-7").write_text("half")
    assert train("run.name=a", *RUN, "trainer.max_steps=2").code == 0


def test_manifest_of_a_foreign_folder(tmp_path):
    with pytest.raises(DamagedError, match="missing or broken"):
        verify(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "files": {"../x": {"bytes": 0, "sha256": ""}}}))
    with pytest.raises(DamagedError, match="missing"):
        verify(tmp_path)


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(train, monkeypatch):
    saved = ("callbacks.checkpoint.every_n_train_steps=1", *RUN)
    kept = stopped_with_all_checkpoints(train, monkeypatch, saved)
    damaged("one bit", kept[-1])
    with monkeypatch.context() as m:
        at_step(m, 6, send(signal.SIGTERM))
        assert train("run.name=a", *saved).code == 143
    names = sorted(p.name for p in Path("runs/a/checkpoints").iterdir())
    assert names == ["damaged-step-0000006", "step-0000007"]
    assert verify(Path("runs/a/checkpoints/step-0000007"))


def test_a_run_whose_last_step_is_not_saved_is_not_done(train, monkeypatch):
    from glmft import checkpoints

    def full(*args, **kwargs):
        raise SaveFailed("checkpoints: not saved: No space left on device (0 bytes free)")

    monkeypatch.setattr(checkpoints, "write_folder", full)
    result = train("run.name=a", *RUN, "trainer.max_steps=2", "callbacks.tuned=null")
    assert result.code == 4
    assert read_status(Path("runs/a"))["state"] == "failed"


def test_a_full_disk_is_said(train, monkeypatch):
    from glmft import runs

    def full(path, row):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(runs, "append_jsonl", full)
    result = train("run.name=a", *RUN)
    assert result.code == 4
    assert "the disk is full (" in result.err
    assert "Traceback" not in result.err


def test_a_lock_that_changed_hands_is_given_back(tmp_path, monkeypatch):
    """Between the look and the takeover another process may have taken over."""
    from glmft import locks

    (tmp_path / "more").touch()
    stale = RunLock(tmp_path).me | {"pid": 2**22 + 1}
    fresh = RunLock(tmp_path).me | {"pid": os.getpid(), "since": 1.0}
    (tmp_path / ".lock").write_text(json.dumps(stale))
    first = [True]

    def gone(file, holder):
        if first.pop() if first else False:
            (tmp_path / ".lock").write_text(json.dumps(fresh))
            return True
        return False

    monkeypatch.setattr(locks, "gone", gone)
    with pytest.raises(UserError, match="works here since"):
        RunLock(tmp_path).__enter__()
    assert json.loads((tmp_path / ".lock").read_text()) == fresh


# ---- the disk, the data and the clock change while a run is at work


def test_a_disk_that_fails_to_sync_fails_the_save_not_the_run(train, monkeypatch):
    original, failing = os.fsync, []

    def fsync(handle):
        if failing:
            raise OSError(errno.EIO, failing.pop())
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    at_step(monkeypatch, 1, lambda trainer: failing.append("Input/output error"))
    result = train("run.name=a", *RUN, "callbacks.checkpoint.every_n_train_steps=1")
    assert result.code == 0, result.err
    assert "Input/output error" in result.out


def test_a_run_directory_that_is_taken_away_ends_the_run(train, monkeypatch):
    at_step(monkeypatch, 2, lambda trainer: shutil.rmtree("runs/a"))
    result = train("run.name=a", *RUN)
    assert result.code in (3, 4), result.err
    assert "runs/a" in result.err
    assert "Traceback" not in result.err


def test_the_step_decides_which_checkpoint_is_the_newest(train, monkeypatch):
    with monkeypatch.context() as m:
        at_step(m, 4, send(signal.SIGTERM))
        assert train("run.name=a", *RUN, "callbacks.checkpoint.every_n_train_steps=2").code == 143
    for age, folder in enumerate(sorted(Path("runs/a/checkpoints").glob("step-*"))):
        os.utime(folder, (time.time() + 10**6 - age * 10**5,) * 2)  # the clock jumped: older ones look newer
    result = train("run.name=a", *RUN)
    assert result.code == 0, result.err
    steps = [step for step, *_ in losses(Path("runs/a"))]
    assert len(steps) > 4
    assert steps == list(range(1, len(steps) + 1))  # none was made twice


def test_out_of_memory_in_validation_says_what_helps(train, monkeypatch):
    original = FineTuner.loss_sum

    def short(self, batch):
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(self, batch)

    monkeypatch.setattr(FineTuner, "loss_sum", short)
    result = train("run.name=a", *RUN, "data.val_fraction=0.2")
    assert result.code == 4
    assert "data.tokens_per_batch=2048" in result.err


def test_a_dead_loader_process_ends_the_run_with_the_reason(train, monkeypatch):
    def kill(trainer):
        (worker,) = multiprocessing.active_children()
        worker.kill()

    run = [*(o for o in RUN if "max_epochs" not in o), "trainer.max_epochs=8", "data.num_workers=1"]
    with monkeypatch.context() as m:
        at_step(m, 2, kill)
        result = train("run.name=a", *run)
    assert result.code == 4, result.err
    assert "loader process" in result.err
    assert result.seconds < 60
    assert train("run.name=a", *run).code == 0


def test_base_weights_cut_off_while_they_are_mapped(tiny_copy):
    """The process gets a bus error, which nothing can undo; it says where, and the next start names the file."""
    code = (
        "import sys, torch, glmft.config as c; c.name_crashes(); from glmft.models import load_model; "
        "m = load_model(sys.argv[1]); open(sys.argv[1] + '/model.safetensors', 'r+b').truncate(4096); "
        "m(torch.arange(5, 9)[None])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_copy)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    with pytest.raises(DamagedError, match=r"model\.safetensors.*truncated"):
        load_model(tiny_copy)
