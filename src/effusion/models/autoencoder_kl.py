"""AutoencoderKL: the variational autoencoder of Stable Diffusion and its kin (Rombach et al., 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.random import Generators
from ..nn.attention import AttentionMixin
from ..nn.tiling import SlicingMixin, blend, tiled
from ..nn.vae import AutoencoderKLOutput, Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from .base import ModelMixin


class AutoencoderKL(SlicingMixin, AttentionMixin, ModelMixin):
    """Pictures to latents and back (Kingma & Welling, 2013, with the network of Rombach et al., 2022).

    ``scaling_factor``, ``shift_factor``, ``latents_mean``, ``latents_std`` and ``force_upcast`` are facts
    for the user of the latents; nothing here applies them.

    Attributes:
        tile_sample_min_size, tile_latent_min_size: side of a tile in pixels and in latents.
        tile_overlap_factor: the share of a tile that overlaps with the next one.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]
    # parts of keys in files saved before 2023 -> what they are called now
    _legacy_keys = {
        ".query.": ".to_q.",
        ".key.": ".to_k.",
        ".value.": ".to_v.",
        ".proj_attn.": ".to_out.0.",
    }

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        if not len(down_block_types) == len(up_block_types) == len(block_out_channels):
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels must be equally long, not "
                f"{len(down_block_types)}, {len(up_block_types)} and {len(block_out_channels)}"
            )
        common = (block_out_channels, layers_per_block, norm_num_groups, act_fn)
        self.encoder = Encoder(
            in_channels, latent_channels, down_block_types, *common, mid_block_add_attention=mid_block_add_attention
        )
        self.decoder = Decoder(
            latent_channels, out_channels, up_block_types, *common, mid_block_add_attention=mid_block_add_attention
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.tile_sample_min_size = sample_size if isinstance(sample_size, int) else sample_size[0]
        self._scale = 2 ** (len(block_out_channels) - 1)  # pixels per latent, in each direction
        self.tile_latent_min_size = int(self.tile_sample_min_size / self._scale)
        self.tile_overlap_factor = 0.25

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of pictures ``(B, C, H, W)`` in -1 to 1: ``(B, c, H / f, W / f)``."""
        posterior = DiagonalGaussianDistribution(self._by_item(self._encode, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures ``(B, C, H, W)`` of unscaled latents ``(B, c, h, w)``; ``generator`` has no effect."""
        sample = self._by_item(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode, draw (or take the mode), decode: ``(B, C, H, W)``, both."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    # -- one picture, one tile ---------------------------------------------------------------------

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            return self._tiled_encode(x)
        return self._encode_tile(x)

    def _decode(self, z: Tensor) -> Tensor:
        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            return self._tiled_decode(z)
        return self._decode_tile(z)

    def _encode_tile(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return x if self.quant_conv is None else self.quant_conv(x)

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))  # type: ignore[no-any-return]

    def _tiled_encode(self, x: Tensor) -> Tensor:
        stride = int(self.tile_sample_min_size * (1 - self.tile_overlap_factor))
        extent = int(self.tile_latent_min_size * self.tile_overlap_factor)
        limit = self.tile_latent_min_size - extent
        return tiled(x, self._encode_tile, self.tile_sample_min_size, stride, extent, limit, 1 / self._scale)

    def _tiled_decode(self, z: Tensor) -> Tensor:
        stride = int(self.tile_latent_min_size * (1 - self.tile_overlap_factor))
        extent = int(self.tile_sample_min_size * self.tile_overlap_factor)
        limit = self.tile_sample_min_size - extent
        return tiled(z, self._decode_tile, self.tile_latent_min_size, stride, extent, limit, self._scale)

    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """:meth:`encode` in tiles, whether or not tiling is switched on."""
        posterior = DiagonalGaussianDistribution(self._tiled_encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """:meth:`decode` in tiles, whether or not tiling is switched on."""
        sample = self._tiled_decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """``b``, its first rows faded in from the last rows of ``a``."""
        return blend(a, b, blend_extent, -2)

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """``b``, its first columns faded in from the last columns of ``a``."""
        return blend(a, b, blend_extent, -1)
