"""``effusion generate PROMPT``: text (and a picture) in, PNG out."""

from __future__ import annotations

import argparse
import inspect
import io
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .usage import UsageError, number, size

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("auto", "float32", "float16", "bfloat16")
DEMO_STEPS, DEMO_GUIDANCE = 30, 3.0


def add_parser(subparsers: Any) -> None:
    """The verb's arguments."""
    parser = subparsers.add_parser(
        "generate", help="make a picture of a prompt", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("prompt", nargs="+", help="what to paint; quote it. Each further prompt is a picture of its own")
    add("--model", default="demo", help="`demo`, a folder, or the name of a repository on the hub")
    add("--negative", metavar="PROMPT", help="what not to paint")
    add("--seed", type=number(int, 0, 2**63 - 1), help="the same seed gives the same picture; random if left out")
    add("--steps", type=number(int, 1), help="denoising steps; the model's usual number if left out")
    add("--guidance", type=number(float, 0), help="how closely to follow the prompt; the model's usual if left out")
    add(
        "--size",
        type=size,
        metavar="WxH",
        help="pixels, e.g. 768x512, or 512 for a square; the model's own if left out",
    )
    add("--num-images", type=number(int, 1), default=1, help="pictures per prompt; their seeds count up")
    add("--scheduler", metavar="NAME", help="sampler; `effusion samplers` lists them")
    add("--image", metavar="FILE", help="start from this picture (path or URL)")
    add("--mask", metavar="FILE", help="repaint only where this picture is white; needs --image")
    add("--strength", type=number(float, 0, 1, open_low=True), help="how far to leave --image, up to 1")
    add("--dtype", choices=DTYPES, default="auto", help="auto: float32 on the CPU, float16 elsewhere")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, …; auto: the accelerator if there is one")
    add_budget(parser)
    add("--out", type=Path, default=Path("effusion.png"), help="PNG file; several pictures get -1, -2, … before .png")


def add_budget(parser: Any) -> None:
    """The arguments of a budget, the same for every verb that has one."""
    add = parser.add_argument
    add("--memory", metavar="SIZE", help="budget on the compute device, like 6GB; all that is free if left out")
    add("--ram", metavar="SIZE", help="budget in host memory; all that is available if left out")
    add("--quality", choices=("exact", "near", "lossy"), default="exact", help="what a plan may change to fit")


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked, load, paint, write."""
    _check(args)
    _check_budget(args)
    targets = _targets(args.out, len(args.prompt) * args.num_images)
    _check_scheduler(args.scheduler)
    pictures = _pictures(args)
    pipe = _load(args)
    if args.scheduler:
        from ..schedulers import by_name

        pipe.scheduler = by_name(args.scheduler, pipe.scheduler.config)
    seed = args.seed if args.seed is not None else secrets.randbelow(2**32)
    for i, prompt in enumerate(args.prompt):
        first = seed + i * args.num_images
        images = _paint(pipe, args, prompt, first, pictures)
        for j, image in enumerate(images):
            target = targets[i * args.num_images + j]
            write_png(image, target, _metadata(pipe, args, prompt, first + j))
            print(f"{target}  seed {first + j}  {image.width}x{image.height}")


def _check(args: argparse.Namespace) -> None:
    if args.mask and not args.image:
        raise UsageError("--mask says where to repaint a picture: give the picture with --image")
    if args.strength is not None and not args.image:
        raise UsageError("--strength says how far to leave a picture: give the picture with --image")
    if args.out.suffix.lower() != ".png":
        raise UsageError(f"--out {args.out}: the pictures are PNG files; name it {args.out.with_suffix('.png').name}")
    if args.out.is_dir():
        raise UsageError(f"--out {args.out} is a folder; name a file in it")
    if not args.out.parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    empty = [prompt for prompt in args.prompt if not prompt.strip()]
    if empty:
        raise UsageError("the prompt is empty: say what to paint")


def _check_budget(args: argparse.Namespace) -> None:
    from ..placement.plan import parse_size

    try:
        for name in ("memory", "ram"):
            if getattr(args, name) is not None:
                parse_size(getattr(args, name), name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _targets(out: Path, count: int) -> list[Path]:
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]


def _check_scheduler(name: str | None) -> None:
    from ..schedulers import by_name

    try:
        if name:
            by_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _pictures(args: argparse.Namespace) -> dict[str, Image]:
    """The pictures to start from, at the size of the result."""
    if not args.image:
        return {}
    from ..blocks.pictures import load_image

    image = load_image(args.image)
    wide, high = args.size or (image.width - image.width % 8, image.height - image.height % 8)
    if not wide or not high:
        raise UsageError(f"--image {args.image} has {image.width}x{image.height} pixels; 8x8 is the least")
    found = {"image": image.resize((wide, high)) if image.size != (wide, high) else image}
    if args.mask:
        mask = load_image(args.mask, convert_method=lambda picture: picture.convert("L"))
        found["mask_image"] = mask.resize((wide, high))
    return found


def _load(args: argparse.Namespace) -> Any:
    import torch

    from .. import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
    from ..placement.machine import default_device, free_device_memory

    device = default_device(device=None if args.device == "auto" else args.device)
    name = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "float16"
    task = AutoPipelineForInpainting if args.mask else AutoPipelineForImage2Image if args.image else None
    pipe = (task or AutoPipelineForText2Image).from_pretrained(model_path(args.model), torch_dtype=getattr(torch, name))
    weights = sum(p.nbytes for module in pipe.modules.values() for p in module.parameters())
    if not (args.memory or args.ram) and 2 * weights < free_device_memory(device):
        return pipe.to(device)
    wide, high = args.size or (None, None)
    steps = {"num_inference_steps": _usual(args)[0]} if _usual(args)[0] else {}
    plan = pipe.fit(
        args.memory, ram=args.ram, quality=args.quality, height=high, width=wide, batch_size=args.num_images,
        device=device, **steps,
    )  # fmt: skip
    print(plan, file=sys.stderr)
    return pipe


def model_path(model: str) -> str:
    """The folder of the model that ships with Effusion for ``demo``; any other name as it is."""
    if model != "demo":
        return model
    from .. import demo

    return str(demo.path())


def _usual(args: argparse.Namespace) -> tuple[int | None, float | None]:
    """Steps and guidance as asked for, else as they suit the demo; ``None`` leaves them to the pipeline."""
    if args.model != "demo":
        return args.steps, args.guidance
    return args.steps or DEMO_STEPS, DEMO_GUIDANCE if args.guidance is None else args.guidance


def _paint(pipe: Any, args: argparse.Namespace, prompt: str, seed: int, pictures: dict[str, Any]) -> list[Image]:
    import torch

    steps, guidance = _usual(args)
    wide, high = args.size or (pictures["image"].size if "mask_image" in pictures else (None, None))
    asked = {
        "--negative": ("negative_prompt", args.negative),
        "--steps": ("num_inference_steps", steps),
        "--guidance": ("guidance_scale", guidance),
        "--strength": ("strength", args.strength),
        "--image": ("image", pictures.get("image")),
        "--mask": ("mask_image", pictures.get("mask_image")),
        "--size": ("width", wide),
        "--size ": ("height", high),
    }
    known = inspect.signature(pipe.__call__).parameters
    given = {}
    for option, (name, value) in asked.items():
        if value is None or (option.startswith("--size") and name not in known and pictures):
            continue  # image2image takes its size from the picture, which is resized already
        if name not in known:
            raise UsageError(f"{option.strip()}: {type(pipe).__name__} has no such setting")
        given[name] = value
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(args.num_images)]
    result = pipe(prompt=prompt, num_images_per_prompt=args.num_images, generator=generators, **given)
    images: list[Image] = result.images
    return images


def _metadata(pipe: Any, args: argparse.Namespace, prompt: str, seed: int) -> dict[str, str]:
    """What it takes to make the picture again, as the PNG's text."""
    scheduler = getattr(pipe, "scheduler", None)
    steps, guidance = _usual(args)
    entries = {
        "prompt": prompt,
        "negative_prompt": args.negative,
        "seed": seed,
        "model": args.model,
        "scheduler": type(scheduler).__name__ if scheduler is not None else None,
        "steps": steps,
        "guidance": guidance,
        "strength": args.strength,
        "image": args.image,
        "mask": args.mask,
        "Software": f"Effusion {__version__}",
    }
    return {key: str(value) for key, value in entries.items() if value is not None}


def write_png(image: Image, path: Path, text: dict[str, str]) -> None:
    """Write ``image`` with ``text`` chunks beside ``path``, then rename: never half a picture."""
    from PIL.PngImagePlugin import PngInfo

    from ..core.files import write_atomically

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=chunks)
    write_atomically(path, data.getvalue())
