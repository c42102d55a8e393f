"""Score a demo model: ``python -m effusion.demo.score [--model DIR --n 512 --steps 20 --guidance 3 --seed 0]``.

Pictures are made by the ordinary pipeline for captions that were never trained on, half of them with a
(colour, shape) pair that was never trained on either; the checker says what is right in them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import checker, data, path

SPLITS = {"test": "captions never trained on", "pairs": "pairs never trained on"}


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of ``right`` in ``total``, 95 % by default."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def captions(split: str, n: int, seed: int) -> list[str]:
    """``n`` full captions of ``split``, a quarter of them of one shape; the same for the same seed."""
    return data.captions(data.sample(n, data.generator(seed, 1 + list(SPLITS).index(split)), split))


def pictures(pipe: Any, texts: list[str], steps: int, guidance: float, seed: int, batch: int = 32) -> Iterator[Any]:
    """Pictures as arrays of 0 to 255; each has its own seed, so the size of the batch has no say."""
    import torch

    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        out = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np")
        yield from (out.images * 255).round()


def score(pipe: Any, n: int, steps: int, guidance: float, seed: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Split -> attribute -> right and total; ``n`` captions, half of each split, and ``all`` of them together."""
    out: dict[str, dict[str, tuple[int, int]]] = {}
    for split in SPLITS:
        texts = captions(split, n // 2, seed)
        out[split] = checker.tally(texts, pictures(pipe, texts, steps, guidance, seed))
    names = out["test"]
    out["all"] = {k: (out["test"][k][0] + out["pairs"][k][0], out["test"][k][1] + out["pairs"][k][1]) for k in names}
    return out


def table(scores: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The scores as a Markdown table with 95 % intervals."""
    rows = ["| | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
    for name in next(iter(scores.values())):
        cells = []
        for part in scores.values():
            right, total = part[name]
            low, high = wilson(right, total)
            cells.append(f"{100 * right / max(1, total):.1f} % ({100 * low:.1f} to {100 * high:.1f}, n={total})")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, score, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m effusion.demo.score", description="Score a demo model.")
    parser.add_argument("--model", type=Path, default=None, help="a pipeline folder; the shipped model without it")
    parser.add_argument("--n", type=int, default=512, help="captions, half of them with a held-out pair")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.n < 2:
        parser.error("--n must be at least 2")

    import torch

    from ..pipelines.stable_diffusion import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(args.model or path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scores = score(pipe, args.n, args.steps, args.guidance, args.seed)
    print(f"{args.n} captions, {args.steps} steps, guidance {args.guidance}, seed {args.seed}")
    print(table(scores))
    print(json.dumps({split: {k: list(v) for k, v in part.items()} for split, part in scores.items()}))


if __name__ == "__main__":
    main()
