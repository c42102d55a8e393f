"""Pictures in and out: PIL, numpy and torch images to the tensors that a VAE takes, and back.

Layouts: PIL images; numpy ``(B, H, W, C)`` or ``(H, W[, C])`` in [0, 1]; torch ``(B, C, H, W)`` or ``(C, H, W)`` in
[0, 1]. A VAE takes ``(B, C, H, W)`` in [-1, 1]. A tensor with the VAE's latent channels is a latent and passes as is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.nn import functional as F

from ..core import log
from ..core.config import ConfigMixin, register_to_config

logger = log.get_logger(__name__)

Picture: TypeAlias = Image.Image
Array: TypeAlias = np.ndarray[Any, Any]
AnyImage: TypeAlias = Picture | Array | torch.Tensor
PipelineImageInput: TypeAlias = AnyImage | list[Picture] | list[Array] | list[torch.Tensor]
PipelineDepthInput: TypeAlias = PipelineImageInput
Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom

PIL_INTERPOLATION = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
OUTPUT_TYPES = ("latent", "pt", "np", "pil")
RESIZE_MODES = ("default", "fill", "crop")


def is_valid_image(image: Any) -> bool:
    """Whether ``image`` is one picture: PIL, or an array or tensor of two or three dimensions."""
    return isinstance(image, Image.Image) or (isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim in (2, 3))


def is_valid_image_imagelist(images: Any) -> bool:
    """Whether ``images`` is a picture, a batch of four dimensions, or a list of pictures."""
    return (
        _is_batch(images) or is_valid_image(images) or (isinstance(images, list) and all(map(is_valid_image, images)))
    )


def _is_batch(images: Any) -> bool:
    return isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4


class VaeImageProcessor(ConfigMixin):
    """Prepares pictures for a VAE, and makes pictures of what it decodes.

    Args:
        do_resize: bring pictures to the wanted size, a multiple of ``vae_scale_factor``.
        vae_scale_factor: pixels per latent, along one side.
        vae_latent_channels: a tensor with this many channels is taken for a latent and left alone.
        resample: filter for PIL images: ``lanczos``, ``bicubic``, ``bilinear`` or ``nearest``.
        reducing_gap: shrink in two steps, faster for large PIL images; see ``PIL.Image.resize``.
        do_normalize: [0, 1] to [-1, 1] on the way in, and back on the way out.
        do_binarize: masks: below 0.5 becomes 0, the rest 1.
        do_convert_rgb: PIL images to three channels first.
        do_convert_grayscale: PIL images to one channel first.
    """

    config_name = "preprocessor_config.json"

    @register_to_config
    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        vae_latent_channels: int = 4,
        resample: str = "lanczos",
        reducing_gap: int | None = None,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_rgb: bool = False,
        do_convert_grayscale: bool = False,
    ) -> None:
        if do_convert_rgb and do_convert_grayscale:
            raise ValueError("`do_convert_rgb` and `do_convert_grayscale` exclude each other; set one of them")
        if resample not in PIL_INTERPOLATION:
            raise ValueError(f"resample={resample!r}; allowed are {', '.join(PIL_INTERPOLATION)}")

    # -- between the layouts ---------------------------------------------------------------------

    @staticmethod
    def numpy_to_pil(images: Array) -> list[Picture]:
        """``(B, H, W, C)`` or ``(H, W, C)`` in [0, 1] to PIL; one channel gives gray pictures."""
        images = images[None] if images.ndim == 3 else images
        pixels = (images * 255).round().astype(np.uint8)
        return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]

    @staticmethod
    def pil_to_numpy(images: list[Picture] | Picture) -> Array:
        """PIL to float32 ``(B, H, W[, C])`` in [0, 1]; all pictures of one size and mode."""
        images = images if isinstance(images, list) else [images]
        return np.stack([np.array(image).astype(np.float32) / 255.0 for image in images])

    @staticmethod
    def numpy_to_pt(images: Array) -> torch.Tensor:
        """``(B, H, W[, C])`` to ``(B, C, H, W)``."""
        images = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(images.transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: torch.Tensor) -> Array:
        """``(B, C, H, W)`` to float32 ``(B, H, W, C)``."""
        pixels: Array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return pixels

    @staticmethod
    def normalize(images: Any) -> Any:
        """[0, 1] to [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Any) -> Any:
        """[-1, 1] to [0, 1], clipped."""
        shifted = images * 0.5 + 0.5
        return shifted.clamp(0, 1) if isinstance(shifted, torch.Tensor) else shifted.clip(0, 1)

    # -- pictures --------------------------------------------------------------------------------

    @staticmethod
    def convert_to_rgb(image: Picture) -> Picture:
        return image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Picture) -> Picture:
        return image.convert("L")

    @staticmethod
    def blur(image: Picture, blur_factor: int = 4) -> Picture:
        """Gaussian blur of radius ``blur_factor``, as used to soften a mask's edge."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    def binarize(self, image: torch.Tensor) -> torch.Tensor:
        """0 below 0.5, 1 from there on."""
        return (image >= 0.5).to(image.dtype)

    @staticmethod
    def get_crop_region(mask_image: Picture, width: int, height: int, pad: int = 0) -> Box:
        """The smallest box around the mask's white, widened by ``pad`` and to the ratio ``width / height``.

        The box stays inside the picture; where it would not, it is moved, and at last cut.

        Raises:
            ValueError: the mask is black everywhere.
        """
        found = mask_image.convert("L").getbbox()
        if found is None:
            raise ValueError("the mask is black everywhere: nothing to crop to; white marks what is to be repainted")
        limit_x, limit_y = mask_image.size
        left, top = max(found[0] - pad, 0), max(found[1] - pad, 0)
        right, bottom = min(found[2] + pad, limit_x), min(found[3] + pad, limit_y)
        wanted = width / height
        if (right - left) / (bottom - top) > wanted:
            top, bottom = _widen(top, bottom, (right - left) / wanted, limit_y)
        else:
            left, right = _widen(left, right, (bottom - top) * wanted, limit_x)
        return left, top, right, bottom

    def get_default_height_width(
        self, image: AnyImage, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """``(height, width)``, taken from ``image`` where not given, rounded down to ``vae_scale_factor``."""
        if isinstance(image, Image.Image):
            own = image.height, image.width
        elif isinstance(image, torch.Tensor):
            own = image.shape[2], image.shape[3]
        else:
            own = image.shape[1], image.shape[2]
        step = int(self.config.vae_scale_factor)
        high, wide = (given or found for given, found in zip((height, width), own, strict=True))
        return high - high % step, wide - wide % step

    def resize(self, image: Any, height: int, width: int, resize_mode: str = "default") -> Any:
        """``image`` at ``height`` x ``width``.

        ``default`` stretches. ``fill`` (PIL only) keeps the ratio, fits the whole picture in and smears its border
        over the rest; ``crop`` (PIL only) keeps the ratio, covers the whole area and cuts what stands over.
        """
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode={resize_mode!r}; allowed are {', '.join(RESIZE_MODES)}")
        if isinstance(image, Image.Image):
            if resize_mode == "fill":
                return self._resize_and_fill(image, width, height)
            if resize_mode == "crop":
                return self._resize_and_crop(image, width, height)
            resample = PIL_INTERPOLATION[self.config.resample]
            return image.resize((width, height), resample=resample, reducing_gap=self.config.reducing_gap)
        if resize_mode != "default":
            raise ValueError(f"resize_mode={resize_mode!r} is for PIL images, not for a {type(image).__name__}")
        if isinstance(image, np.ndarray):
            return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), size=(height, width)))
        return F.interpolate(image, size=(height, width))

    def _resize_and_fill(self, image: Picture, width: int, height: int) -> Picture:
        taller = width / height < image.width / image.height  # the wanted area has room above and below
        resized, at = _scaled_to(image, width, height, by_width=taller)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(resized, box=at)
        if taller and at[1] > 0:
            for edge, y in ((0, 0), (resized.height, at[1] + resized.height)):
                canvas.paste(resized.resize((width, at[1]), box=(0, edge, width, edge)), box=(0, y))
        elif not taller and at[0] > 0:
            for edge, x in ((0, 0), (resized.width, at[0] + resized.width)):
                canvas.paste(resized.resize((at[0], height), box=(edge, 0, edge, height)), box=(x, 0))
        return canvas

    def _resize_and_crop(self, image: Picture, width: int, height: int) -> Picture:
        resized, at = _scaled_to(image, width, height, by_width=width / height > image.width / image.height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(resized, box=at)
        return canvas

    def apply_overlay(
        self, mask: Picture, init_image: Picture, image: Picture, crop_coords: Box | None = None
    ) -> Picture:
        """``image`` where the mask is white, ``init_image`` elsewhere.

        With ``crop_coords``, ``image`` is a detail that belongs into this box of ``init_image``.
        """
        kept = Image.new("RGBa", init_image.size)
        kept.paste(init_image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            detail = self._resize_and_crop(image, right - left, bottom - top)
            image = Image.new("RGB", init_image.size)
            image.paste(detail, (left, top))
        whole = image.convert("RGBA")
        whole.alpha_composite(kept.convert("RGBA"))
        return whole.convert("RGB")

    # -- in and out ------------------------------------------------------------------------------

    def preprocess(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: Box | None = None,
    ) -> torch.Tensor:
        """Pictures as ``(B, C, height, width)``, in [-1, 1] if ``do_normalize``; latents come back as they are.

        Args:
            image: one picture, a list of them, or a batch; PIL, numpy or torch.
            height: wanted height in pixels, the picture's own where not given; rounded down like ``width``.
            resize_mode: see :meth:`resize`.
            crops_coords: box that PIL images are cut to first.

        Raises:
            ValueError: something else than pictures, or pictures of different sizes in one batch.
        """
        images = self._as_list(image)
        if isinstance(images[0], Image.Image):
            tensor = self._from_pil(images, height, width, resize_mode, crops_coords)
        elif isinstance(images[0], np.ndarray):
            tensor = self.numpy_to_pt(self._batched(images, np.concatenate, np.stack))
            tensor = self._fit(tensor, height, width)
        else:
            tensor = self._batched(images, torch.cat, torch.stack)
            if self.config.do_convert_grayscale and tensor.ndim == 3:
                tensor = tensor.unsqueeze(1)
            if tensor.shape[1] == self.config.vae_latent_channels:
                return tensor  # type: ignore[no-any-return]
            tensor = self._fit(tensor, height, width)
        if self.config.do_normalize:
            if tensor.min() < 0:
                logger.warning("the image has values below 0, so it is taken to be in [-1, 1] already; [0, 1] is usual")
            else:
                tensor = self.normalize(tensor)
        return self.binarize(tensor) if self.config.do_binarize else tensor

    def _as_list(self, image: Any) -> list[Any]:
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 3 and self.config.do_convert_grayscale:
            image = _gray_batch(image)
        if isinstance(image, list) and image and all(_is_batch(i) for i in image):
            return image  # a list of batches is one batch
        if not is_valid_image_imagelist(image) or (isinstance(image, list) and not image):
            what = f"a list with {[type(i).__name__ for i in image[:4]]}" if isinstance(image, list) else type(image)
            raise ValueError(f"expected a PIL image, numpy array, torch tensor or a list of one of them, got {what}")
        return image if isinstance(image, list) else [image]

    @staticmethod
    def _batched(images: list[Any], cat: Callable[[list[Any]], Any], stack: Callable[[list[Any]], Any]) -> Any:
        shapes = {tuple(i.shape[1:] if i.ndim == 4 else i.shape) for i in images}
        if len(shapes) > 1:
            raise ValueError(f"pictures of one batch must have one shape, got {sorted(shapes)}; resize them first")
        return cat(images) if images[0].ndim == 4 else stack(images)

    def _from_pil(
        self, images: list[Any], height: int | None, width: int | None, resize_mode: str, crops_coords: Box | None
    ) -> torch.Tensor:
        if crops_coords is not None:
            images = [i.crop(crops_coords) for i in images]
        if self.config.do_resize:
            height, width = self.get_default_height_width(images[0], height, width)
            images = [self.resize(i, height, width, resize_mode) for i in images]
        if self.config.do_convert_rgb:
            images = [self.convert_to_rgb(i) for i in images]
        elif self.config.do_convert_grayscale:
            images = [self.convert_to_grayscale(i) for i in images]
        kinds = {(i.size, i.mode) for i in images}
        if len(kinds) > 1:
            raise ValueError(f"pictures of one batch must have one size and mode, got {sorted(kinds)}")
        return self.numpy_to_pt(self.pil_to_numpy(images))

    def _fit(self, tensor: torch.Tensor, height: int | None, width: int | None) -> torch.Tensor:
        if not self.config.do_resize:
            return tensor
        height, width = self.get_default_height_width(tensor, height, width)
        return F.interpolate(tensor, size=(height, width))

    def postprocess(
        self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> Any:
        """What a VAE decoded, ``(B, C, H, W)``, as ``output_type``: ``pil``, ``np``, ``pt`` or ``latent`` (unchanged).

        Args:
            do_denormalize: for each picture whether it is in [-1, 1]; all as ``do_normalize`` says, if not given.
        """
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"expected the tensor that a VAE decodes, got {type(image).__name__}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}; allowed are {', '.join(OUTPUT_TYPES)}")
        if output_type == "latent":
            return image
        image = self._denormalize_conditionally(image, do_denormalize)
        if output_type == "pt":
            return image
        pixels = self.pt_to_numpy(image)
        return pixels if output_type == "np" else self.numpy_to_pil(pixels)

    def _denormalize_conditionally(
        self, images: torch.Tensor, do_denormalize: Sequence[bool] | None = None
    ) -> torch.Tensor:
        if do_denormalize is None:
            do_denormalize = [bool(self.config.do_normalize)] * len(images)
        if all(do_denormalize):
            images = self.denormalize(images)
            return images
        return torch.stack([self.denormalize(i) if do else i for i, do in zip(images, do_denormalize, strict=True)])


def _widen(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """``[low, high)`` widened around its middle to ``wanted``, moved and cut to stay in ``[0, limit)``."""
    more = int(wanted - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def _scaled_to(image: Picture, width: int, height: int, by_width: bool) -> tuple[Picture, tuple[int, int]]:
    """``image`` scaled to ``width`` or to ``height``, and the corner that centres it in both."""
    size = (width, image.height * width // image.width) if by_width else (image.width * height // image.height, height)
    resized = image.resize(size, resample=Image.Resampling.LANCZOS)
    return resized, (width // 2 - size[0] // 2, height // 2 - size[1] // 2)


def _gray_batch(image: Any) -> Any:
    """Three dimensions without channels as a batch of one channel, in the layout of its kind."""
    if isinstance(image, torch.Tensor):
        return image.unsqueeze(1)  # (B, H, W) -> (B, 1, H, W)
    return image[None] if image.shape[-1] == 1 else image[..., None]  # (H, W, 1) or (B, H, W)
