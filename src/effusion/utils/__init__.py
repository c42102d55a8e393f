"""What scripts of the ecosystem import from ``utils``; each name lives elsewhere and is imported when used."""

from ..core import lazy

# of the packages in utils.import_utils, those that scripts ask about under this path
_PACKAGES = """accelerate auto_round av better_profanity bitsandbytes bs4 cosmos_guardrail flash_attn flash_attn_3 flashinfer
flashpack ftfy gguf hpu imageio inflect invisible_watermark kernels kornia librosa matplotlib nltk note_seq nvidia_modelopt
onnx opencv optimum_quanto outlines peft pytorch_retinaface safetensors sageattention scipy sdnq sentencepiece tensorboard
timm torch torch_mlu torch_neuronx torch_npu torch_tpu torch_xla torchao torchsde torchvision transformers unidecode wandb
xformers"""
_VERSIONS = """accelerate bitsandbytes flash_attn gguf hf_hub kernels nvidia_modelopt optimum_quanto peft sageattention sdnq
torch torch_xla torchao transformers xformers"""
_HERE = """constants deprecation_utils doc_utils dynamic_modules_utils export_utils hub_utils import_utils loading_utils logging
outputs peft_utils pil_utils state_dict_utils testing_utils torch_utils"""
_HOME = {
    "core.log": ("get_logger",),
    "core.outputs": ("BaseOutput",),
    "core.publish": ("PushToHubMixin",),
    "blocks.images": ("PIL_INTERPOLATION",),
    "blocks.pictures": ("load_image", "make_image_grid", "numpy_to_pil", "pt_to_pil"),
    "blocks.video": ("export_to_gif", "export_to_video", "load_video"),
    "utils.constants": (
        "CONFIG_NAME",
        "DEPRECATED_REVISION_ARGS",
        "DIFFUSERS_DYNAMIC_MODULE_NAME",
        "GGUF_FILE_EXTENSION",
        "HF_MODULES_CACHE",
        "HUGGINGFACE_CO_RESOLVE_ENDPOINT",
        "MIN_PEFT_VERSION",
        "ONNX_EXTERNAL_WEIGHTS_NAME",
        "ONNX_WEIGHTS_NAME",
        "SAFETENSORS_FILE_EXTENSION",
        "SAFETENSORS_WEIGHTS_NAME",
        "SAFE_WEIGHTS_INDEX_NAME",
        "USE_PEFT_BACKEND",
        "WEIGHTS_INDEX_NAME",
        "WEIGHTS_NAME",
    ),
    "utils.import_utils": (
        "OptionalDependencyNotAvailable",
        "check_min_version",
        "is_google_colab",
        "requires_backends",
        *(f"is_{name}_available" for name in _PACKAGES.split()),
        *(f"is_{name}_version" for name in _VERSIONS.split()),
    ),
    "utils.doc_utils": ("deprecate", "replace_example_docstring"),
    "utils.dynamic_modules_utils": ("get_class_from_dynamic_module",),
    "utils.hub_utils": ("extract_commit_hash", "http_user_agent"),
    "utils.peft_utils": (
        "apply_lora_scale",
        "check_peft_version",
        "delete_adapter_layers",
        "get_adapter_name",
        "recurse_remove_peft_layers",
        "scale_lora_layers",
        "set_adapter_layers",
        "set_weights_and_activate_adapters",
        "unscale_lora_layers",
    ),
    "utils.state_dict_utils": (
        "convert_all_state_dict_to_peft",
        "convert_state_dict_to_diffusers",
        "convert_state_dict_to_kohya",
        "convert_state_dict_to_peft",
        "convert_unet_state_dict_to_peft",
        "state_dict_all_zero",
    ),
}
_NAMES = {name: f"effusion.{module}" for module, names in _HOME.items() for name in names}
_PATHS = {path: f"{__name__}.{path}" for path in _HERE.split()}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _NAMES | _PATHS)
