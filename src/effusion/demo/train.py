"""Train the demo model: ``python -m effusion.demo.train --stage vae|latents|diffusion|export --out DIR [--resume]``.

The stages follow each other; all of them work in ``DIR``. To use several processes, start it with
``torchrun --nproc_per_node 2 -m effusion.demo.train …``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..core.optional import require
from ..training.recipe import Settings, Trainer
from . import data, model
from .objectives import CaptionLoss, PictureLoss, quick_attention


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m effusion.demo.train", description="Train the demo model.")
    parser.add_argument("--stage", choices=("vae", "latents", "diffusion", "export"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, logs and the model")
    parser.add_argument("--resume", action="store_true", help="go on from the stage's last checkpoint")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps of the whole run")
    parser.add_argument("--cooldown", type=int, default=0, help="last steps, over which the learning rate falls")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step and process")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW: embeddings, norms, biases")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="of Muon: everything else; 0: AdamW for all")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after that long; 0: no limit")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=200_000, help="latents: how many to encode")
    parser.add_argument("--kl", type=float, default=1e-4, help="vae: weight of the divergence")
    parser.add_argument("--weighting", choices=("none", "min_snr"), default="none", help="diffusion: of noise levels")
    parser.add_argument("--tilt", type=float, default=1.0, help="diffusion: above 1 favours noisy timesteps")
    parser.add_argument("--one-way", type=float, default=0.0, help="diffusion: share of 'below' said as 'above'")
    parser.add_argument("--last", action="store_true", help="export: the last weights, not their average")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> Settings:
    """How the command line says to train."""
    return Settings(
        steps=args.steps,
        lr=args.lr,
        matrix_lr=args.matrix_lr,
        cooldown=args.cooldown,
        ema_decay=args.ema,
        mixed_precision=args.precision,
        seed=args.seed,
        log_every=args.log_every,
        save_every=args.save_every,
        max_minutes=args.minutes,
    )


def train_vae(args: argparse.Namespace) -> None:
    """Stage ``vae``: pictures to latents and back; the result is ``DIR/vae.pt``."""
    torch.manual_seed(args.seed)
    objective = PictureLoss(model.build_vae(), args.batch, args.kl)

    def finish(trainer: Trainer) -> Mapping[str, Any]:
        with trainer.averaged():
            vae: Any = objective.vae
            save_state(vae.state_dict(), args.out / "vae.pt")
            generator = data.generator(args.seed + 1)
            pictures = data.render(data.sample(64, generator), generator)
            with torch.no_grad():
                painted = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        save_grid(torch.cat([pictures[:16], painted[:16]]), args.out / "vae.png")
        error = (painted - pictures).square().mean()
        return {"psnr": float(10 * torch.log10(4 / error))}

    trainer = Trainer(objective, settings(args), args.out / "vae", finish)
    if args.resume:
        trainer.resume()
    trainer.run()


def encode(args: argparse.Namespace) -> None:
    """Stage ``latents``: fold the statistics of the latents into the autoencoder, then encode the training set.

    Several processes share the work; each writes its part.
    """
    state = require("accelerate", "training").Accelerator()
    vae = model.build_vae()
    vae.load_state_dict(torch.load(args.out / "vae.pt", weights_only=True))
    vae.eval().requires_grad_(False)
    standardise(vae, torch.cat([_latents(vae, _scenes(256, args.seed, i), args.seed, i) for i in range(8)]))
    if state.is_main_process:
        save_state(vae.state_dict(), args.out / "vae-standard.pt")
    size = 1000
    scenes, latents = [], []
    for i in range(state.process_index, args.pictures // size, state.num_processes):
        scenes.append(_scenes(size, args.seed, 1000 + i))
        latents.append(_latents(vae, scenes[-1], args.seed, 1000 + i, bf16=True).half())
        if len(scenes) % 10 == 0:
            state.print(f"{i * size} pictures encoded", flush=True)
    all_scenes = data.Scenes.cat(scenes)
    fields = {name: getattr(all_scenes, name).to(torch.int8) for name in data.Scenes.__dataclass_fields__}
    save_state({"latents": torch.cat(latents), **fields}, args.out / f"latents-{state.process_index}.pt")


def _scenes(n: int, seed: int, step: int) -> data.Scenes:
    return data.sample(n, data.generator(seed + 2, step))


@torch.no_grad()
def _latents(vae: Any, scenes: data.Scenes, seed: int, step: int, bf16: bool = False) -> Tensor:
    pictures = data.render(scenes, data.generator(seed + 3, step))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), quick_attention(pictures.device):
        return torch.cat([vae.encode(part).latent_dist.mode().float() for part in pictures.split(50)])


@torch.no_grad()
def standardise(vae: Any, latents: Tensor) -> None:
    """Rescale the latents of ``vae`` to mean 0 and deviation 1 per channel, as measured on ``latents`` (N, c, h, w).

    The affine map goes into the 1x1 convolutions on both sides, so pictures stay as they are and the
    scaling factor of the pipeline is 1.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()  # the log-variances
    back.bias += (back.weight[:, :, 0, 0] * mean).sum(dim=1)
    back.weight *= std[None, :, None, None]


def load_latents(run: Path) -> tuple[Tensor, data.Scenes]:
    """What the stage ``latents`` wrote in all its processes.

    Raises:
        CheckpointError: that stage has not been run.
    """
    files = sorted(run.glob("latents-*.pt"))
    if not files:
        raise CheckpointError(f"{run} holds no latents; run `--stage latents` first")
    parts = [torch.load(file, weights_only=True) for file in files]
    names = data.Scenes.__dataclass_fields__
    scenes = [data.Scenes(**{name: part[name].long() for name in names}) for part in parts]
    return torch.cat([part["latents"] for part in parts]), data.Scenes.cat(scenes)


def train_diffusion(args: argparse.Namespace) -> None:
    """Stage ``diffusion``: UNet and text encoder together; a score and a picture at every checkpoint."""
    from . import progress

    torch.manual_seed(args.seed)
    tokenizer = model.build_tokenizer(args.out / "tokenizer")
    text_encoder, unet, scheduler = model.build_text_encoder(tokenizer), model.build_unet(), model.build_scheduler()
    vae = model.build_vae()
    vae.load_state_dict(torch.load(args.out / "vae-standard.pt", weights_only=True))
    vae.eval().requires_grad_(False)
    latents, scenes = load_latents(args.out)
    objective = CaptionLoss(
        unet,
        text_encoder,
        tokenizer,
        scheduler,
        latents,
        scenes,
        args.batch,
        weighting=args.weighting,
        tilt=args.tilt,
        one_way=args.one_way,
    )

    def look(trainer: Trainer) -> Mapping[str, Any]:
        with trainer.averaged():
            save_state(objective.state_dict(), args.out / "averaged.pt")
            pictures, score = progress.look(objective, vae, args.precision == "bf16")
        save_grid(pictures, args.out / "samples.png")
        return score

    trainer = Trainer(objective, settings(args), args.out / "diffusion", look)
    if args.resume:
        trainer.resume()
    trainer.run()


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save`` beside ``path``, then rename."""
    beside = path.with_name(f".{path.name}.part")
    torch.save(dict(state), beside)
    os.replace(beside, path)


def save_grid(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Save pictures (N, 3, H, W) in [-1, 1] as one PNG, enlarged twice."""
    from PIL import Image

    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    rows = [torch.cat(list(row), dim=1) for row in pixels.split(columns) if len(row) == columns]
    image = Image.fromarray(torch.cat(rows).numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def main(argv: list[str] | None = None) -> None:
    """Run one stage."""
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # tiny numbers in averages and momenta are slow on CPUs, and mean nothing
    if args.stage == "export":
        from .export import export

        export(args.out, args.out / "model", args.last)
        return
    {"vae": train_vae, "latents": encode, "diffusion": train_diffusion}[args.stage](args)


if __name__ == "__main__":
    main()
