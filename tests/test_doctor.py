"""The doctor: every broken thing is a finding with a fix, and nothing breaks the doctor."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest

from glmft import doctor
from glmft.checks import machine, model, services
from glmft.checks.finding import Finding, Text, guarded
from glmft.errors import ResourceError
from glmft.precision import check_fp32_fits

pytestmark = pytest.mark.share("fifteen minutes")
H100 = {
    **{"device": "cuda", "cuda_build": "13.0", "torch": "2.11.0+cu130", "capability": [9, 0]},
    **{"arch_list": ["sm_80", "sm_90"], "free_gib": 79.0, "total_gib": 80.0},
    "tests": dict.fromkeys(("fp32", "4bit", "compile", "bf16", "fp8"), ""),
}


@pytest.fixture
def gpu(monkeypatch):
    """The findings on a machine of which nvidia-smi and the probe say this."""

    def findings(driver: str = "580.65.06", **facts) -> list[Finding]:
        monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("NVIDIA H100 80GB HBM3", driver, "81559 MiB")])
        monkeypatch.setattr(machine, "probe", lambda: H100 | facts)
        monkeypatch.setattr(machine, "output", lambda *a, **k: "")
        return list(machine.check_gpu())

    return findings


def bad(findings: list[Finding]) -> dict[str, tuple[str, str]]:
    return {f.name.en: (f.says.en, f.fix.en if f.fix else "") for f in findings if f.ok is False}


def test_a_machine_without_a_gpu_is_well(tiny, tmp_path, monkeypatch, capsys):
    """The real checks: kernels and 4 bit run on the CPU in a process of their own."""
    monkeypatch.chdir(tmp_path)
    assert doctor.main(["--model", str(tiny), "--answer", "--lang", "en"]) == 0
    out = capsys.readouterr().out
    assert "none: the CPU is enough" in out
    assert out.count("runs and is right") == 2
    assert "1209 tokens; text comes back unchanged" in out
    assert "你好 → 你好，有什么可以帮你？" in out
    assert 'eval "$(glmft --completion)"' in out
    assert out.endswith("all is well\n")


def test_chinese_and_json(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "probe", lambda: {"device": "cpu", "tests": {"fp32": ""}})
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert doctor.main(["--model", str(tiny), "--json", "--data", "tiny", "missing"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {f["name"] for f in found} >= {"核函数", "磁盘（工作目录）", "模型", "分词器", "数据集"}
    (miss,) = [f for f in found if f["ok"] is False]
    assert "'missing' is in no registry" in miss["says"]


def test_all_is_green_on_a_good_gpu(gpu):
    findings = gpu()
    assert bad(findings) == {}
    assert sum(f.ok is True for f in findings) == 8


def test_an_old_driver_gets_a_build_that_runs_on_it(gpu):
    says, fix = bad(gpu(driver="535.104.05", device="cpu", tests={"fp32": ""}))["CUDA build"]
    assert "needs driver 580 or newer, this machine has 535.104.05" in says
    assert "--torch-backend=cu126" in fix


def test_a_build_for_other_cards(gpu):
    error = "AcceleratorError: CUDA error: no kernel image is available for execution on the device"
    found = bad(gpu(capability=[7, 0], arch_list=["sm_75", "sm_80", "sm_90"], tests={"fp32": error}))
    assert "the card is sm_70" in found["architecture"][0]
    assert "--torch-backend=cu126" in found["architecture"][1]
    assert "--reinstall torch" in found["kernel"][1]


def test_a_stale_triton_cache(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache/triton")
    error = "RuntimeError: Triton Error [CUDA]: device kernel image is invalid"
    assert bad(gpu(tests={"fp32": "", "compile": error}))["compiler (Triton)"][1] == (
        "a stale Triton cache: rm -r /cache/triton"
    )


def test_a_cpu_build_on_a_gpu_machine(gpu):
    assert "built without CUDA" in bad(gpu(cuda_build=None, device="cpu", tests={}))["CUDA build"][0]


def test_a_card_without_bf16_is_told_what_to_use(gpu):
    findings = gpu(capability=[7, 5], arch_list=["sm_75"], tests={"fp32": "", "4bit": ""})
    (bf16,) = [f for f in findings if f.name.en == "bf16"]
    assert bf16.ok is None
    assert bf16.fix and "strategy=qlora" in bf16.fix.en
    assert bad(findings) == {}


def test_a_full_gpu(gpu):
    assert "CUDA_VISIBLE_DEVICES" in bad(gpu(free_gib=1.5))["GPU memory"][1]


def test_torch_that_does_not_start(monkeypatch):
    monkeypatch.setattr(machine.sys, "executable", shutil.which("false"))
    assert "torch does not start" in bad(list(machine.check_gpu()))["GPU"][0]


def test_a_full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda p: usage(100, 100, 2**28))
    found = bad(list(machine.check_disk()))
    assert "0.2 GiB free" in found["disk (working directory)"][0]


def test_a_truncated_shard(tiny_copy):
    file = tiny_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    says, fix = bad(list(model.check_model(str(tiny_copy), answer=True)))["model"]
    assert "a truncated download" in says
    assert "fetch" in fix


def test_a_tokenizer_of_another_model(tiny_copy):
    from sentencepiece import SentencePieceTrainer

    (tiny_copy / "text.txt").write_text("\n".join(f"some text {i}" for i in range(200)))
    SentencePieceTrainer.train(
        input=str(tiny_copy / "text.txt"), model_prefix=str(tiny_copy / "tokenizer"), vocab_size=30, minloglevel=2
    )
    assert "this is not the model's tokenizer" in bad(list(model.check_model(str(tiny_copy), False)))["tokenizer"][0]


def test_a_hash_that_was_recorded_is_compared(tiny_copy):
    folder = tiny_copy / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.metadata").write_text("commit\n" + "0" * 64 + "\n1.0\n")
    assert "model.safetensors" in bad(list(model.check_model(str(tiny_copy), False)))["hashes"][0]


def test_a_missing_model_gets_its_download_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, fix = bad(list(model.check_model("zai-org/chatglm3-6b", False)))["model"]
    assert "hf download zai-org/chatglm3-6b" in fix
    assert "modelscope download --model ZhipuAI/chatglm3-6b" in fix


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1 does not answer" in bad(list(services.check_hub(needed=True)))["hub"][0]
    assert bad(list(services.check_hub(needed=False))) == {}


def test_a_check_that_breaks_is_a_finding():
    (finding,) = guarded(Text("x", "x"), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert finding.ok is False
    assert "ZeroDivisionError" in finding.says.en


def test_fp32_that_does_not_fit_is_refused_with_what_does():
    check_fp32_fits(6_243_584_000, 32 * 2**30)
    with pytest.raises(ResourceError, match="strategy=qlora keeps the base in 4 bit"):
        check_fp32_fits(6_243_584_000, 16 * 2**30)
