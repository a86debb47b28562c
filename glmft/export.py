"""glmft export: an adapter merged into its base, as a model folder that loads everywhere; or the adapter itself, in the
layer names of either layout."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmft import __version__, console
from glmft.artefacts import check_absent, remove, verify_if_listed, write_folder
from glmft.caches import use_cache_dir
from glmft.errors import DamagedError, UserError
from glmft.files import read_json
from glmft.quiet import quiet_libraries

PROBE = ("你好", "Who are you?", "1+1=")

CARD = """---
base_model: {base}
library_name: transformers
tags: [chatglm3, glmft]
---

# {name}

`{base}` with what `{source}` learned, merged by glmft {version}; layout `{layout}`, {dtype}. It loads without remote
code.

{card}
{licence}"""


class Probe:
    """Logits of fixed prompts, to compare what is written with what it was made of.

    Args:
        tokenizer: of the model.
        device: where the models are.
    """

    def __init__(self, tokenizer: Any, device: str) -> None:
        import torch

        asked = ([{"role": "user", "content": prompt}] for prompt in PROBE)
        self.prompts = [torch.tensor([tokenizer.encode_prompt(messages)], device=device) for messages in asked]

    def logits(self, model: Any) -> list[Any]:
        """Of every prompt, [1, T, V] in fp32."""
        import torch

        with torch.inference_mode():
            return [model(input_ids=ids).logits.float() for ids in self.prompts]


def write_compared(
    target: Path, write: Any, facts: dict[str, Any], again: Any, wanted: list[Any], tolerance: float, needed: int = 0
) -> float:
    """Writes the folder and compares the logits of what is loaded `again` from it; the largest difference.

    Raises:
        ResourceError: not enough disk.
        DamagedError: they differ by more than `tolerance` of the largest logit. What was not compared, or failed, does
            not stay; Ctrl-C neither.
    """
    try:
        write_folder(target, write, facts, needed=needed)
        found = again()
        difference = max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))
        allowed = tolerance * max(float(w.abs().max()) for w in wanted)
        if not difference <= allowed:
            says = f"{target}: logits differ by {difference:.3g}, at most {allowed:.3g} was expected; removed"
            raise DamagedError(says)
    except BaseException:
        remove(target)
        raise
    return difference


def export(
    source: str, target: Path, base: str | None, layout: Any, dtype: str, device: str, shard_size: str = "2GB"
) -> dict[str, Any]:
    """Merges, writes the folder, loads it again and compares its logits with base and adapter together.

    Raises:
        UserError: the source cannot be exported, or the target exists.
        ResourceError: not enough disk.
        DamagedError: the folder does not answer as base and adapter do; it is removed.
    """
    from glmft.engine import checked_device, find_tuned
    from glmft.models.loading import glm, load_model
    from glmft.models.saving import LICENCE, save_model
    from glmft.models.tokenizer import load_tokenizer
    from glmft.strategies.adapter import load_adapter

    check_absent(target)
    tuned = find_tuned(source, base)
    device = checked_device(device)
    if tuned.model is not None:
        verify_if_listed(tuned.model)
    model: Any = load_model(tuned.model or tuned.base, dtype=dtype, device=device).eval()
    tokenizer = load_tokenizer(model.source_folder)
    facts = {"base": model.base_fingerprint, "source": source, "layout": layout}
    size = sum(math.prod(p.shape) for p in model.parameters()) * model.lm_head.weight.element_size()
    probe = Probe(tokenizer, device)
    if tuned.adapter is not None:
        model = load_adapter(model, tuned.adapter)
    wanted = probe.logits(model)
    if tuned.adapter is not None:
        model = model.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    merged = glm(model)
    kept = str(merged.lm_head.weight.dtype).removeprefix("torch.")
    own = (tuned.adapter or tuned.model or Path()) / "README.md"
    card = {"base": tuned.base, "source": source, "layout": layout, "dtype": kept, "name": target.name}

    def write(part: Path) -> None:
        save_model(merged, part, layout, tokenizer, shard_size)
        (part / "README.md").write_text(_card(own, card, LICENCE), encoding="utf-8")

    difference = write_compared(
        target,
        write,
        facts,
        lambda: probe.logits(load_model(target, dtype=kept, device=device).eval()),
        wanted,
        tolerance=1e-4 if kept == "float32" else 0.05,  # merging rounds the sum to the weights' dtype
        needed=size,
    )
    return {
        "folder": str(target),
        "layout": layout,
        "dtype": kept,
        "bytes": size,
        "largest_logit_difference": difference,
    }


def _card(own: Path, told: dict[str, Any], licence: str) -> str:
    """The card of what was merged; what its `own` card says stands in it once, without header and licence."""
    body = ""
    if own.is_file():
        text = own.read_text(encoding="utf-8")
        text = text.split("---\n", 2)[-1] if text.startswith("---\n") else text
        body = f"How it was trained, as its own card says:\n\n{text.partition(licence)[0].strip()}\n"
    return CARD.format(**told, card=body, version=__version__, licence=licence)


def export_adapter(source: str, target: Path, base: str | None, layout: Any, device: str) -> dict[str, Any]:
    """Writes the adapter in the names of a layout, loads it again and compares its logits, in fp32.

    Raises:
        UserError: there is no adapter, it has no exact counterpart in those names, or the target exists.
        DamagedError: the folder does not answer as the source does; it is removed.
    """
    from glmft.engine import checked_device, find_tuned
    from glmft.models.loading import load_model
    from glmft.models.tokenizer import load_tokenizer
    from glmft.strategies.adapter import load_adapter, save_adapter, write_published

    check_absent(target)
    tuned = find_tuned(source, base)
    if tuned.adapter is None:
        raise UserError(f"{source}: holds no adapter; leave out --adapter")
    adapter = tuned.adapter
    device = checked_device(device)

    def loaded(folder: Path) -> Any:
        return load_adapter(load_model(tuned.base, dtype="float32", device=device).eval(), folder)

    model = loaded(adapter)
    plain = model.get_base_model()
    probe = Probe(load_tokenizer(plain.source_folder), device)
    card = (adapter / "README.md").read_text(encoding="utf-8") if (adapter / "README.md").is_file() else ""

    def write(part: Path) -> None:
        write_published(adapter, part, plain) if layout == "chatglm" else save_adapter(model, part, card)

    facts = {"base": plain.base_fingerprint, "source": source, "layout": layout}
    difference = write_compared(
        target, write, facts, lambda: probe.logits(loaded(target)), probe.logits(model), tolerance=1e-5
    )
    told = {"folder": str(target), "layout": layout, "dtype": "adapter", "largest_logit_difference": difference}
    return told | {"bytes": sum(f.stat().st_size for f in target.iterdir())}


def serving(told: dict[str, Any], base: str) -> str:
    """The lines that serve it elsewhere."""
    folder = told["folder"]
    if told["dtype"] != "adapter":
        return f"vllm serve {folder}"
    rank = max(8, 1 << (read_json(Path(folder) / "adapter_config.json")["r"] - 1).bit_length())  # what vLLM allows
    layout = told["layout"]
    return (
        f"glmft export {base} base-{layout} --layout {layout} && vllm serve base-{layout} --enable-lora "
        f"--max-lora-rank {rank} --lora-modules tuned={folder}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft export", description=__doc__)
    parser.add_argument("source", help="a run (folder or name), an adapter folder, or a model")
    parser.add_argument("target", type=Path, help="the folder to write; it must not exist")
    parser.add_argument(
        "--layout",
        choices=("glm_hf", "chatglm"),
        default="glm_hf",
        help="glm_hf loads in plain transformers and vLLM, chatglm has the published names (default: %(default)s)",
    )
    parser.add_argument("--adapter", action="store_true", help="the adapter alone, in the layer names of the layout")
    console.add_weights(parser)
    parser.add_argument("--shard-size", default="2GB", help="largest weight file (default: %(default)s)")
    options = parser.parse_args(arguments)
    use_cache_dir()
    quiet_libraries()

    def command() -> None:
        began = time.monotonic()
        with console.out_of_memory(ValueError):  # PEFT: a merge that is not finite
            if options.adapter:
                told = export_adapter(options.source, options.target, options.model, options.layout, options.device)
            else:
                given = (options.source, options.target, options.model, options.layout, options.dtype, options.device)
                told = export(*given, shard_size=options.shard_size)
        what = f"{told['bytes'] / 1e9:.3f} GB, {told['layout']}, {told['dtype']}, in {time.monotonic() - began:.1f} s"
        print(
            f"{told['folder']}: {what}; loaded again, logits differ by {told['largest_logit_difference']:.2g} at most"
        )
        print(f"elsewhere: {serving(told, options.model or 'BASE')}")

    return console.run(command)


if __name__ == "__main__":
    sys.exit(main())
