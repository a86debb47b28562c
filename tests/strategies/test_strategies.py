from __future__ import annotations

import functools

import bitsandbytes as bnb
import lightning as L
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file

from glmft import optim
from glmft.data.collate import Batch, pad
from glmft.data.datamodule import InstructionData
from glmft.errors import DamagedError, ProblemList, UserError
from glmft.messages import Message
from glmft.models import load_model, load_tokenizer
from glmft.models.generation import answer
from glmft.models.published import read_config
from glmft.module import FineTuner
from glmft.precision import plugin
from glmft.strategies.adapter import load_adapter, save_adapter
from glmft.strategies.freeze import Freeze
from glmft.strategies.full import Full
from glmft.strategies.lora import PRESETS, LoRA
from glmft.strategies.qlora import QLoRA

QUESTIONS = [(Message("user", q),) for q in ("你是谁？", "Who are you?", "法国的首都是哪里？", "What is 3 plus 5?")]


@pytest.fixture(scope="module")
def data(tiny) -> InstructionData:
    return InstructionData(str(tiny), datasets=["tiny_identity"], max_length=128, max_samples=40, tokens_per_step=512)


def fitted(tiny, data, strategy, steps: int = 6, lr: float = 1e-2) -> FineTuner:
    torch.manual_seed(0)
    module = FineTuner(str(tiny), strategy, functools.partial(optim.adamw, lr=lr), functools.partial(optim.constant))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fit = L.Trainer(
        accelerator="cpu", plugins=plugin("32-true"), max_steps=steps, use_distributed_sampler=False, **quiet
    )
    fit.fit(module, data)
    return module


def perturb(model) -> None:
    """Adapters as after training: B is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)


def batch_of(data: InstructionData, n: int = 8) -> Batch:
    return Batch(**pad([data.corpus.train[i] for i in range(n)], step_tokens=1))


def adapter_gradients(module: FineTuner, batch: Batch) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module.loss_sum(batch).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"init_weights": "pissa"}])
def test_lora_variants_learn(tiny, data, options):
    module = fitted(tiny, data, LoRA(r=4, targets="attention", **options), steps=8, lr=3e-3)
    assert all("lora_" in n for n in module.trained_parameters)
    fresh = FineTuner(str(tiny), Full(), None, None)
    fresh.network = load_model(tiny, dtype="float32")
    assert module.loss_sum(batch_of(data)) < fresh.loss_sum(batch_of(data)) * 0.9


def test_the_adapter_on_disk_is_the_adapter_and_nothing_else(tiny, data, tmp_path):
    module = fitted(tiny, data, LoRA(r=4, targets=["q_proj", "down_proj"]))
    module.tuning.save(module.network, tmp_path / "a", module.tokenizer, "card")
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    expected = {
        f"base_model.model.model.layers.{n}.{t}.lora_{ab}.weight"
        for n in range(4)
        for t in ("self_attn.q_proj", "mlp.down_proj")
        for ab in "AB"
    }
    assert set(state) == expected
    assert (tmp_path / "a" / "README.md").read_text() == "card"
    again = load_adapter(load_model(tiny, dtype="float32"), tmp_path / "a").eval()
    tokenizer = load_tokenizer(tiny)
    assert answer(again, tokenizer, QUESTIONS, 24) == answer(module.network, tokenizer, QUESTIONS, 24)


def test_base_answers_come_from_the_same_weights(tiny, data):
    """With the adapter off, answers equal a model that never had one; with it on, they differ."""
    module = fitted(tiny, data, LoRA())
    tokenizer = load_tokenizer(tiny)
    untouched = answer(load_model(tiny, dtype="float32"), tokenizer, QUESTIONS, 24)
    with module.tuning.base_model(module.network) as base:
        assert answer(base, tokenizer, QUESTIONS, 24) == untouched
        base.train()  # the lean forward is for training: it must see the switch too
        rows = base.get_base_model().model(input_ids=torch.arange(5)[None]).last_hidden_state
    plain = load_model(tiny, dtype="float32").model(input_ids=torch.arange(5)[None]).last_hidden_state
    assert torch.equal(rows, plain)
    assert answer(module.network, tokenizer, QUESTIONS, 24) != untouched


def test_lean_forward_equals_pefts_own(tiny, data):
    """Loss equal and gradients equal in fp64, and only the plain case goes the lean way."""
    from peft.tuners.lora.layer import LoraLayer

    from glmft.kernels.lora import is_plain

    model = load_model(tiny, dtype="float32")
    module = FineTuner(str(tiny), LoRA(), None, None)
    module.network = module.tuning.apply(model).double().train()
    perturb(module.network)
    layers = [m for m in module.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 24
    assert all(is_plain(m) for m in layers)
    lean = adapter_gradients(module, batch_of(data))
    for layer in layers:
        del layer.forward
    own = adapter_gradients(module, batch_of(data))
    assert own.keys() == lean.keys()
    for name, grad in own.items():
        assert (grad - lean[name]).norm() <= 1e-12 * grad.norm().clamp(min=1e-30), name


def test_validation_changes_no_gradient_of_qlora(tiny, data):
    """bitsandbytes repacks 4-bit weights in eval mode on some CPUs; ours stay in place."""
    module = FineTuner(str(tiny), QLoRA(), None, None)
    quantization = module.tuning.quantization(torch.float32)
    module.network = module.tuning.apply(load_model(tiny, dtype="float32", quantization=quantization)).train()
    perturb(module.network)
    before = adapter_gradients(module, batch_of(data))
    assert len(before) == 48
    module.eval()
    with torch.no_grad():
        module.loss_sum(batch_of(data))
    module.train()
    after = adapter_gradients(module, batch_of(data))
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_qlora_equals_lora_on_the_dequantised_weights(tiny, data):
    quantised = FineTuner(str(tiny), QLoRA(), None, None)
    options = quantised.tuning.quantization(torch.float32)
    quantised.network = quantised.tuning.apply(load_model(tiny, dtype="float32", quantization=options)).train()
    perturb(quantised.network)
    plain = FineTuner(str(tiny), LoRA(), None, None)
    plain.network = plain.tuning.apply(load_model(tiny, dtype="float32")).train()
    perturb(plain.network)
    layers = dict(plain.network.named_modules())
    swapped = 0
    for name, layer in quantised.network.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weights = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert not torch.equal(layers[name].weight, weights)
            layers[name].weight.data.copy_(weights)
            swapped += 1
    assert swapped == 24
    a, b = quantised.loss_sum(batch_of(data)), plain.loss_sum(batch_of(data))
    assert abs(a - b) <= 1e-6 * abs(b)


def test_freeze_trains_the_last_layers(tiny, data):
    module = fitted(tiny, data, Freeze(num_layers=1), steps=2)
    assert all(".layers.3." in n for n in module.trained_parameters)
    config, _ = read_config(tiny)
    assert Freeze(num_layers=9).check(config) == ["strategy.num_layers=9: the model has 4 layers"]


def test_full_writes_a_model_that_loads(tiny, data, tmp_path):
    module = fitted(tiny, data, Full(), steps=2, lr=1e-4)
    module.tuning.save(module.network, tmp_path / "model", module.tokenizer, "card")
    again = load_model(tmp_path / "model")
    assert torch.equal(again.lm_head.weight, module.network.lm_head.weight)
    load_tokenizer(tmp_path / "model")


def test_targets_are_checked_against_the_model(tiny):
    config, _ = read_config(tiny)
    assert LoRA(targets="all").check(config) == []
    assert set(PRESETS["all"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    (problem,) = LoRA(targets=["q_prog"]).check(config)
    assert "no linear layer 'q_prog', did you mean 'q_proj'?" in problem
    assert "only 64 wide" in LoRA(r=65).check(config)[0]
    assert "nothing would learn" in LoRA(targets=[]).check(config)[0]


def test_pissa_has_no_base_in_its_weights(tiny):
    strategy = LoRA(init_weights="pissa")
    model = strategy.apply(load_model(tiny, dtype="float32"))
    with strategy.base_model(model) as base:
        assert base is None
    config, _ = read_config(tiny)
    assert "even rank" in LoRA(r=3, init_weights="orthogonal").check(config)[0]


def test_damaged_adapters_are_never_half_loaded(tiny, data, tmp_path):
    model = LoRA(r=4).apply(load_model(tiny, dtype="float32"))
    save_adapter(model, tmp_path, "card")
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    half = dict(list(state.items())[::2])
    save_file(half, file)
    with pytest.raises(ProblemList, match=r"missing .*lora_"):
        load_adapter(load_model(tiny), tmp_path)
    save_file(state | {"other": torch.zeros(2)}, file)
    with pytest.raises(ProblemList, match="unexpected other"):
        load_adapter(load_model(tiny), tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamagedError, match="cannot be read"):
        load_adapter(load_model(tiny), tmp_path)
    with pytest.raises(UserError, match="not an adapter folder"):
        load_adapter(load_model(tiny), tmp_path / "nothing")
