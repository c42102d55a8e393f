"""Which face does which task of which family: the table behind Auto pipelines and ``load``."""

from __future__ import annotations

from typing import Any

from ..core import registry

# family -> task -> class, in the order in which a family is looked for
FACES: dict[str, dict[str, str]] = {
    "stable-diffusion": {
        "text2image": "StableDiffusionPipeline",
        "image2image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
    "stable-diffusion-xl": {
        "text2image": "StableDiffusionXLPipeline",
        "image2image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    },
    "stable-diffusion-controlnet": {
        "text2image": "StableDiffusionControlNetPipeline",
        "image2image": "StableDiffusionControlNetImg2ImgPipeline",
        "inpaint": "StableDiffusionControlNetInpaintPipeline",
    },
    "stable-diffusion-xl-controlnet": {
        "text2image": "StableDiffusionXLControlNetPipeline",
        "image2image": "StableDiffusionXLControlNetImg2ImgPipeline",
        "inpaint": "StableDiffusionXLControlNetInpaintPipeline",
    },
    "stable-diffusion-3": {
        "text2image": "StableDiffusion3Pipeline",
        "image2image": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
    },
    "qwenimage": {
        "text2image": "QwenImagePipeline",
        "image2image": "QwenImageImg2ImgPipeline",
        "inpaint": "QwenImageInpaintPipeline",
    },
    "qwenimage-edit": {"image2image": "QwenImageEditPipeline"},
    "pixart-alpha": {"text2image": "PixArtAlphaPipeline"},
    "pixart-sigma": {"text2image": "PixArtSigmaPipeline"},
    "dit": {"text2image": "DiTPipeline"},
    "stable-diffusion-3-controlnet": {
        "text2image": "StableDiffusion3ControlNetPipeline",
        "inpaint": "StableDiffusion3ControlNetInpaintingPipeline",
    },
    "flux": {
        "text2image": "FluxPipeline",
        "image2image": "FluxImg2ImgPipeline",
        "inpaint": "FluxInpaintPipeline",
    },
    "flux-kontext": {"text2image": "FluxKontextPipeline", "image2image": "FluxKontextPipeline"},
    "flux-fill": {"inpaint": "FluxFillPipeline"},
    "flux-controlnet": {
        "text2image": "FluxControlNetPipeline",
        "image2image": "FluxControlNetImg2ImgPipeline",
        "inpaint": "FluxControlNetInpaintPipeline",
    },
    "flux-control": {
        "text2image": "FluxControlPipeline",
        "image2image": "FluxControlImg2ImgPipeline",
        "inpaint": "FluxControlInpaintPipeline",
    },
    "lcm": {
        "text2image": "LatentConsistencyModelPipeline",
        "image2image": "LatentConsistencyModelImg2ImgPipeline",
    },
    "ddpm": {"text2image": "DDPMPipeline"},
    "ddim": {"text2image": "DDIMPipeline"},
}


def family_of(class_name: str) -> str | None:
    """The family that a pipeline class belongs to."""
    return next((family for family, tasks in FACES.items() if class_name in tasks.values()), None)


# family -> the one with control networks beside its own, where that is not its name with "-controlnet"
_CONTROLLED = {"flux-control": "flux-controlnet"}
_SUFFIX = "-controlnet"


def _controlled(family: str, wanted: bool) -> str:
    """The family with control networks that belongs to ``family``, or without; itself if it is of that kind."""
    if family.endswith(_SUFFIX) == wanted:
        return family
    return _CONTROLLED.get(family, family + _SUFFIX) if wanted else family.removesuffix(_SUFFIX)


def face_for(class_name: str, task: str, controlnet: bool | None = None) -> Any:
    """The class that does ``task`` with the components of ``class_name``.

    Args:
        controlnet: whether it has control networks; ``None``: as ``class_name`` has.

    Raises:
        ValueError: an unknown class, or a family that has no such face.
    """
    family = family_of(class_name)
    if family is None:
        known = sorted(name for tasks in FACES.values() for name in tasks.values())
        raise ValueError(f"{class_name} belongs to no family that Effusion knows; it knows {known}")
    if controlnet is not None:
        family = _controlled(family, controlnet)
    if family not in FACES:
        known = sorted(name for name in FACES if name.endswith(_SUFFIX))
        raise ValueError(f"{class_name} has no pipeline with control networks; there are {known}")
    if task not in FACES[family]:
        raise ValueError(f"{class_name} ({family}) has no pipeline for {task}; it has {FACES[family]}")
    return registry.find_class("diffusers", FACES[family][task])
