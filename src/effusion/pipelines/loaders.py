"""What the ecosystem's classes inherit to load things: bases for pipelines and networks of other people.

Single files can be loaded. What adds to a network (LoRA, textual inversion, IP-Adapter) is not built yet: the classes
are there, so that files that inherit them can be read and run, and the methods that would need it say so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..core.errors import NotBuilt
from ..models.base import ModelMixin
from . import single_file

Class = TypeVar("Class", bound=type)
_MERGE = "merge it into the weights (the ecosystem's `fuse_lora` and `save_pretrained`), and load those"


def _lacks(what: str, instead: str, *names: str) -> Callable[[Class], Class]:
    """Decorator of a class: its methods ``names`` raise :class:`NotBuilt`."""

    def refusing(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise NotBuilt(f"`{name}`: {what} is not built yet; {instead}")

        method.__name__ = name
        method.__doc__ = f"Raises :class:`NotBuilt`: {what} is not built yet."
        return method

    def decorate(cls: Class) -> Class:
        for name in names:
            setattr(cls, name, refusing(name))
        return cls

    return decorate


# -- single files ------------------------------------------------------------------------------------


class FromSingleFileMixin:
    """For pipelines: :meth:`from_single_file`."""

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: Any, **kwargs: Any) -> Any:
        """Load a pipeline out of one file in its original layout; see :func:`~.single_file.load_single`."""
        return single_file.load_single(cls, pretrained_model_link_or_path, **kwargs)


class FromOriginalModelMixin:
    """For networks: :meth:`from_single_file`."""

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> Any:
        """Load this network out of a file in its original layout; see :meth:`ModelMixin.from_single_file`.

        Raises:
            TypeError: the class is no :class:`ModelMixin`.
        """
        if not issubclass(cls, ModelMixin):
            raise TypeError(f"{cls.__name__} has to inherit ModelMixin too, which is what can be loaded")
        load = ModelMixin.__dict__["from_single_file"].__func__
        return load(cls, pretrained_model_link_or_path_or_dict, **kwargs)


# -- what is added to networks -----------------------------------------------------------------------


_PIPELINE_LORA = """load_lora_weights unload_lora_weights fuse_lora unfuse_lora set_adapters disable_lora enable_lora
delete_adapters set_lora_device enable_lora_hotswap save_lora_weights lora_state_dict load_lora_into_unet
load_lora_into_transformer load_lora_into_text_encoder"""
_NETWORK_LORA = """load_lora_adapter save_lora_adapter add_adapter set_adapter set_adapters disable_adapters enable_adapters
active_adapters fuse_lora unfuse_lora unload_lora disable_lora enable_lora delete_adapters enable_lora_hotswap"""


@_lacks("LoRA in pipelines", _MERGE, *_PIPELINE_LORA.split())
class LoraBaseMixin:
    """For pipelines whose networks take LoRA; here none has any."""

    _lora_loadable_modules: ClassVar[list[str]] = []
    unet_name = "unet"
    transformer_name = "transformer"
    text_encoder_name = "text_encoder"
    num_fused_loras = 0

    @property
    def lora_scale(self) -> float:
        """What a run was asked to weigh LoRA with; pipelines set ``_lora_scale``."""
        return float(getattr(self, "_lora_scale", 1.0))

    @property
    def fused_loras(self) -> set[str]:
        return set()

    def get_active_adapters(self) -> list[str]:
        """None: there can't be any yet."""
        return []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """None: there can't be any yet."""
        return {}


class TextualInversionLoaderMixin:
    """For pipelines with tokenizers: words that stand for several learned vectors."""

    load_textual_inversion: Callable[..., Any]
    unload_textual_inversion: Callable[..., Any]

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> Any:
        """``prompt`` (one or several) with each added token that has followers, ``x``, ``x_1``, …, spelled out."""
        if isinstance(prompt, list):
            return [self._maybe_convert_prompt(text, tokenizer) for text in prompt]
        return self._maybe_convert_prompt(prompt, tokenizer)

    def _maybe_convert_prompt(self, prompt: str, tokenizer: Any) -> str:
        added = tokenizer.added_tokens_encoder
        for token in sorted(set(tokenizer.tokenize(prompt)) & set(added)):
            whole, count = [token], 1
            while f"{token}_{count}" in added:
                whole.append(f"{token}_{count}")
                count += 1
            prompt = prompt.replace(token, " ".join(whole))
        return prompt


_lacks(
    "textual inversion",
    "put the vectors into the text encoder's table (`resize_token_embeddings`) and the token into the tokenizer",
    "load_textual_inversion",
    "unload_textual_inversion",
)(TextualInversionLoaderMixin)

_IP = (
    "IP-Adapter",
    "use image to image, or a ControlNet",
    "load_ip_adapter",
    "set_ip_adapter_scale",
    "unload_ip_adapter",
)


@_lacks(*_IP)
class IPAdapterMixin:
    """For pipelines that take pictures as prompts."""


@_lacks(*_IP)
class FluxIPAdapterMixin:
    """For FLUX pipelines that take pictures as prompts."""


@_lacks(*_IP)
class SD3IPAdapterMixin:
    """For Stable Diffusion 3 pipelines that take pictures as prompts."""

    is_ip_adapter_active = False


@_lacks(*_IP)
class ModularIPAdapterMixin:
    """For modular pipelines that take pictures as prompts."""


@_lacks("LoRA in networks", _MERGE, *_NETWORK_LORA.split())
class PeftAdapterMixin:
    """For networks that take adapters of the package ``peft``."""


@_lacks("loading attention processors", _MERGE, "load_attn_procs", "save_attn_procs")
class UNet2DConditionLoadersMixin:
    """For UNets that load attention processors."""


class FluxTransformer2DLoadersMixin:
    """For FLUX's transformer; it has no method that others call."""


class SD3Transformer2DLoadersMixin:
    """For Stable Diffusion 3's transformer; it has no method that others call."""


def adjust_lora_scale_text_encoder(text_encoder: nn.Module, lora_scale: float = 1.0) -> None:
    """Set the weight of projections that a script has patched with LoRA: modules with a ``lora_scale``."""
    for module in text_encoder.modules():
        if hasattr(module, "lora_scale"):
            module.lora_scale = lora_scale  # type: ignore[assignment]


_FAMILIES = """AceStep AuraFlow BriaFibo2 CogVideoX CogView4 Cosmos ErnieImage Flux2 Flux3 Helios HiDreamImage HunyuanVideo
Ideogram4 Kandinsky Krea2 LTXVideo Lumina2 Mochi1 QwenImage RFD4Proteina Sana SkyReelsV2 ZImage"""
# pipelines' classes of :class:`LoraBaseMixin` -> the components that take LoRA
_LORA: dict[str, tuple[str, ...]] = {
    "StableDiffusionLoraLoaderMixin": ("unet", "text_encoder"),
    "StableDiffusionXLLoraLoaderMixin": ("unet", "text_encoder", "text_encoder_2"),
    "LoraLoaderMixin": ("unet", "text_encoder"),
    "SD3LoraLoaderMixin": ("transformer", "text_encoder", "text_encoder_2"),
    "FluxLoraLoaderMixin": ("transformer", "text_encoder"),
    "AmusedLoraLoaderMixin": ("transformer", "text_encoder"),
    "LTX2LoraLoaderMixin": ("transformer", "connectors"),
    "WanLoraLoaderMixin": ("transformer", "transformer_2"),
    "AnimaLoraLoaderMixin": ("transformer", "text_conditioner"),
    "MiniMaxH3LoraLoaderMixin": ("transformer", "transformer_ref"),
    **{f"{family}LoraLoaderMixin": ("transformer",) for family in _FAMILIES.split()},
}


def __getattr__(name: str) -> Any:
    if name not in _LORA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    body = {"__doc__": "For pipelines whose networks take LoRA.", "__module__": __name__}
    made = type(name, (LoraBaseMixin,), {**body, "_lora_loadable_modules": list(_LORA[name])})
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *_LORA})
