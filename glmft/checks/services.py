"""What lies outside the process: data sets, hubs, W&B, tab completion."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlparse

from glmft.checks.finding import Finding, Text, both
from glmft.data.registry import PACKAGED, REGISTRY, find_dataset
from glmft.errors import UserError
from glmft.loggers import connects, reachable

HF, MODELSCOPE = "https://huggingface.co", "https://www.modelscope.cn"


def check_data(names: Sequence[str]) -> Iterator[Finding]:
    """The registries that are read, and the data sets asked for."""
    name = Text("data sets", "数据集")
    found = [str(p) for p in (Path(REGISTRY), Path("data") / REGISTRY) if p.is_file()]
    packaged = Text("none here; the packaged examples are found", "此处没有；自带示例可用")
    assert (PACKAGED / REGISTRY).is_file()
    yield Finding(name, True if found else None, both(", ".join(found)) if found else packaged)
    for data_set in names:
        try:
            entry = find_dataset(data_set)
            yield Finding(name, True, both(f"{data_set}: {', '.join(map(str, entry.files[:3]))}"))
        except UserError as e:
            yield Finding(name, False, both(str(e)))


def check_hub(needed: bool) -> Iterator[Finding]:
    """Whether the hub that would be asked answers; no problem where the model is on this machine."""
    name = Text("hub", "模型库")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding(name, None, Text("HF_HUB_OFFLINE=1: not asked", "HF_HUB_OFFLINE=1：不访问"))
        return
    modelscope = os.environ.get("USE_MODELSCOPE_HUB") == "1"
    url = MODELSCOPE if modelscope else os.environ.get("HF_ENDPOINT", HF)
    host = urlparse(url).hostname or url
    if connects(url):
        yield Finding(name, True, Text(f"{host} answers", f"{host} 可以访问"))
        return
    yield Finding(
        name,
        False if needed else None,
        Text(f"{host} does not answer", f"{host} 无法访问"),
        Text(
            "HF_ENDPOINT=<a mirror>, USE_MODELSCOPE_HUB=1, or a local model.path (then HF_HUB_OFFLINE=1)",
            "设置 HF_ENDPOINT=镜像地址、USE_MODELSCOPE_HUB=1，或使用本地 model.path（并设 HF_HUB_OFFLINE=1）",
        ),
    )


def check_wandb() -> Iterator[Finding]:
    """Online with a key, else offline, which needs nothing."""
    name = both("W&B")
    if reachable():
        yield Finding(name, True, Text("key found, server answers", "有密钥，服务器可访问"))
    else:
        says = Text("no key or no server: logger=wandb logs offline", "没有密钥或无法访问：logger=wandb 离线记录")
        yield Finding(name, None, says, both("wandb login"))


def check_completion() -> Iterator[Finding]:
    """The line that turns tab completion on."""
    line = 'eval "$(glmft --completion)"'
    yield Finding(Text("tab completion", "Tab 补全"), None, both(line))
