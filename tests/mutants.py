"""make mutants: every invariant test is run against named sabotages of the code and must fail.

A sabotage replaces one function before the tests are imported. Each runs in a forked process of its own. The table
shows, for each sabotage, the invariants that must notice it; one that does not notice ends the program with 1.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SABOTAGES: dict[str, tuple[Callable[[], None], list[str]]] = {}
MODULE, STRATEGIES = "test_module.py", "strategies/test_strategies.py"
TRAIN, TOKENIZER, LOADING = "test_train.py", "models/test_tokenizer.py", "models/test_loading.py"
PACKING, COLLATE, KERNELS = "data/test_packing.py", "data/test_collate.py", "kernels/test_kernels.py"
ENCODING, PREPARATION, LOADER = "data/test_encoding.py", "data/test_preparation.py", "data/test_resume.py"
PACKED_IS_PADDED = f"{MODULE}::test_packed_equals_padded_equals_one_by_one"
SAME_STEPS = f"{MODULE}::test_lightning_takes_the_same_steps_however_a_step_is_cut"
SAME_GRADIENT = f"{MODULE}::test_every_cut_of_a_step_gives_the_same_gradient"
BASE_ANSWERS = f"{STRATEGIES}::test_base_answers_come_from_the_same_weights"
RESUME = f"{TRAIN}::test_a_stopped_run_goes_on_where_it_was"


def sabotage(name: str, *invariants: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a function that breaks the code, with the tests that must fail."""

    def register(breaks: Callable[[], None]) -> Callable[[], None]:
        SABOTAGES[name] = (breaks, list(invariants))
        return breaks

    return register


def after(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Changes what a function returns."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


@sabotage("adapters of the compiled layer unscaled", f"{KERNELS}::test_the_layer_for_the_compiler_is_transformers_own")
def _() -> None:
    from glmft.kernels import layer

    original = layer._adapter
    layer._adapter = lambda *a: (found := original(*a)) and found._replace(down=found.down * 2)


@sabotage("q, k and v joined in another order", f"{KERNELS}::test_the_layer_for_the_compiler_is_transformers_own")
def _() -> None:
    from glmft.kernels import layer

    def joined(found: Any) -> None:
        found.self_attn.joined_qkv = tuple(t if t is None else t.flip(0) for t in found.self_attn.joined_qkv)

    original = layer.join_qkv
    layer.join_qkv = lambda found: (original(found), joined(found))


@sabotage("the MLP's second adapter left out", f"{KERNELS}::test_the_layer_for_the_compiler_is_transformers_own")
def _() -> None:
    from glmft.kernels import layer

    after(layer, "swiglu", lambda out: (out[0], out[1] * 0))


@sabotage("the loss's gradient without its target", f"{KERNELS}::test_chunked_loss_equals_its_reference")
def _() -> None:
    from glmft.kernels import loss

    after(loss, "loss_and_gradient", lambda out: (out[0], out[1].clamp(min=0)))


@sabotage("positions not restarted", f"{COLLATE}::test_pack")
def _() -> None:
    from glmft.data import collate

    after(collate, "pack", lambda b: b | {"position_ids": torch.arange(b["input_ids"].numel())[None]})


@sabotage("cu_seqlens ignored", PACKED_IS_PADDED, f"{KERNELS}::test_documents_do_not_see_each_other")
def _() -> None:
    from glmft.kernels import attention

    original = attention.packed_attention_reference
    whole = lambda q, k, v, bounds, scale: original(q, k, v, torch.tensor([0, len(q)]), scale)  # noqa: E731
    attention.packed_attention_reference = whole


@sabotage("labels cross a join", PACKED_IS_PADDED, f"{COLLATE}::test_pack")
def _() -> None:
    from glmft.data import collate

    original = collate.pack

    def crossing(samples, *args, **kwargs):
        batch = original(samples, *args, **kwargs)
        mask = np.concatenate([m for _, m in samples])
        mask[[0, *np.cumsum([len(m) for _, m in samples])[:-1]]] = True
        index = np.flatnonzero(mask[1:])
        ids = batch["input_ids"][0]
        return batch | {"loss_index": torch.from_numpy(index), "targets": ids[torch.from_numpy(index) + 1]}

    collate.pack = crossing


@sabotage("mean per micro-batch", SAME_STEPS)
def _() -> None:
    from glmft.module import FineTuner

    def step(self, batch, batch_idx):
        loss = self.loss_sum(batch) / max(1, batch.targets.numel())
        self._step_loss = self._step_loss + loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    FineTuner.training_step = step


@sabotage("last window unscaled", SAME_STEPS)
def _() -> None:
    from glmft.module import FineTuner

    original = FineTuner.training_step

    def step(self, batch, batch_idx):
        left = self.trainer.num_training_batches % self.trainer.accumulate_grad_batches
        last = left and batch_idx >= self.trainer.num_training_batches - left
        return original(self, batch, batch_idx) * (left / self.trainer.accumulate_grad_batches if last else 1)

    FineTuner.training_step = step


@sabotage("a rank computes all rows", SAME_GRADIENT, f"{PACKING}::test_every_split_of_a_step_holds_the_same_samples")
def _() -> None:
    from glmft.data.packing import Schedule

    original = Schedule.micro_batches
    Schedule.micro_batches = lambda self, rows, tokens, epoch, rank=0: original(self, rows, tokens, epoch, 0)


@sabotage("same rows every epoch", f"{PACKING}::test_epochs_differ_in_content_but_not_in_number")
def _() -> None:
    from glmft.data import packing

    original = packing.plan_rows
    packing.plan_rows = lambda lengths, budget, seed, epoch: original(lengths, budget, seed, 0)


@sabotage("half the adapter's keys dropped", f"{STRATEGIES}::test_the_adapter_on_disk_is_the_adapter_and_nothing_else")
def _() -> None:
    from safetensors.torch import load_file, save_file

    from glmft.strategies import lora

    original = lora.save_adapter

    def half(model, folder, card):
        original(model, folder, card)
        file = folder / "adapter_model.safetensors"
        save_file(dict(list(load_file(file).items())[::2]), file)

    lora.save_adapter = half


@sabotage("adapter loaded unchecked", f"{STRATEGIES}::test_damaged_adapters_are_never_half_loaded")
def _() -> None:
    from peft import PeftModel

    from glmft.strategies import adapter

    adapter.load_adapter = lambda model, folder: PeftModel.from_pretrained(model, str(folder))


@sabotage("disable_adapter without effect", BASE_ANSWERS)
def _() -> None:
    from glmft.strategies.lora import LoRA

    LoRA.base_model = lambda self, model: contextlib.nullcontext(model)


@sabotage("lean forward ignores the switch", BASE_ANSWERS)
def _() -> None:
    from glmft.kernels import lora

    lora.is_plain = lambda layer: True


@sabotage("text parsed for control tokens", f"{TOKENIZER}::test_text_never_becomes_a_control_token")
def _() -> None:
    from glmft.models.tokenizer import ChatGLM3Tokenizer

    original = ChatGLM3Tokenizer.encode

    def parsing(self, text):
        head, found, tail = text.partition("sop")
        return original(self, head) + [self.control_ids["sop"]] * bool(found) + (original(self, tail) if tail else [])

    ChatGLM3Tokenizer.encode = parsing


@sabotage("the prompt is supervised", f"{TOKENIZER}::test_training_and_inference_share_one_encoder")
def _() -> None:
    from glmft.messages import Sample
    from glmft.models.tokenizer import ChatGLM3Tokenizer

    after(ChatGLM3Tokenizer, "encode_conversation", lambda s: Sample(s.input_ids, [(0, len(s))], s.source))


@sabotage("a cut answer teaches the end", f"{ENCODING}::test_a_cut_answer_does_not_teach_the_end")
def _() -> None:
    from glmft.data import encoding

    def taught(limited):
        for sample in limited[0]:
            sample.input_ids[-1] = 2
        return limited

    after(encoding, "limit_length", taught)


@sabotage("a cut leaves questions behind", f"{ENCODING}::test_nothing_stands_behind_the_last_learned_token")
def _() -> None:
    from glmft.data import encoding
    from glmft.messages import Sample

    original = encoding.limit_length

    def longer(sample, conversation, tokenizer, max_length, policy):
        samples, event = original(sample, conversation, tokenizer, max_length, policy)
        return [Sample(sample.input_ids[:max_length], s.supervised) for s in samples], event

    encoding.limit_length = longer


@sabotage("history is learned all the same", f"{ENCODING}::test_mask_history_learns_only_the_last_round")
def _() -> None:
    from glmft.data import encoding

    encoding.supervise = lambda conversation, *policies: conversation


@sabotage("tokens of other policies are used", f"{PREPARATION}::test_what_decides_the_ids_decides_the_file")
def _() -> None:
    from glmft.data import preparation
    from glmft.data.encoding import Policies

    original = preparation.key_of
    preparation.key_of = lambda entry, tokenizer, policies: original(entry, tokenizer, Policies())


@sabotage("chunks of processes out of order", f"{PREPARATION}::test_several_processes_give_the_same_file")
def _() -> None:
    from glmft.data import preparation

    original = preparation._in_processes
    preparation._in_processes = lambda *a: reversed(list(original(*a)))


@sabotage("replayed answers are not mixed in", "test_verdict.py::test_own_answers_mixed_in_keep_the_rest[0]")
def _() -> None:
    from glmft.data import corpus

    corpus._replayed = lambda *a: None


@sabotage(
    "the verdict looks at the tuned model twice",
    "test_verdict.py::test_five_records_at_a_high_rate_are_learned_and_the_rest_is_forgotten[0]",
)
def _() -> None:
    from glmft.strategies.lora import LoRA

    LoRA.base_model = lambda self, model: contextlib.nullcontext(model)


@sabotage("small tensors are read from the start", "test_checkpoints.py::test_what_goes_in_comes_out")
def _() -> None:
    from glmft import checkpoints

    original = checkpoints.pack_tensors

    def shifted(tree):
        packed = original(tree)
        return packed | {"small": {d: t.roll(1) for d, t in packed["small"].items()}}

    checkpoints.pack_tensors = shifted


@sabotage("q, k, v rows in another order", f"{LOADING}::test_logits_loss_and_gradients_equal_the_published_model")
def _() -> None:
    from glmft.models.conversion import SplitQKV

    original = SplitQKV.convert

    def swapped(self, input_dict, target_patterns, **kwargs):
        q, k, v = target_patterns
        return original(self, input_dict, target_patterns=[q, v, k], **kwargs)

    SplitQKV.convert = swapped


@sabotage("padding mask ignored", f"{KERNELS}::test_attention_with_left_padding_equals_sdpa")
def _() -> None:
    from glmft.kernels import attention

    attention._mask = lambda *args, **kwargs: None


@sabotage("rotary frequencies in bf16", f"{MODULE}::test_precision_casts_nothing")
def _() -> None:
    from glmft.precision import LoadedPrecision

    LoadedPrecision.convert_module = lambda self, module: module.to(torch.bfloat16)


@sabotage("checkpoint loaded unchecked", f"{MODULE}::test_a_checkpoint_holds_what_was_trained_and_nothing_else")
def _() -> None:
    from glmft.module import FineTuner

    FineTuner.load_state_dict = lambda self, state, strict=True, assign=False: None


@sabotage("no guard before the step", f"{MODULE}::test_a_loss_that_is_not_finite_stops_before_the_weights_change")
def _() -> None:
    from glmft.module import FineTuner

    FineTuner._guard = lambda self, loss, grad_norm: None


@sabotage(
    "the update is not left out on the device",
    f"{MODULE}::test_a_loss_that_is_not_finite_stops_before_the_weights_change",
)
def _() -> None:
    from glmft.module import FineTuner

    original = FineTuner.configure_gradient_clipping

    def applied(self, optimizer, *args, **kwargs):
        original(self, optimizer, *args, **kwargs)
        optimizer.found_inf.zero_()

    FineTuner.configure_gradient_clipping = applied


@sabotage("loader restarts at 0", RESUME, f"{LOADER}::test_the_rest_is_the_same")
def _() -> None:
    from glmft.data.datamodule import EpochPlan

    after(EpochPlan, "position", lambda at: (at[0], 0))


@sabotage("the order does not follow the epoch", f"{LOADER}::test_epochs_differ")
def _() -> None:
    from glmft.data.datamodule import EpochPlan

    original = EpochPlan._rows
    EpochPlan._rows = lambda self, epoch: original(self, 0)


@sabotage("a rank without data", "data/test_packing.py::test_no_rank_is_without_data")
def _() -> None:
    from glmft.data import packing

    packing._divided = lambda step, wanted: [list(row) for row in step]


@sabotage("dropout not seeded by position", RESUME)
def _() -> None:
    from glmft.module import FineTuner

    def unseeded(self, batch, batch_idx):
        self.step_metrics = None

    FineTuner.on_train_batch_start = unseeded


def avx512_bf16() -> bool:
    """The CPU on which bitsandbytes repacks weights."""
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


if avx512_bf16():

    @sabotage("4-bit weights repacked", f"{STRATEGIES}::test_validation_changes_no_gradient_of_qlora")
    def _() -> None:
        from glmft.strategies import qlora

        qlora.keep_weights_in_place = lambda model: None


class Outcomes:
    """Pytest plugin that keeps which tests failed, were skipped, or passed."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/").partition("[")[0]
        if report.failed or (report.when == "call" and self.seen.get(name) != "failed") or report.skipped:
            self.seen[name] = "failed" if self.seen.get(name) == "failed" else report.outcome


def attempt(breaks: Callable[[], None], invariants: list[str]) -> dict[str, str]:
    """The outcome of each invariant under a sabotage, in a process of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        outcomes = Outcomes()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            breaks()
            pytest.main(["-q", "-p", "no:cacheprovider", *(f"{ROOT}/tests/{i}" for i in invariants)], [outcomes])
        os.write(write, repr(outcomes.seen).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    import ast

    return dict(ast.literal_eval(told or "{}"))


def main() -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))
    unnoticed = 0
    print(f"{'sabotage':36}invariant that must fail")
    for name, (breaks, invariants) in SABOTAGES.items():
        seen = attempt(breaks, invariants)
        for i in invariants:
            outcome = seen.get(i.partition("[")[0], "not run")
            noticed = outcome in ("failed", "skipped")
            unnoticed += not noticed
            cell = {"failed": "fails", "skipped": "skipped (reference data absent)"}.get(outcome, f"EMPTY ({outcome})")
            print(f"{name:36}{i.rpartition('::')[2]:70}{cell}", flush=True)
    print(f"{len(SABOTAGES)} sabotages, {unnoticed} unnoticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
