"""The machine: driver, CUDA build and card against each other by running kernels; memory, disk, folders that go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmft.caches import cache_dir
from glmft.checks.finding import Finding, Text, both
from glmft.runs import gpu_rows, output

MIN_DRIVER = {11: 450, 12: 525, 13: 580}  # NVIDIA's minor-version compatibility, by CUDA major version
IMAGE_ERRORS = ("kernel image", "no kernel image", "invalid device function", "PTX", "unsupported toolchain")
MIN_DISK_GIB, MODEL_GIB = 1.0, 12.5
FOLDERS = {  # a folder that tells a kind of machine -> what is kept there
    "/root/autodl-tmp": Text("AutoDL keeps /root/autodl-tmp: work there", "AutoDL 保留 /root/autodl-tmp：请在其中工作"),
    "/content/sample_data": Text("Colab keeps nothing but a mounted drive", "Colab 只保留挂载的网盘"),
    "/kaggle/working": Text("Kaggle keeps /kaggle/working: work there", "Kaggle 保留 /kaggle/working：请在其中工作"),
}


@dataclass(frozen=True)
class Gpu:
    """A row of nvidia-smi."""

    name: str
    driver: str
    memory: str


def gpus() -> list[Gpu]:
    """What nvidia-smi lists."""
    rows = [[c.strip() for c in line.split(",")] for line in gpu_rows()]
    return [Gpu(name, driver, memory) for name, _, driver, memory in (row for row in rows if len(row) == 4)]


def probe() -> dict[str, Any]:
    """What `glmft.checks.probe` prints, or {"crash": reason}."""
    try:
        done = subprocess.run([sys.executable, "-m", "glmft.checks.probe"], capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as e:
        return {"crash": str(e)}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        return {"crash": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def check_gpu() -> Iterator[Finding]:
    """Driver, build, architecture, kernels, precision, memory."""
    name = both("GPU")
    cards, facts = gpus(), probe()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "crash" in facts:
        yield Finding(
            name, False, Text(f"torch does not start: {facts['crash']}", f"torch 无法启动：{facts['crash']}"), REINSTALL
        )
        return
    if not cards:
        yield Finding(
            name, None, Text("none: the CPU is enough for the embedded model", "没有：自带的微型模型用 CPU 就够")
        )
        yield from check_kernels(facts, "")
        return
    driver = cards[0].driver
    yield Finding(name, True, both(f"{len(cards)} × {cards[0].name}, driver {driver}"))
    if visible is not None:
        yield Finding(both("CUDA_VISIBLE_DEVICES"), visible != "" or None, both(visible))
    yield from check_build(facts, driver)
    yield from check_kernels(facts, driver)
    if facts["device"] == "cuda":
        yield check_memory(facts)


REINSTALL = both("uv pip install --reinstall torch --torch-backend=auto")


def check_build(facts: dict[str, Any], driver: str) -> Iterator[Finding]:
    """The CUDA build of torch against driver and card."""
    name = Text("CUDA build", "CUDA 版本")
    build = facts["cuda_build"]
    if build is None:
        says = Text("torch was built without CUDA: the GPU is not used", "torch 不带 CUDA：不会使用 GPU")
        yield Finding(name, False, says, REINSTALL)
        return
    needed = MIN_DRIVER.get(int(build.split(".")[0]), 0)
    if int(driver.split(".")[0]) < needed:
        says = Text(
            f"torch for CUDA {build} needs driver {needed} or newer, this machine has {driver}",
            f"CUDA {build} 的 torch 需要 {needed} 或更新的驱动，本机为 {driver}",
        )
        older = max((v for v, d in MIN_DRIVER.items() if d <= int(driver.split(".")[0])), default=11)
        wheel = {11: "cu118", 12: "cu126", 13: "cu130"}[older]
        line = f"uv pip install --reinstall torch --torch-backend={wheel}"
        yield Finding(name, False, says, Text(f"update the driver, or: {line}", f"更新驱动，或：{line}"))
        return
    yield Finding(name, True, Text(f"torch {facts['torch']}, CUDA {build}", f"torch {facts['torch']}，CUDA {build}"))
    if facts["device"] != "cuda":
        says = Text("torch does not see the GPU", "torch 看不到 GPU")
        yield Finding(name, False, says, both("unset CUDA_VISIBLE_DEVICES; nvidia-smi"))
        return
    if not has_kernels(facts["capability"], facts["arch_list"]):
        major, minor = facts["capability"]
        card = f"sm_{major}{minor}"
        listed = ", ".join(facts["arch_list"])
        fix = "uv pip install --reinstall torch --torch-backend=" + ("cu126" if major < 8 else "auto")
        yield Finding(
            Text("architecture", "架构"),
            False,
            Text(f"the card is {card}, this torch has kernels for {listed}", f"显卡是 {card}，此 torch 只含 {listed}"),
            both(fix),
        )


def has_kernels(capability: list[int], arch_list: list[str]) -> bool:
    """A binary of the same major version and no newer minor one, or PTX that is not newer."""
    major, minor = capability
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        a, b = int(digits[:-1]), int(digits[-1])
        if (kind == "sm" and a == major and b <= minor) or (kind == "compute" and (a, b) <= (major, minor)):
            return True
    return False


KERNELS = {
    "fp32": Text("kernel", "核函数"),
    "bf16": both("bf16"),
    "fp8": both("FP8"),
    "4bit": Text("4 bit (bitsandbytes)", "4 bit（bitsandbytes）"),
    "compile": Text("compiler (Triton)", "编译器（Triton）"),
}


def check_kernels(facts: dict[str, Any], driver: str) -> Iterator[Finding]:
    """What was run on the device."""
    works = Text("runs and is right", "运行正确")
    for test, name in KERNELS.items():
        error = facts["tests"].get(test)
        if error is None:
            if facts["device"] == "cuda" and test in ("bf16", "fp8"):
                yield _lacks(name, test)
        elif not error:
            yield Finding(name, True, works)
        else:
            yield Finding(name, False, both(error.splitlines()[0][:200]), _kernel_fix(test, error, facts, driver))


def _lacks(name: Text, test: str) -> Finding:
    if test == "fp8":
        return Finding(name, None, Text("not on this card (8.9 and above)", "此卡没有（需要 8.9 以上）"))
    return Finding(
        name,
        None,
        Text("not on this card: trainer.precision=auto takes 32-true", "此卡没有：trainer.precision=auto 使用 32-true"),
        Text("strategy=qlora keeps the base in 4 bit", "strategy=qlora 以 4 bit 保存底座"),
    )


def _kernel_fix(test: str, error: str, facts: dict[str, Any], driver: str) -> Text:
    if any(words in error for words in IMAGE_ERRORS):
        if not has_kernels(facts["capability"], facts["arch_list"]):
            return REINSTALL
        if driver and int(driver.split(".")[0]) < MIN_DRIVER.get(int(facts["cuda_build"].split(".")[0]), 0):
            return Text("the driver is older than the build: update it", "驱动比 torch 旧：请更新驱动")
        folder = os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")
        return Text(f"a stale Triton cache: rm -r {folder}", f"Triton 缓存过期：rm -r {folder}")
    if test == "4bit":
        return both("pip install --upgrade bitsandbytes")
    if test == "compile":
        return Text("a C compiler is needed: apt-get install gcc", "需要 C 编译器：apt-get install gcc")
    return REINSTALL


def check_memory(facts: dict[str, Any]) -> Finding:
    """Free GPU memory, and who holds the rest."""
    name = Text("GPU memory", "显存")
    free, total = facts["free_gib"], facts["total_gib"]
    holders = output(["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"])
    others = "; ".join(line.strip() for line in (holders or "").splitlines() if line.strip())
    says = f"{free:.1f} / {total:.1f} GiB" + (f" ({others})" if others else "")
    if free < 6:
        fix = Text(
            "end the processes above, or choose a card: CUDA_VISIBLE_DEVICES=1",
            "结束上述进程，或换卡：CUDA_VISIBLE_DEVICES=1",
        )
        return Finding(name, False, both(says), fix)
    return Finding(name, True, both(says))


def check_disk() -> Iterator[Finding]:
    """Free space where runs and caches go, and folders that this kind of machine loses."""
    for name, folder in (
        (Text("disk (working directory)", "磁盘（工作目录）"), Path.cwd()),
        (Text("disk (cache)", "磁盘（缓存）"), cache_dir()),
    ):
        place = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(place).free / 2**30
        says = Text(f"{free:.1f} GiB free, {folder}", f"剩余 {free:.1f} GiB，{folder}")
        if free < MIN_DISK_GIB:
            fix = Text(
                "free some space, or paths.output_dir / GLMFT_CACHE on another disk",
                "清理空间，或把 paths.output_dir / GLMFT_CACHE 放到别的盘",
            )
            yield Finding(name, False, says, fix)
        elif free < MODEL_GIB:
            note = Text(f"ChatGLM3-6B needs {MODEL_GIB} GiB", f"ChatGLM3-6B 需要 {MODEL_GIB} GiB")
            yield Finding(name, None, says, note)
        else:
            yield Finding(name, True, says)
        if not os.access(place, os.W_OK):
            yield Finding(name, False, Text(f"{place} cannot be written", f"{place} 不可写"))
    lost = Text("kept folders", "保留的目录")
    for marker, says in FOLDERS.items():
        if Path(marker).is_dir():
            inside = Path.cwd().is_relative_to(marker) if marker != "/content/sample_data" else False
            yield Finding(lost, inside or None, says)
    if file_system(Path.cwd()) in ("overlay", "tmpfs"):
        yield Finding(
            lost,
            None,
            Text("the working directory goes with this container", "工作目录会随此容器消失"),
            Text("paths.output_dir=/a/mounted/disk/runs", "paths.output_dir=/挂载的磁盘/runs"),
        )


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder (Linux), or an empty string."""
    mounts = Path("/proc/mounts")
    best, kind = "", ""
    for line in mounts.read_text().splitlines() if mounts.is_file() else []:
        _, point, this, *_ = line.split()
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, this
    return kind
