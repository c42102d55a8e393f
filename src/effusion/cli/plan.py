"""``effusion plan MODEL --memory 6GB``: what would be kept and streamed, and the predicted peak; loads no weights."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .generate import DTYPES, add_budget, model_path
from .usage import number, size


def add_parser(subparsers: Any) -> None:
    """The verb's arguments."""
    parser = subparsers.add_parser(
        "plan", help="how a model would run in a budget of memory, without loading its weights"
    )
    add = parser.add_argument
    add("model", help="`demo`, a folder, or the name of a repository on the hub")
    add_budget(parser)
    add(
        "--size",
        type=size,
        metavar="WxH",
        help="pixels, e.g. 768x512, or 512 for a square; the model's own if left out",
    )
    add("--steps", type=number(int, 1), default=28, help="denoising steps")
    add("--num-images", type=number(int, 1), default=1, help="pictures at once")
    add("--num-frames", type=number(int, 1), help="of a video")
    add("--dtype", choices=DTYPES, default="auto", help="auto: float32 on the CPU, float16 elsewhere")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, …; auto: the accelerator if there is one")
    add("--revision", help="branch, tag or commit on the hub")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    import torch

    from ..pipelines.planning import skeleton
    from ..placement.machine import default_device
    from .inspect import components

    device = default_device(device=None if args.device == "auto" else args.device)
    name = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "float16"
    path = model_path(args.model)
    pipe = skeleton(path, getattr(torch, name), args.revision)
    wide, high = args.size or (None, None)
    made = pipe.plan(
        args.memory, ram=args.ram, quality=args.quality, height=high, width=wide, num_frames=args.num_frames,
        batch_size=args.num_images, num_inference_steps=args.steps, device=device,
    )  # fmt: skip
    others = {
        c.name: d for c in components(path, args.revision) for d in c.dtypes if c.name in pipe.modules and d != name
    }
    notes = tuple(
        f"{n}: stored as {d}, planned as {name}; what is converted while loading has to stay in memory"
        for n, d in others.items()
    )
    made = made.replace(notes=(*made.notes, *notes))
    print(json.dumps(made.to_dict(), indent=2) if args.json else made)
