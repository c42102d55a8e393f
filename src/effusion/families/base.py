"""What a family is: a record that binds networks to blocks, and the standard lists it gets for it.

Tasks enter at seams (start latents, extra channels or tokens, the blend after a step), so a
family that fills in this record has text2image, image2image and inpaint on its first day.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..blocks import decode, denoise, engine, inpaint, latents
from ..blocks.timesteps import end_at_fraction, retrieve_timesteps, start_at_fraction, start_at_strength
from ..core.errors import UnsupportedTask
from ..core.types import LatentFormat, ModelInput

_Rows = list[tuple[str, engine.BlockFunction]]
TASKS = ("text2image", "image2image", "inpaint")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as in tables and messages.
        denoiser: name of the component that predicts.
        check: block that validates the call and returns ``batch, height, width, guide``.
        encode: block from prompts to ``conds`` (guidance branch -> :class:`~effusion.core.types.Cond`).
        call: ``(network, ModelInput) -> prediction``.
        condition: block for what depends on sizes and latents, or ``None``.
        schedule: block that sets the timesteps.
        defaults: task -> defaults of the call that differ from the blocks' own.
        format: the latent format of a VAE.
        upcast_vae: whether a half-precision VAE that says ``force_upcast`` is run in float32.
        packing: side of the square of latents that makes one token; 1 for networks on latents themselves.
        one_by_one: whether guidance branches are evaluated in turn instead of as one batch.
        resizes_image: whether image2image brings the picture to ``height`` x ``width``.
        masks_by_channels: whether a network with extra channels is taken to read the mask through them.
        starts: task -> the blocks from the picture to the start latents, for tasks beyond the standard ones.
        tasks: those that its ports allow.
        edit: last word on a task's list of blocks.
    """

    name: str
    denoiser: str
    check: engine.BlockFunction
    encode: engine.BlockFunction
    call: Callable[[Any, ModelInput], Tensor]
    condition: engine.BlockFunction | None = None
    schedule: engine.BlockFunction = field(default_factory=lambda: set_timesteps)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: Callable[[Any], LatentFormat] = latents.vae_format
    upcast_vae: bool = False
    packing: int = 1
    one_by_one: bool = False
    resizes_image: bool = False
    masks_by_channels: bool = True
    starts: Mapping[str, Callable[[Family], _Rows]] = field(default_factory=dict)
    tasks: tuple[str, ...] = TASKS
    edit: Callable[[engine.BlockList, str], None] | None = None

    def blocks(self, task: str) -> engine.BlockList:
        """The ordered, editable list of blocks that does ``task``.

        Raises:
            UnsupportedTask: the family has no port for it.
        """
        if task not in self.tasks:
            raise UnsupportedTask(f"{self.name} can't do {task}; it can do {', '.join(self.tasks)}")
        rows: list[tuple[str, engine.BlockFunction]] = [("check", self.check), ("encode", self.encode)]
        rows += {**_START, **self.starts}[task](self)
        if self.condition is not None:
            rows.append(("condition", self.condition))
        rows += [("denoise", denoise.denoise), ("decode", decode.decode)]
        if task == "inpaint":
            rows.append(("paste_back", decode.paste_back))
        found = engine.BlockList(rows)
        if self.edit is not None:
            self.edit(found, task)
        return found

    def latent_format(self, components: Mapping[str, Any]) -> LatentFormat:
        """How latents and pixels relate, read off the VAE; pixels themselves where there is none.

        A pipeline that was loaded with ``vae=None`` still makes latents: of the usual size, for another one to decode.
        """
        vae = components.get("vae")
        if vae is not None:
            return self.format(vae)
        if "vae" in components:
            return LatentFormat(self.model_channels(components) // self.packing**2)
        return LatentFormat(self.model_channels(components), downscale=1)

    def model_channels(self, components: Mapping[str, Any]) -> int:
        """Input channels of the network, extra ones included."""
        return int(setting(components[self.denoiser], "in_channels", 4))

    def noise_channels(self, components: Mapping[str, Any]) -> int:
        """Channels of the noise to start from: those of the latents."""
        return self.latent_format(components).channels


def setting(model: Any, name: str, default: Any = None) -> Any:
    """An entry of a network's configuration; a stand-in (a traced module, say) may have it as an attribute."""
    config = getattr(model, "config", None)
    found = getattr(config, name, None) if config is not None else None
    return found if found is not None else getattr(model, name, default)


def require_component(components: Mapping[str, Any], name: str, instead: str) -> Any:
    """The component ``name``; if the pipeline was loaded without it, an error that says what to pass ``instead``."""
    component = components.get(name)
    if component is None:
        raise ValueError(f"this pipeline has no `{name}`: load one, or pass {instead}")
    return component


def predict(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Call a network with those ``kwargs`` that are set; a stand-in need not know ``return_dict``."""
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if hasattr(model, "config"):
        return model(*args, **kwargs, return_dict=False)[0]  # type: ignore[no-any-return]
    answer = model(*args, **kwargs)
    return answer.sample if hasattr(answer, "sample") else answer[0]  # type: ignore[no-any-return]


def with_channels(inputs: ModelInput) -> Tensor:
    """The network's input with its extra channels; (B, C + C', h, w)."""
    return inputs.x if inputs.channels is None else torch.cat([inputs.x, inputs.channels], dim=1)


def set_timesteps(
    scheduler: Any,
    device: torch.device,
    num_inference_steps: int = 50,
    timesteps: Any = None,
    sigmas: Any = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
) -> dict[str, Any]:
    """The timesteps of the run: all of them, the last ``strength`` part, or those between two fractions."""
    all_steps, count = retrieve_timesteps(scheduler, num_inference_steps, device, timesteps, sigmas)
    if denoising_start is not None:
        all_steps, count = start_at_fraction(scheduler, denoising_start)
    elif strength is not None:
        all_steps, count = start_at_strength(scheduler, count, strength)
    if denoising_end is not None:
        all_steps = end_at_fraction(scheduler, all_steps, denoising_end)
        count = len(all_steps)
    if len(all_steps) < 1:
        raise ValueError(
            f"no denoising step is left of {num_inference_steps} at strength {strength}, denoising_start "
            f"{denoising_start}, denoising_end {denoising_end}; raise `num_inference_steps` or widen the range"
        )
    return {"timesteps": all_steps, "num_inference_steps": count}


def read_image(
    family: Family, image: Any, image_processor: Any, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """The caller's picture as pixels in [-1, 1]; (B, 3, H, W). The run has the picture's size, or gives it its own."""
    if image is None:
        raise ValueError("`image` is missing: image2image needs a picture, a tensor, or a list of them")
    if family.resizes_image:
        return {"image": image_processor.preprocess(image, height=height, width=width).to(torch.float32)}
    pixels = image_processor.preprocess(image)
    return {"image": pixels, "height": pixels.shape[-2], "width": pixels.shape[-1]}


_START: dict[str, Callable[[Family], _Rows]] = {
    "text2image": lambda f: [("set_timesteps", f.schedule), ("start", latents.start_from_noise)],
    "image2image": lambda f: [
        ("read_image", read_image),
        ("set_timesteps", f.schedule),
        ("start", latents.start_from_image),
    ],
    "inpaint": lambda f: [
        ("set_timesteps", f.schedule),
        ("read_image", inpaint.read_image_and_mask),
        ("start", inpaint.start_inside_mask),
        ("skip_mask_noise", inpaint.skip_mask_noise),
        ("apply_mask", inpaint.apply_mask),
    ],
}
