"""Between pixels and latents, and where a run starts: from noise, from a picture, inside a mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.random import Generators, randn_tensor
from ..core.types import Cond, LatentFormat
from .timesteps import first_sigma, noised


def vae_format(vae: Any) -> LatentFormat:
    """The latent format that a VAE's configuration describes."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    channels = getattr(config, "block_out_channels", None) or getattr(config, "encoder_block_out_channels", None)
    if channels is None:
        channels = config.down_block_out_channels
    return LatentFormat(
        channels=config.latent_channels,
        downscale=2 ** (len(channels) - 1),
        scale=config.scaling_factor,
        shift=getattr(config, "shift_factor", None) or 0.0,
        mean=tuple(mean) if mean is not None else None,
        std=tuple(std) if std is not None else None,
    )


@contextmanager
def upcast(vae: Any, wanted: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[None]:
    """Run a VAE that overflows in half precision (``force_upcast``) in float32."""
    before = vae.dtype
    if not (wanted and getattr(vae.config, "force_upcast", False) and before in dtypes):
        yield
        return
    if hasattr(vae, "computing_in"):
        with vae.computing_in(torch.float32):
            yield
        return
    vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        vae.to(dtype=before)


def retrieve_latents(encoded: Any, generator: torch.Generator | None = None, sample_mode: str = "sample") -> Tensor:
    """The latents in what ``vae.encode`` returned: a sample or the mode of its distribution."""
    if hasattr(encoded, "latent_dist"):
        dist = encoded.latent_dist
        return dist.mode() if sample_mode == "argmax" else dist.sample(generator)  # type: ignore[no-any-return]
    return encoded.latents if hasattr(encoded, "latents") else encoded[0]  # type: ignore[no-any-return]


def encode_pixels(family: Any, vae: Any, pixels: Tensor, generator: Generators, mode: str = "sample") -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, h, w), in the dtype of ``pixels``.

    With a list of generators each picture is sampled with its own. Without a VAE (a family that
    works on pixels) the pixels are the latents.
    """
    if vae is None:
        return pixels
    f = family.format(vae)
    with upcast(vae, family.upcast_vae, (torch.float16, torch.bfloat16)):
        x = pixels.to(vae.dtype)
        x = x.unsqueeze(2) if f.frames else x
        if isinstance(generator, (list, tuple)):
            parts = [retrieve_latents(vae.encode(x[i : i + 1]), generator[i], mode) for i in range(x.shape[0])]
            z = torch.cat(parts, dim=0)
        else:
            assert generator is None or isinstance(generator, torch.Generator)
            z = retrieve_latents(vae.encode(x), generator, mode)
    z = f.normalize(z.to(pixels.dtype))
    return z.squeeze(2) if f.frames else z  # type: ignore[no-any-return]


def decode_to_pixels(family: Any, vae: Any, latents: Tensor, **condition: Any) -> Tensor:
    """Normalised latents (B, C, h, w) -> pixels (B, 3, H, W), not clamped."""
    if vae is None:
        return latents
    with upcast(vae, family.upcast_vae, (torch.float16,)):
        f, z = family.format(vae), latents.to(vae.dtype)
        z = f.denormalize(z.unsqueeze(2) if f.frames else z)
        pixels = vae.decode(z, return_dict=False, **condition)[0]
        return pixels[:, :, 0] if f.frames else pixels  # type: ignore[no-any-return]


def pack(z: Tensor, side: int) -> Tensor:
    """Squares of ``side`` x ``side`` latents as tokens: (B, C, h, w) -> (B, h w / side^2, C side^2)."""
    if side == 1:
        return z
    b, c, h, w = z.shape
    z = z.view(b, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, (h // side) * (w // side), c * side * side)


def unpack(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """Tokens back to latents of ``height`` x ``width``: (B, L, C side^2) -> (B, C, h, w)."""
    if side == 1:
        return x
    b, _, d = x.shape
    x = x.view(b, height // side, width // side, d // side**2, side, side).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, d // side**2, height, width)


def dtype_of(conds: dict[str, Cond] | None, network: Any) -> torch.dtype:
    """The dtype that latents have: that of the conditioning; without any, the network's (a stand-in may have none)."""
    tokens = conds["positive"].tokens if conds else None
    return tokens.dtype if tokens is not None else network.dtype  # type: ignore[no-any-return]


def match_batch(x: Tensor, batch: int, what: str) -> Tensor:
    """Tile ``x`` (n, …) to ``batch`` items, in order: ``a b a b``."""
    if x.shape[0] == batch:
        return x
    if x.shape[0] > batch or batch % x.shape[0]:
        raise ValueError(f"{x.shape[0]} {what} can't be shared out to a batch of {batch}; give 1 or {batch} of them")
    return x.repeat(batch // x.shape[0], *([1] * (x.ndim - 1)))


def check_generators(generator: Generators, batch: int) -> None:
    if isinstance(generator, (list, tuple)) and len(generator) != batch:
        raise ValueError(
            f"a list of {len(generator)} generators for a batch of {batch}: give one, or as many as there are images"
        )


def noise_like_run(
    family: Any, components: Any, batch: int, height: int, width: int, generator: Generators, device: Any, dtype: Any
) -> Tensor:
    """Fresh noise of the size of the run's latents; (B, C, h, w)."""
    check_generators(generator, batch)
    f = family.latent_format(components)
    shape = (batch, family.noise_channels(components), height // f.downscale, width // f.downscale)
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)


def start_from_noise(
    family: Any,
    components: Any,
    scheduler: Any,
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    conds: dict[str, Cond] | None = None,
    latents: Tensor | None = None,
    generator: Generators = None,
) -> dict[str, Any]:
    """Noise (or the caller's ``latents``), scaled to the scheduler's first noise level."""
    dtype = dtype_of(conds, components[family.denoiser])
    check_generators(generator, batch)
    if latents is None:
        noise = noise_like_run(family, components, batch, height, width, generator, device, dtype)
        latents = pack(noise, family.packing)
    return {"latents": latents.to(device=device, dtype=dtype) * first_sigma(scheduler)}


def clean_latents(family: Any, components: Any, image: Tensor, batch: int, generator: Generators) -> Tensor:
    """The latents of pictures (or latents, as they are), one for each item of the batch; (B, C, h, w)."""
    check_generators(generator, batch)
    vae = components.get("vae")
    if vae is None or image.shape[1] != family.latent_format(components).channels:
        source = match_batch(image, batch, "images") if isinstance(generator, (list, tuple)) else image
        image = encode_pixels(family, vae, source, generator)
    return match_batch(image, batch, "images")


def start_from_image(
    family: Any,
    components: Any,
    scheduler: Any,
    device: torch.device,
    batch: int,
    image: Tensor,
    timesteps: Tensor,
    conds: dict[str, Cond] | None = None,
    latents: Tensor | None = None,
    generator: Generators = None,
    denoising_start: float | None = None,
) -> dict[str, Any]:
    """The picture's latents with the noise of the first step added (SDEdit, Meng et al. 2021).

    A tensor that has the channels of latents is taken for latents. With ``denoising_start`` the
    picture is half-denoised already, and no noise is added.
    """
    dtype = dtype_of(conds, components[family.denoiser])
    if latents is not None:
        check_generators(generator, batch)
        return {"latents": latents.to(device=device, dtype=dtype)}
    clean = clean_latents(family, components, image.to(device=device, dtype=dtype), batch, generator)
    if denoising_start is not None:
        return {"latents": clean, "image_latents": clean}
    noise = randn_tensor(clean.shape, generator=generator, device=device, dtype=dtype)
    noisy = noised(scheduler, clean, noise, timesteps[:1].repeat(batch))
    noisy, clean, noise = (pack(x, family.packing) for x in (noisy, clean, noise))
    return {"latents": noisy, "image_latents": clean, "noise": noise}
