"""What scripts of the ecosystem import from ``utils``; each name lives elsewhere and is imported when used."""

from ..core import lazy

_HOME = {
    "core.log": ("get_logger",),
    "core.outputs": ("BaseOutput",),
    "core.publish": ("PushToHubMixin",),
    "blocks.images": ("PIL_INTERPOLATION",),
    "blocks.pictures": ("load_image", "make_image_grid", "numpy_to_pil", "pt_to_pil"),
    "blocks.video": ("export_to_gif", "export_to_video"),
    "utils.constants": (
        "CONFIG_NAME",
        "SAFETENSORS_FILE_EXTENSION",
        "SAFETENSORS_WEIGHTS_NAME",
        "SAFE_WEIGHTS_INDEX_NAME",
        "WEIGHTS_INDEX_NAME",
        "WEIGHTS_NAME",
    ),
    "utils.import_utils": (
        "check_min_version",
        "is_accelerate_available",
        "is_accelerate_version",
        "is_bitsandbytes_available",
        "is_flash_attn_available",
        "is_gguf_available",
        "is_imageio_available",
        "is_invisible_watermark_available",
        "is_matplotlib_available",
        "is_opencv_available",
        "is_peft_available",
        "is_peft_version",
        "is_sageattention_available",
        "is_scipy_available",
        "is_sentencepiece_available",
        "is_tensorboard_available",
        "is_torch_available",
        "is_torch_npu_available",
        "is_torch_version",
        "is_torch_xla_available",
        "is_torchao_available",
        "is_torchsde_available",
        "is_torchvision_available",
        "is_transformers_available",
        "is_transformers_version",
        "is_wandb_available",
        "is_xformers_available",
    ),
    "utils.doc_utils": ("deprecate", "replace_example_docstring"),
}
_NAMES = {name: f"effusion.{module}" for module, names in _HOME.items() for name in names}
_PATHS = {
    path: f"{__name__}.{path}"
    for path in (
        "constants",
        "doc_utils",
        "export_utils",
        "hub_utils",
        "import_utils",
        "loading_utils",
        "logging",
        "outputs",
        "pil_utils",
        "torch_utils",
    )
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _NAMES | _PATHS)
