"""What the demo's networks learn: the autoencoder its pictures, the UNet and text encoder its captioned latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..training.losses import diffusion_loss, levels
from . import data


@contextmanager
def quick_attention(device: torch.device) -> Iterator[None]:
    """On CPUs, attention as plain matrix products: torch's fused kernel is several times slower backwards."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


class PictureLoss(nn.Module):
    """The objective of the autoencoder (Kingma & Welling, 2013) on ``batch`` freshly painted scenes.

    Squared errors of pixels (absolute ones alone would rather have no shapes than blurred ones), absolute errors
    of the differences of neighbours (sharp edges), and the divergence of the latents from a unit normal,
    weighted by ``kl_weight`` per latent.
    """

    def __init__(self, vae: nn.Module, batch: int, kl_weight: float = 1e-4, edge_weight: float = 0.5) -> None:
        super().__init__()
        self.vae = vae
        self.batch, self.kl_weight, self.edge_weight = batch, kl_weight, edge_weight

    def forward(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One batch; ``loss`` and its parts."""
        device = next(self.vae.parameters()).device
        pictures = data.render(data.sample(self.batch, generator), generator).to(device)
        vae: Any = self.vae
        with quick_attention(device):
            posterior = vae.encode(pictures).latent_dist
            painted = vae.decode(posterior.sample(generator)).sample.float()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        error = painted - pictures
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        squared, absolute = error.square().mean(), error.abs().mean()
        loss = squared + 0.1 * absolute + self.edge_weight * edges + self.kl_weight * divergence
        spread = (0.5 * log_variance).exp().mean()
        return {"loss": loss, "mse": squared, "l1": absolute, "edges": edges, "kl": divergence, "spread": spread}


class CaptionLoss(nn.Module):
    """The objective of UNet and text encoder: denoise latents under their captions.

    Captions are dropped now and then, for classifier-free guidance (Ho & Salimans, 2022).

    Args:
        tokenizer: turns captions into ids, as the pipeline will.
        scheduler: the noise schedule and what the UNet predicts.
        latents, scenes: the pictures (M, c, h, w), encoded, and what they show; a batch is drawn from them.
        dropped: share of captions that are replaced by the empty one.
        tilt: more than 1 favours noisy timesteps, where it is decided what goes where: the share of timesteps
            above ``T`` is ``(1 - T) ** (1 / tilt)``.
        one_way: share of the pictures said to be *below* or *right of* that are said the other way round. As long
            as both ways are equally frequent, *above* or *below* alone tells nothing about where anything is, and
            a network that does not yet heed the order of the nouns has nothing to learn from; so it begins with a bias.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        scheduler: Any,
        latents: Tensor,
        scenes: data.Scenes,
        batch: int,
        dropped: float = 0.1,
        weighting: str = "none",
        tilt: float = 1.0,
        one_way: float = 0.0,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.latents, self.scenes = latents, scenes
        self.batch, self.dropped, self.weighting, self.tilt = batch, dropped, weighting, tilt
        self.one_way = one_way

    def tokens(self, texts: list[str]) -> Tensor:
        """Ids of ``texts``, padded as the pipeline pads them, (N, L)."""
        length = self.tokenizer.model_max_length
        batch = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids  # type: ignore[no-any-return]

    def draw(self, g: torch.Generator) -> tuple[Tensor, list[str]]:
        """A batch: latents in float32 and captions, some of them empty."""
        index = torch.randint(len(self.latents), (self.batch,), generator=g)
        scenes = self.scenes[index]
        turn = (scenes.relation % 2 == 1) & (torch.rand(self.batch, generator=g) < self.one_way)
        texts = data.captions(scenes.seen_from_the_other(turn), data.wording(self.batch, g))
        gone = (torch.rand(self.batch, generator=g) < self.dropped).tolist()
        return self.latents[index].float(), ["" if drop else text for text, drop in zip(texts, gone, strict=True)]

    def forward(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One batch; its ``loss``."""
        device = next(self.unet.parameters()).device
        clean, texts = self.draw(generator)
        noise = torch.randn(clean.shape, generator=generator)
        config = self.scheduler.config
        # one timestep from each of N equal strata: every batch meets all noise levels
        offset = torch.randperm(self.batch, generator=generator) + torch.rand(self.batch, generator=generator)
        level = 1 - (1 - offset / self.batch).clamp(min=0) ** self.tilt
        timesteps = (level * config.num_train_timesteps).long().clamp(max=config.num_train_timesteps - 1)
        alpha, sigma = levels(self.scheduler, timesteps, clean.dim())
        noisy = (alpha * clean + sigma * noise).to(device)
        with quick_attention(device):
            context = self.text_encoder(self.tokens(texts).to(device)).last_hidden_state
            output = self.unet(noisy, timesteps.to(device), context).sample
        loss = diffusion_loss(
            output,
            clean.to(device),
            noise.to(device),
            self.scheduler,
            timesteps.to(device),
            config.prediction_type,
            self.weighting,
        )
        return {"loss": loss}
