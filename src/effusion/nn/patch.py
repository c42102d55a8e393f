"""Images to tokens and back, with sinusoidal position embeddings in two dimensions (Dosovitskiy et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rotary import Memo


def get_2d_sincos_pos_embed(
    embed_dim: int,
    grid_size: int | tuple[int, int],
    interpolation_scale: float = 1.0,
    base_size: int = 16,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sines and cosines of column and row, computed in float64: ``(H * W, embed_dim)``.

    Positions are stretched so that a side always counts ``base_size / interpolation_scale`` units.

    Raises:
        ValueError: ``embed_dim`` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be a multiple of 4 for two axes of sine and cosine, not {embed_dim}")
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size

    def side(n: int) -> Tensor:
        positions = torch.arange(n, dtype=torch.float32, device=device) / (n / base_size) / interpolation_scale
        steps = torch.arange(embed_dim // 4, dtype=torch.float64, device=device) / (embed_dim / 4.0)
        angles = torch.outer(positions.double(), 1.0 / 10000**steps)
        return torch.cat((angles.sin(), angles.cos()), dim=1).to(dtype)  # (n, embed_dim / 2)

    columns = side(width).expand(height, -1, -1)
    rows = side(height).unsqueeze(1).expand(-1, width, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Patches of an image as tokens, plus position embeddings.

    Args:
        height, width: of the images the network was made for, in latents.
        pos_embed_type: ``"sincos"`` or ``None`` for no positions.
        pos_embed_max_size: side of a stored table, in patches, whose middle is used (SD3); without it, the
            embedding is computed for the image's own size.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        height: int = 224,
        width: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        interpolation_scale: float = 1,
        pos_embed_type: str | None = "sincos",
        pos_embed_max_size: int | None = None,
    ) -> None:
        super().__init__()
        if pos_embed_type not in (None, "sincos"):
            raise ValueError(f"pos_embed_type {pos_embed_type!r} is unknown; allowed are 'sincos' and None")
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.pos_embed_max_size = pos_embed_max_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.height, self.width = height // patch_size, width // patch_size
        self.base_size = height // patch_size
        self.interpolation_scale = interpolation_scale
        self.memo = Memo()
        table = None
        if pos_embed_type is not None:
            grid = pos_embed_max_size or int((self.height * self.width) ** 0.5)
            table = self._positions(grid, grid, None).unsqueeze(0)
        self.register_buffer("pos_embed", table, persistent=bool(pos_embed_max_size))

    def _positions(self, height: int, width: int, device: torch.device | None) -> Tensor:
        return get_2d_sincos_pos_embed(
            self.embed_dim, (height, width), self.interpolation_scale, self.base_size, device, torch.float32
        )

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:
        """The middle of the stored table for an image of ``height`` x ``width`` latents: ``(1, L, D)``.

        Raises:
            ValueError: the image has more patches on a side than the table.
        """
        assert self.pos_embed is not None
        assert self.pos_embed_max_size is not None
        h, w, size = height // self.patch_size, width // self.patch_size, self.pos_embed_max_size
        if h > size or w > size:
            raise ValueError(
                f"an image of {height}x{width} latents is {h}x{w} patches; this network has positions for {size}x{size}"
            )
        top, left = (size - h) // 2, (size - w) // 2
        table = self.pos_embed.unflatten(1, (size, size))[:, top : top + h, left : left + w]
        return table.flatten(1, 2)  # type: ignore[no-any-return]

    def forward(self, latent: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, L, D)``."""
        height, width = latent.shape[-2:]
        x = self.proj(latent).flatten(2).transpose(1, 2)
        if self.pos_embed is None:
            return x  # type: ignore[no-any-return]
        if self.pos_embed_max_size:
            positions = self.cropped_pos_embed(height, width)
        else:
            h, w = height // self.patch_size, width // self.patch_size
            positions = self.pos_embed if (h, w) == (self.height, self.width) else self._stretched(h, w, latent)
        return (x + positions).to(x.dtype)  # type: ignore[no-any-return]

    def _stretched(self, h: int, w: int, latent: Tensor) -> Tensor:
        device = latent.device

        def make() -> Tensor:
            return self._positions(h, w, device).unsqueeze(0)

        positions: Tensor = self.memo.get(latent, (h, w, device), make)
        return positions


def unpatchify(x: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Tokens back to an image: ``(B, height * width, patch * patch * C) -> (B, C, height * patch, width * patch)``."""
    x = x.unflatten(1, (height, width)).unflatten(3, (patch, patch, -1))  # (B, h, w, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
