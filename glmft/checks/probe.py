"""Runs small kernels and prints what worked, as JSON: its own process, since a broken build can end the process.

python -m glmft.checks.probe
"""

from __future__ import annotations

import json
from collections.abc import Callable


def matmul(device: str, dtype: str) -> None:
    """A product that is known: ones [64, 64] @ ones [64, 64] = 64."""
    import torch

    a = torch.ones(64, 64, device=device, dtype=getattr(torch, dtype))
    assert bool(((a @ a) == 64).all()), "a wrong product"


def compiled(device: str) -> None:
    """A kernel that Triton builds here."""
    import torch

    x = torch.arange(1024.0, device=device)
    double = torch.compile(lambda t: t * 2 + 1)
    assert bool((double(x) == x * 2 + 1).all()), "a wrong result"


def fp8(device: str) -> None:
    """A scaled e4m3 product."""
    import torch

    a = torch.ones(64, 64, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    out = torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    assert bool((out == 64).all()), "a wrong product"


def four_bit(device: str) -> None:
    """A linear layer in NF4 stays within its quantisation error."""
    import bitsandbytes as bnb
    import torch

    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    x = torch.randn(8, 64)
    error = (layer.to(device)(x.to(device)).cpu() - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert error < 0.2, f"relative error {error:.2f}"


def main() -> None:
    import torch

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    tests: dict[str, Callable[[], None]] = {
        "fp32": lambda: matmul(device, "float32"),
        "4bit": lambda: four_bit(device),
    }
    facts: dict[str, object] = {"device": device, "cuda_build": torch.version.cuda, "torch": torch.__version__}
    if gpu:
        capability = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        facts |= {
            "capability": list(capability),
            "arch_list": torch.cuda.get_arch_list(),
            "free_gib": free / 2**30,
            "total_gib": total / 2**30,
        }
        tests["compile"] = lambda: compiled(device)
        if capability >= (8, 0):
            tests["bf16"] = lambda: matmul(device, "bfloat16")
        if capability >= (8, 9):
            tests["fp8"] = lambda: fp8(device)
    outcomes: dict[str, str] = {}
    for name, test in tests.items():
        try:
            test()
            outcomes[name] = ""
        except Exception as e:
            outcomes[name] = f"{type(e).__name__}: {e}"
    print(json.dumps(facts | {"tests": outcomes}))


if __name__ == "__main__":
    main()
