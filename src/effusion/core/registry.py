"""Which public name lives where: the one table behind ``import effusion`` and ``model_index.json``.

Nothing is imported here. A public class is found by its name when it is first used, and a name in
a checkpoint is looked up in these tables only: a file can't make us import anything else.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from .errors import CheckpointError
from .optional import require

# module -> the public names in it
MODULES: dict[str, tuple[str, ...]] = {
    "effusion.core.config": ("ConfigMixin",),
    "effusion.core.errors": ("BudgetError", "PlanConflict", "CheckpointError", "UntrustedCode", "UnsupportedTask"),
    "effusion.schedulers.base": ("AysSchedules", "KarrasDiffusionSchedulers", "SchedulerMixin", "SchedulerOutput"),
    "effusion.schedulers.cogvideox": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    "effusion.schedulers.consistency": ("CMStochasticIterativeScheduler", "LCMScheduler", "TCDScheduler"),
    "effusion.schedulers.ddim": ("DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler"),
    "effusion.schedulers.ddpm": ("DDPMParallelScheduler", "DDPMScheduler"),
    "effusion.schedulers.deis": ("DEISMultistepScheduler",),
    "effusion.schedulers.dpmsolver": (
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
    ),
    "effusion.schedulers.edm": (
        "CosineDPMSolverMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
    ),
    "effusion.schedulers.euler": ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    "effusion.schedulers.flow_match": (
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
    ),
    "effusion.schedulers.heun": (
        "DPMSolverSDEScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
    ),
    "effusion.schedulers.lms": ("LMSDiscreteScheduler",),
    "effusion.schedulers.names": ("by_name",),
    "effusion.schedulers.pndm": ("IPNDMScheduler", "PNDMScheduler"),
    "effusion.schedulers.sasolver": ("SASolverScheduler",),
    "effusion.schedulers.score_ve": ("ScoreSdeVeScheduler",),
    "effusion.schedulers.unclip": ("UnCLIPScheduler",),
    "effusion.schedulers.unipc": ("UniPCMultistepScheduler",),
    "effusion.schedulers.vq_diffusion": ("VQDiffusionScheduler",),
    "effusion.nn.dispatch": ("attention_backend",),
    "effusion.nn.backend_names": ("AttentionBackendName",),
    "effusion.nn.hooks": ("HookRegistry",),
    # networks
    "effusion.models.auto_model": ("AutoModel",),
    "effusion.models.base": ("ModelMixin",),
    "effusion.models.autoencoder_kl": ("AutoencoderKL",),
    "effusion.models.autoencoder_kl_qwenimage": ("AutoencoderKLQwenImage",),
    "effusion.models.unet_2d_condition": ("UNet2DConditionModel", "UNet2DConditionOutput"),
    "effusion.models.unet_2d": ("UNet2DModel", "UNet2DOutput"),
    "effusion.models.autoencoder_tiny": ("AutoencoderTiny", "AutoencoderTinyOutput"),
    "effusion.models.autoencoder_asym_kl": ("AsymmetricAutoencoderKL",),
    "effusion.nn.vae": ("AutoencoderKLOutput", "DecoderOutput"),
    "effusion.models.controlnet": ("ControlNetModel", "MultiControlNetModel"),
    "effusion.models.controlnet_flux": ("FluxControlNetModel", "FluxMultiControlNetModel"),
    "effusion.models.controlnet_sd3": ("SD3ControlNetModel", "SD3MultiControlNetModel"),
    "effusion.models.flux_redux": ("ReduxImageEncoder",),
    "effusion.models.transformer_2d": ("Transformer2DModel",),
    "effusion.models.transformer_dit": ("DiTTransformer2DModel",),
    "effusion.models.transformer_flux": ("FluxTransformer2DModel",),
    "effusion.models.transformer_pixart": ("PixArtTransformer2DModel",),
    "effusion.models.transformer_qwenimage": ("QwenImageTransformer2DModel",),
    "effusion.models.transformer_sd3": ("SD3Transformer2DModel",),
    "effusion.models.safety_checker": ("StableDiffusionSafetyChecker",),
    # packed weights
    "effusion.quant.gguf": ("GGUFQuantizationConfig",),
    # pipelines
    "effusion.pipelines.anything": ("load",),
    "effusion.pipelines.loaders": ("FromOriginalModelMixin",),
    "effusion.pipelines.base": ("DiffusionPipeline",),
    "effusion.pipelines.mixins": ("StableDiffusionMixin",),
    "effusion.pipelines.modular": ("ModularPipeline",),
    "effusion.pipelines.auto": (
        "AutoPipeline",
        "AutoPipelineForText2Image",
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
    ),
    "effusion.pipelines.outputs": (
        "ImagePipelineOutput",
        "StableDiffusionPipelineOutput",
        "StableDiffusionXLPipelineOutput",
        "StableDiffusion3PipelineOutput",
        "FluxPipelineOutput",
        "FluxPriorReduxPipelineOutput",
        "QwenImagePipelineOutput",
    ),
    "effusion.pipelines.callbacks": (
        "PipelineCallback",
        "MultiPipelineCallbacks",
        "SDCFGCutoffCallback",
        "SDXLCFGCutoffCallback",
        "SDXLControlnetCFGCutoffCallback",
        "SD3CFGCutoffCallback",
    ),
    "effusion.pipelines.stable_diffusion": (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    ),
    "effusion.pipelines.stable_diffusion_xl": (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    "effusion.pipelines.stable_diffusion_control": (
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    "effusion.pipelines.stable_diffusion_xl_control": (
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    "effusion.pipelines.latent_consistency": (
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    "effusion.pipelines.unconditional": ("DDPMPipeline", "DDIMPipeline"),
    "effusion.pipelines.stable_diffusion_3": (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ),
    "effusion.pipelines.stable_diffusion_3_control": (
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    ),
    "effusion.pipelines.pixart": ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    "effusion.pipelines.dit": ("DiTPipeline",),
    "effusion.pipelines.flux_control": (
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxPriorReduxPipeline",
    ),
    "effusion.pipelines.qwen_image": (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
    ),
    "effusion.pipelines.flux": (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
    ),
    # image processing
    "effusion.blocks.images": ("VaeImageProcessor",),
    "effusion.blocks.processors": ("InpaintProcessor", "PixArtImageProcessor"),
    # training
    "effusion.training.ema": ("EMAModel",),
    "effusion.training.rates": (
        "get_constant_schedule",
        "get_constant_schedule_with_warmup",
        "get_cosine_schedule_with_warmup",
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "get_linear_schedule_with_warmup",
        "get_polynomial_decay_schedule_with_warmup",
        "get_scheduler",
    ),
}

# names that scripts import from here and that live in other packages, or in a view of ours
BORROWED: dict[str, str] = {"AutoTokenizer": "transformers"}
_UTILS = """OptionalDependencyNotAvailable logging is_inflect_available is_invisible_watermark_available
is_librosa_available is_note_seq_available is_onnx_available is_scipy_available is_torch_available
is_torchsde_available is_transformers_available is_transformers_version is_unidecode_available"""
BORROWED |= dict.fromkeys(_UTILS.split(), "effusion.utils")

SUBMODULES: tuple[str, ...] = ("core", "nn", "schedulers", "weights", "quant", "placement", "models", "adapters")
SUBMODULES += ("blocks", "families", "pipelines", "training", "cli", "demo")
# the ecosystem's paths
SUBMODULES += ("utils", "image_processor", "configuration_utils", "callbacks", "hooks", "loaders", "modular_pipelines")
SUBMODULES += ("optimization", "quantizers", "training_utils")


def public_names() -> dict[str, str]:
    """Public name -> module that defines it."""
    return {name: module for module, names in MODULES.items() for name in names}


def names_under(package: str) -> dict[str, str]:
    """The public names that live in ``package`` or below."""
    return {n: m for n, m in public_names().items() if m == package or m.startswith(package + ".")}


def find_class(library: str, name: str) -> Any:
    """The class that ``[library, name]`` of a ``model_index.json`` means.

    ``diffusers`` (and ``effusion``, and the names of the pipeline modules that old files use) mean
    our classes, ``transformers`` the ones of that package.

    Raises:
        CheckpointError: an unknown library or class.
        MissingExtra: ``transformers`` is needed and not installed.
    """
    if library == "transformers":
        module = require("transformers", f"the component class {name}")
        found = getattr(module, name, None) if name.isidentifier() and not name.startswith("_") else None
        if not isinstance(found, type):
            raise CheckpointError(f"transformers {module.__version__} has no class {name!r}; a newer one may")
        return found
    names = public_names()
    if name in names:
        return getattr(importlib.import_module(names[name]), name)
    raise CheckpointError(f"{library}.{name}: Effusion has no class of this name; see `effusion env` for its version")


COMPONENTS = ("ModelMixin", "SchedulerMixin", "PreTrainedModel")


def find_component(name: Any, label: str, library: str = "diffusers", bases: Sequence[str] = COMPONENTS) -> Any:
    """Our network or scheduler ``name``: of all public names the only ones that the configuration ``label`` may mean.

    Raises:
        CheckpointError: there is none of this name.
    """
    try:
        found = find_class(library, str(name))
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    if not isinstance(found, type) or not {base.__name__ for base in found.__mro__[1:]} & set(bases):
        raise CheckpointError(f"{label}: {library}.{name} is nothing that a configuration can name")
    return found
