"""A pipeline file in the shape of the community's, and the classes that such files inherit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.pipelines import tiny

import effusion
from effusion.core.errors import NotBuilt

FILE = '''
import inspect
from typing import Any, Callable, Dict, List, Optional, Union

import torch
from packaging import version
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.models import AutoencoderKL, ImageProjection, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.lora import adjust_lora_scale_text_encoder
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import (
    USE_PEFT_BACKEND,
    deprecate,
    is_torch_xla_available,
    logging,
    replace_example_docstring,
    scale_lora_layers,
    unscale_lora_layers,
)
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> pipe("a cat")
        ```
"""


class CommunityPipeline(
    DiffusionPipeline,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
    ):
        super().__init__()
        if scheduler is not None and getattr(scheduler.config, "steps_offset", 1) != 1:
            deprecate("steps_offset!=1", "1.0.0", "steps_offset should be 1", standard_warn=False)
            new_config = dict(scheduler.config)
            new_config["steps_offset"] = 1
            scheduler._internal_dict = FrozenDict(new_config)
        if safety_checker is None and requires_safety_checker:
            logger.warning("no safety checker")
        is_unet_version_less_0_9_0 = hasattr(unet.config, "_diffusers_version") and version.parse(
            version.parse(unet.config._diffusers_version).base_version
        ) < version.parse("0.9.0.dev0")
        if is_unet_version_less_0_9_0 and unet.config.sample_size < 64:
            new_config = dict(unet.config)
            new_config["sample_size"] = 64
            unet._internal_dict = FrozenDict(new_config)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    def encode_prompt(self, prompt, device, negative_prompt=None, lora_scale=None, clip_skip=None):
        if lora_scale is not None and isinstance(self, StableDiffusionLoraLoaderMixin):
            self._lora_scale = lora_scale
            if not USE_PEFT_BACKEND:
                adjust_lora_scale_text_encoder(self.text_encoder, lora_scale)
            else:
                scale_lora_layers(self.text_encoder, lora_scale)
        texts = []
        for text, clip_skip in ((negative_prompt or "", None), (prompt, clip_skip)):
            if isinstance(self, TextualInversionLoaderMixin):
                text = self.maybe_convert_prompt(text, self.tokenizer)
            ids = self.tokenizer(
                text,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            if clip_skip is None:
                texts.append(self.text_encoder(ids.to(device), attention_mask=None)[0])
            else:
                found = self.text_encoder(ids.to(device), attention_mask=None, output_hidden_states=True)
                found = found[-1][-(clip_skip + 1)]
                inner = getattr(self.text_encoder, "text_model", self.text_encoder)
                texts.append(inner.final_layer_norm(found))
        if self.text_encoder is not None and USE_PEFT_BACKEND and lora_scale is not None:
            unscale_lora_layers(self.text_encoder, lora_scale)
        embeds = torch.cat(texts)
        return embeds.to(dtype=self.text_encoder.dtype, device=device)

    def prepare_extra_step_kwargs(self, generator, eta):
        accepts_eta = "eta" in set(inspect.signature(self.scheduler.step).parameters.keys())
        extra_step_kwargs = {}
        if accepts_eta:
            extra_step_kwargs["eta"] = eta
        if "generator" in set(inspect.signature(self.scheduler.step).parameters.keys()):
            extra_step_kwargs["generator"] = generator
        return extra_step_kwargs

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: Union[str, List[str]] = None,
        height: Optional[int] = None,
        width: Optional[int] = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Optional[str] = None,
        eta: float = 0.0,
        generator: Optional[torch.Generator] = None,
        output_type: Optional[str] = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Optional[Dict[str, Any]] = None,
        guidance_rescale: float = 0.0,
        clip_skip: Optional[int] = None,
        callback_on_step_end: Optional[Callable[[int, int, Dict], None]] = None,
        **kwargs,
    ):
        """
        What it does.

        Examples:

        Returns:
            pictures
        """
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height = height or self.unet.config.sample_size * factor
        width = width or self.unet.config.sample_size * factor
        device = self._execution_device
        scale = cross_attention_kwargs.get("scale", None) if cross_attention_kwargs is not None else None
        embeds = self.encode_prompt(prompt, device, negative_prompt, lora_scale=scale, clip_skip=clip_skip)
        timesteps, num_inference_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device)
        shape = (1, self.unet.config.in_channels, height // factor, width // factor)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=embeds.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                latent_model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=embeds,
                    timestep_cond=None,
                    cross_attention_kwargs=cross_attention_kwargs,
                    added_cond_kwargs=None,
                    return_dict=False,
                )[0]
                noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
                if guidance_rescale > 0.0:
                    noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, guidance_rescale=guidance_rescale)
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    callback_on_step_end(self, i, t, {"latents": latents})
                progress_bar.update()
        image, has_nsfw_concept = latents, None
        if output_type != "latent":
            image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            processor = VaeImageProcessor(vae_scale_factor=factor)
            image = processor.postprocess(image, output_type=output_type, do_denormalize=[True])
        self.maybe_free_model_hooks()
        if not return_dict:
            return (image, has_nsfw_concept)
        return StableDiffusionPipelineOutput(images=image, nsfw_content_detected=has_nsfw_concept)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("community")
    pipe = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(root / "t"), requires_safety_checker=False)
    pipe.save_pretrained(root / "sd")
    (root / "code").mkdir()
    (root / "code" / "pipeline.py").write_text(FILE)
    return root


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7, "eta": 0.5}, {"clip_skip": 1}])
def test_a_file_of_the_communitys_runs_and_paints_what_the_face_paints(folder: Path, options: dict[str, Any]) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(
        folder / "sd", custom_pipeline=str(folder / "code"), trust_remote_code=True
    )
    assert type(pipe).__name__ == "CommunityPipeline"
    assert isinstance(pipe, effusion.DiffusionPipeline) and ">>> pipe(" in type(pipe).__call__.__doc__
    assert pipe.config.requires_safety_checker is False
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "negative_prompt": "a dog", "output_type": "np", **options}
    steps: list[int] = []
    ours = pipe(
        "a cat", generator=torch.Generator().manual_seed(0), cross_attention_kwargs={"scale": 0.5},
        callback_on_step_end=lambda p, i, t, kw: steps.append(i), **given,
    )  # fmt: skip
    face = effusion.StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    face.set_progress_bar_config(disable=True)
    expected = face("a cat", generator=torch.Generator().manual_seed(0), **given)
    assert steps == [0, 1, 2]
    assert abs(ours.images - expected.images).max() < 1e-5
    assert pipe.lora_scale == 0.5


def test_it_is_saved_and_offloaded_like_any_other(folder: Path, tmp_path: Path) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(
        folder / "sd", custom_pipeline=str(folder / "code"), trust_remote_code=True
    )
    pipe.save_pretrained(tmp_path)
    again = effusion.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)


# -- the classes ---------------------------------------------------------------------------------------


def test_every_class_of_the_peers_is_there_with_its_methods() -> None:
    peer, ours = importlib.import_module("diffusers.loaders"), effusion.loaders
    names = sorted(n for names in peer._import_structure.values() for n in names if n.endswith("Mixin"))
    assert len(names) > 40
    starts = ("load_", "set_", "unload_", "fuse", "unfuse", "enable", "disable", "delete")
    for name in names:
        theirs, own = getattr(peer, name), getattr(ours, name)
        assert own.__name__ == name
        if "Lora" in name:
            assert own._lora_loadable_modules == theirs._lora_loadable_modules
        for method in dir(theirs):
            if method.startswith(starts) and "_into_" not in method:
                assert hasattr(own, method), f"{name}.{method}"
    with pytest.raises(AttributeError):
        ours.NoSuchLoaderMixin  # noqa: B018


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("StableDiffusionLoraLoaderMixin", "load_lora_weights"),
        ("FluxLoraLoaderMixin", "fuse_lora"),
        ("TextualInversionLoaderMixin", "load_textual_inversion"),
        ("IPAdapterMixin", "load_ip_adapter"),
        ("PeftAdapterMixin", "load_lora_adapter"),
        ("UNet2DConditionLoadersMixin", "load_attn_procs"),
    ],
)
def test_what_is_not_built_says_so(name: str, method: str) -> None:
    class Mine(getattr(effusion.loaders, name)):  # type: ignore[misc]
        pass

    with pytest.raises(NotBuilt, match=rf"`{method}`.* is not built yet; \w+") as caught:
        getattr(Mine(), method)("owner/name")
    assert isinstance(caught.value, NotImplementedError)


def test_words_of_several_vectors() -> None:
    class Tokenizer:
        added_tokens_encoder = {"<cat>": 1, "<cat>_1": 2, "<cat>_2": 3, "<dog>": 4}

        def tokenize(self, text: str) -> list[str]:
            return text.split()

    ours, peer = effusion.loaders.TextualInversionLoaderMixin(), diffusers.loaders.TextualInversionLoaderMixin()
    for prompt in ("a <cat> and a <dog>", "nothing", ["<cat>", "<dog>"]):
        assert ours.maybe_convert_prompt(prompt, Tokenizer()) == peer.maybe_convert_prompt(prompt, Tokenizer())


def test_single_files_by_the_mixins(folder: Path, tmp_path: Path) -> None:
    pipe = effusion.StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    pipe.save_single_file(tmp_path / "one.safetensors")
    options = {"config": str(folder / "sd")}
    pipe.vae.save_single_file(tmp_path / "vae.safetensors")

    mixin = effusion.FromOriginalModelMixin.__dict__["from_single_file"].__func__
    loaded = mixin(effusion.AutoencoderKL, tmp_path / "vae.safetensors", **options, subfolder="vae")
    assert torch.equal(loaded.quant_conv.weight, pipe.vae.quant_conv.weight)
    with pytest.raises(TypeError, match="ModelMixin"):
        effusion.FromOriginalModelMixin.from_single_file(tmp_path / "vae.safetensors")

    class Mine(effusion.StableDiffusionPipeline):
        from_single_file = effusion.loaders.FromSingleFileMixin.__dict__["from_single_file"]

    assert type(Mine.from_single_file(tmp_path / "one.safetensors", **options)) is Mine


def test_the_weight_of_patched_projections() -> None:
    from effusion.models.lora import adjust_lora_scale_text_encoder

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model[0].lora_scale = 1.0
    adjust_lora_scale_text_encoder(model, 0.3)
    assert model[0].lora_scale == 0.3 and not hasattr(model[1], "lora_scale")
