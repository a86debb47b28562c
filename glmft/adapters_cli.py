"""glmft adapters: combine several into one, or extract one from a fully tuned model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmft import console
from glmft.artefacts import check_absent, write_folder
from glmft.caches import use_cache_dir
from glmft.errors import UserError
from glmft.quiet import quiet_libraries


def combine(sources: Sequence[str], target: Path, base: str | None, rank: int | None) -> dict[str, Any]:
    """Writes the weighted sum of adapters; `rank` makes it smaller by SVD.

    Args:
        sources: adapters, runs, or SOURCE=WEIGHT (default: 1).

    Raises:
        UserError: there are no adapters, they are of several bases, or cannot be summed.
    """
    from glmft.engine import find_tuned, one_base
    from glmft.models.loading import load_model
    from glmft.strategies.adapter import read_adapter, write_adapter
    from glmft.strategies.combining import as_state, pairs_of, truncated, weighted_sum

    check_absent(target)
    named = [weighted(source) for source in sources]
    tuned = [find_tuned(name, base) for name, _ in named]
    if without := [name for (name, _), t in zip(named, tuned, strict=True) if t.adapter is None]:
        raise UserError(f"{without[0]}: holds no adapter")
    original = one_base(tuned)
    model = load_model(original)
    read = [read_adapter(t.adapter, model) for t in tuned if t.adapter is not None]
    pairs = weighted_sum([pairs_of(raw, state) for raw, state in read], [weight for _, weight in named])
    lost = 0.0
    if rank is not None:
        for name, pair in pairs.items():
            pairs[name], error = truncated(pair, rank)
            lost = max(lost, error)
    whole, state = as_state(pairs)
    facts = {"base": model.base_fingerprint, "sources": list(sources)}
    told = f"# Adapter\n\nWeighted sum of {', '.join(sources)}.\n"
    write_folder(target, lambda part: write_adapter(part, state, whole, original, told), facts)
    return {"rank": whole, "largest relative error": lost}


def extract(source: str, target: Path, base: str | None, rank: int) -> dict[str, Any]:
    """Writes the leading singular vectors of what full fine-tuning changed in the linear layers.

    Raises:
        UserError: the source is no tuned model.
    """
    from glmft.engine import find_tuned
    from glmft.models.loading import load_model
    from glmft.strategies.adapter import write_adapter
    from glmft.strategies.combining import as_state, changes, extracted
    from glmft.strategies.exchange import PREFIX
    from glmft.strategies.lora import PRESETS

    check_absent(target)
    tuned = find_tuned(source, base)
    folder, original = (tuned.model, tuned.base) if tuned.model else (source, base)
    if original is None or tuned.adapter is not None:
        raise UserError(f"{source}: not a fully tuned model with a known base; give --model BASE")
    before, after = load_model(original), load_model(str(folder))
    pairs, errors, others = {}, {}, {}
    for name, change, moved in changes(before, after):
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in PRESETS["all"] and name.endswith(".weight"):
            if moved:
                pairs[PREFIX + layer], errors[layer] = extracted(change, rank)
        elif moved:
            others[name] = moved
    if not pairs:
        raise UserError(f"{source}: its linear layers are those of the base")
    whole, state = as_state(pairs)
    facts = {"base": before.base_fingerprint, "sources": [source]}
    told = f"# Adapter\n\nRank {rank} of what full fine-tuning changed ({source}).\n"
    write_folder(target, lambda part: write_adapter(part, state, whole, original, told), facts)
    ranks = sorted({r for e in errors.values() for r in e})
    mean = {r: sum(e.get(r, 0.0) for e in errors.values()) / len(errors) for r in ranks}
    return {"rank": whole, "mean relative error by rank": mean, "not in the adapter": others}


def weighted(source: str) -> tuple[str, float]:
    """`a=0.5` -> ("a", 0.5).

    Raises:
        UserError: the weight is no number.
    """
    name, sign, weight = source.rpartition("=")
    if not sign:
        return source, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UserError(f"{source}: {weight} is no number; SOURCE or SOURCE=WEIGHT") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="glmft adapters", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("combine", help="the weighted sum of adapters: combine OUT A B=0.5")
    one.add_argument("target", type=Path)
    one.add_argument("sources", nargs="+", help="runs or adapter folders, each with =WEIGHT if not 1")
    one.add_argument("--rank", type=int, help="make it smaller by SVD (default: exact, the sum of the ranks)")
    two = commands.add_parser("extract", help="a LoRA out of a fully tuned model, by SVD: extract OUT RUN --rank 16")
    two.add_argument("target", type=Path)
    two.add_argument("source", help="a full run, or a model folder (then --model is its base)")
    two.add_argument("--rank", type=int, default=16)
    for each in (one, two):
        each.add_argument("--model", help="base model: folder or hub id")
    options = parser.parse_args(arguments)
    use_cache_dir()
    quiet_libraries()

    def command() -> None:
        if options.rank is not None and options.rank < 1:
            raise UserError(f"--rank {options.rank}: must be 1 or more")
        if options.command == "combine":
            tell(options.target, combine(options.sources, options.target, options.model, options.rank))
        else:
            tell(options.target, extract(options.source, options.target, options.model, options.rank))

    return console.run(command)


def tell(target: Path, told: dict[str, Any]) -> None:
    """What was written, and what of the change is not in it."""
    print(f"{target}: rank {told['rank']}")
    for rank, error in told.get("mean relative error by rank", {}).items():
        print(f"  rank {rank}: {error:.1%} of the change is missing, on average over the layers")
    if told.get("largest relative error"):
        print(f"  {told['largest relative error']:.1%} of the change is missing, at most")
    if others := told.get("not in the adapter"):
        most = max(others, key=lambda n: others[n])
        print(f"  {len(others)} other tensors changed and are not in it; {most} most, by {others[most]:.2%}")


if __name__ == "__main__":
    sys.exit(main())
