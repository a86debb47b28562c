"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its variants, through PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from glmft.errors import nearest
from glmft.kernels.lora import use_lean_forward
from glmft.models.published import PublishedConfig, linear_shapes
from glmft.models.tokenizer import ChatGLM3Tokenizer
from glmft.schema import Positive, Rate, Share
from glmft.strategies.adapter import save_adapter
from glmft.strategies.base import Strategy
from glmft.strategies.combining import MOVE_THE_BASE

PRESETS = {
    "attention": ["q_proj", "k_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
InitWeights = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]


class LoRA(Strategy):
    """Low-rank adapters on frozen weights: W x + (alpha / r) B A x.

    Args:
        r: rank.
        alpha: scaling, applied as alpha / r.
        dropout: share of the adapter's inputs that is dropped while training.
        targets: linear layers that get an adapter: "all", "attention" (q, k, v), or a list of names.
        use_rslora: scale by alpha / sqrt(r) (arXiv:2312.03732).
        use_dora: learn the magnitude of each weight row too (arXiv:2402.09353).
        init_weights: start of A and B; "pissa" takes the principal singular vectors (arXiv:2404.02948).
    """

    output = "adapter"

    def __init__(
        self,
        r: Positive = 8,
        alpha: Rate = 16,
        dropout: Share = 0.0,
        targets: Literal["all", "attention"] | list[str] = "all",
        use_rslora: bool = False,
        use_dora: bool = False,
        init_weights: InitWeights = "default",
    ) -> None:
        self.targets = PRESETS[targets] if isinstance(targets, str) else list(targets)
        self.config = LoraConfig(
            r=r,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=self.targets,
            use_rslora=use_rslora,
            use_dora=use_dora,
            init_lora_weights=True if init_weights == "default" else init_weights,
            task_type="CAUSAL_LM",
        )

    def check(self, config: PublishedConfig) -> list[str]:
        shapes = linear_shapes(config)
        problems = [
            f"strategy.targets: the model has no linear layer '{t}'{nearest(t, shapes)} (it has {', '.join(shapes)})"
            for t in self.targets
            if t not in shapes
        ]
        smallest = min((min(shapes[t]) for t in self.targets if t in shapes), default=0)
        if self.config.init_lora_weights == "orthogonal" and self.config.r % 2:
            problems.append(f"strategy.r={self.config.r}: strategy.init_weights=orthogonal needs an even rank")
        if not self.targets:
            problems.append("strategy.targets is empty: nothing would learn")
        elif smallest and self.config.r > smallest:
            problems.append(f"strategy.r={self.config.r}: a target layer is only {smallest} wide")
        return problems

    def apply(self, model: nn.Module) -> nn.Module:
        tuned = get_peft_model(model, self.config)  # type: ignore[arg-type]
        use_lean_forward(tuned)
        return tuned

    @contextmanager
    def base_model(self, model: nn.Module) -> Iterator[nn.Module | None]:
        assert isinstance(model, PeftModel)
        if self.config.init_lora_weights in MOVE_THE_BASE:
            yield None
            return
        with model.disable_adapter():
            yield model

    def save(self, model: nn.Module, folder: Path, tokenizer: ChatGLM3Tokenizer, card: str) -> None:
        assert isinstance(model, PeftModel)
        save_adapter(model, folder, card)
