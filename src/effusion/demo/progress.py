"""A quick look at a demo model in training: a few dozen samples, and what the checker says of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checker, data
from .objectives import CaptionLoss, quick_attention


@torch.no_grad()
def paint(
    objective: CaptionLoss, vae: Any, texts: list[str], steps: int = 12, guidance: float = 3.0, seed: int = 0
) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] for ``texts``: classifier-free guidance with the objective's scheduler."""
    device = next(objective.unet.parameters()).device
    scheduler = objective.scheduler
    scheduler.set_timesteps(steps)
    unet: Any = objective.unet
    shape = (len(texts), *objective.latents.shape[1:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with quick_attention(device):
        tokens = objective.tokens(["", *texts]).to(device)
        context = objective.text_encoder(tokens).last_hidden_state
        context = torch.cat([context[:1].expand(len(texts), -1, -1), context[1:]])
        for t in scheduler.timesteps:
            blank, told = unet(torch.cat([x, x]), t, context).sample.float().chunk(2)
            x = scheduler.step(blank + guidance * (told - blank), t, x).prev_sample
        return vae.decode(x / vae.config.scaling_factor).sample.float()  # type: ignore[no-any-return]


def to_pixels(pictures: Tensor) -> Any:
    """(N, 3, H, W) in [-1, 1] to an array (N, H, W, 3) of 0 to 255."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def look(objective: CaptionLoss, vae: Any, bf16: bool, n: int = 64, seed: int = 99) -> tuple[Tensor, dict[str, float]]:
    """Half captions of seen pairs, half with a held-out pair, none trained on: pictures and shares that are right."""
    generator = data.generator(seed)
    scenes = data.Scenes.cat([data.sample(n // 2, generator, "test"), data.sample(n // 2, generator, "pairs")])
    texts = data.captions(scenes)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        pictures = paint(objective, vae, texts)
    pixels = to_pixels(pictures)
    score = {k: right / total for k, (right, total) in checker.tally(texts, pixels).items()}
    for name, part in (("test", slice(0, n // 2)), ("pairs", slice(n // 2, n))):
        right, total = checker.tally(texts[part], pixels[part])["whole"]
        score[f"whole_{name}"] = right / total
    return pictures, score
