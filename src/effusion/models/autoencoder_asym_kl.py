"""AsymmetricAutoencoderKL: a decoder that keeps what the mask keeps (Zhu et al., 2023, "Designing a Better
Asymmetric VQGAN for StableDiffusion")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.random import Generators
from ..nn import checkpointing, fresh
from ..nn.attention import AttentionMixin
from ..nn.tiling import joined
from ..nn.vae import AutoencoderKLOutput, Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from .base import ModelMixin


class MaskConditionEncoder(nn.Module):
    """Features of the kept part of a picture, one for each resolution of the decoder."""

    def __init__(self, in_channels: int, first: int, last: int) -> None:
        super().__init__()
        widths = [in_channels, *(min(first * 2**i, last) for i in range(4)), last]
        self.layers = nn.Sequential(
            *(
                nn.Conv2d(widths[i], widths[i + 1], 3 if i < 2 else 4, stride=1 if i < 2 else 2, padding=1)
                for i in range(5)
            )
        )

    def forward(self, x: Tensor) -> dict[tuple[int, ...], Tensor]:
        """``(B, C, H, W)`` -> features by their shape without the batch."""
        features = {}
        for layer in self.layers:
            x = layer(x)
            features[tuple(x.shape[1:])] = x
            x = F.relu(x)
        return features


class MaskConditionDecoder(Decoder):
    """The decoder, which mixes in features of the kept part of the picture before every block."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, block_out_channels=widths, **kwargs)
        self.condition_encoder = MaskConditionEncoder(out_channels, widths[0], widths[-1])

    def forward(self, sample: Tensor, image: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Latents ``(B, c, h, w)``, picture ``(B, C, H, W)`` and mask ``(B, 1, H, W)``, 1 = new."""
        if image is None or mask is None:
            return super().forward(sample)
        x = checkpointing.run(self, self.mid_block, self.conv_in(sample))
        features = checkpointing.run(self, self.condition_encoder, (1 - mask) * image)
        for block in self.up_blocks:
            x = checkpointing.run(self, block, _keep(x, features, mask))
        x = _keep(x, features, mask)
        return self.conv_out(fresh.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]


def _keep(x: Tensor, features: dict[tuple[int, ...], Tensor], mask: Tensor) -> Tensor:
    """``x`` where the mask is 1, the features of its shape where it is 0."""
    mask = F.interpolate(mask, size=x.shape[-2:], mode="nearest")
    return x * mask + features[tuple(x.shape[1:])] * (1 - mask)


class AsymmetricAutoencoderKL(AttentionMixin, ModelMixin):
    """An autoencoder for inpainting, whose larger decoder sees the picture and the mask.

    Slicing works a batch one by one; tiles would not see the mask's whole picture and are not offered.
    """

    _supports_gradient_checkpointing = True
    takes_mask = True  # `decode` wants the picture and the mask
    _skip_layerwise_casting_patterns = ["decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        down_block_out_channels: tuple[int, ...] = (64,),
        layers_per_down_block: int = 1,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        up_block_out_channels: tuple[int, ...] = (64,),
        layers_per_up_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        self.use_slicing = False
        common: dict[str, Any] = dict(norm_num_groups=norm_num_groups, act_fn=act_fn)
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types,
            down_block_out_channels,
            layers_per_down_block,
            **common,
        )
        self.decoder = MaskConditionDecoder(
            latent_channels,
            out_channels,
            up_block_out_channels,
            up_block_types=up_block_types,
            layers_per_block=layers_per_up_block,
            **common,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.register_to_config(block_out_channels=up_block_out_channels, force_upcast=False)

    def enable_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after another: less memory, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of pictures ``(B, C, H, W)`` in -1 to 1."""
        parts = x.split(1) if self.use_slicing else (x,)
        moments = joined((self.quant_conv(self.encoder(p)) for p in parts), x.shape[0])
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Tensor,
        generator: Generators = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures ``(B, C, H, W)`` of latents ``(B, c, h, w)``; ``generator`` has no effect.

        Args:
            image: ``(B, C, H, W)``, kept where the mask is 0.
            mask: ``(B or 1, 1, H, W)``, 1 where the picture is new.
        """
        n = z.shape[0] if self.use_slicing else 1
        columns = [self._slices(t, n, z.shape[0]) for t in (z, image, mask)]
        parts = zip(*columns, strict=True)
        sample = joined((self.decoder(self.post_quant_conv(part), i, m) for part, i, m in parts), z.shape[0])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @staticmethod
    def _slices(t: Tensor | None, n: int, batch: int) -> Sequence[Any]:
        """``t`` in ``n`` parts along the batch; what is one for the whole batch is repeated."""
        if t is None or n == 1:
            return [t] * n
        return t.expand(batch, *t.shape[1:]).split(1)

    def forward(
        self,
        sample: Tensor,
        mask: Tensor | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode, draw (or take the mode), decode with the picture and the mask: ``(B, C, H, W)``, both."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, None, sample, mask, return_dict)
