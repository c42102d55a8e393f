"""Pipelines in one file, and ``load``: anything, recognised by what is in it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import hub, log, registry
from ..core.config import read_json
from ..core.errors import CheckpointError, MissingFile
from ..models.auto_model import AutoModel
from ..models.foreign import native_class, prepare_from, small_component
from ..weights import original_config, recognise, single_file
from ..weights.checkpoint import Checkpoint
from ..weights.prepare import Prepared
from ..weights.verdict import Part, Verdict
from . import loading
from .components import component_names

logger = log.get_logger(__name__)
INDEX = loading.INDEX
# where the tokenizers of a family are, which no single file carries
_HOMES = {
    "Stable Diffusion 1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Stable Diffusion 2.x": "stabilityai/stable-diffusion-2-1",
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
    "Stable Diffusion XL refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "LCM": "SimianLuo/LCM_Dreamshaper_v7",
    "FLUX.1": "black-forest-labs/FLUX.1-schnell",
    "Stable Diffusion 3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "PixArt": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "Qwen-Image": "Qwen/Qwen-Image",
}
_DEPRECATED = ("load_safety_checker", "num_in_channels", "extract_ema", "upcast_attention")
# what `scheduler_type` may be
_SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
}


def load_single(cls: Any, source: single_file.Source, **kwargs: Any) -> Any:
    """Load a pipeline out of one file in its original layout.

    Args:
        source: a file, a link to one on the hub, or a dictionary of tensors.
        kwargs: ``config``, a folder or repository to take configurations, scheduler and tokenizers from (else they
            are read off the tensors and our tables; tokenizers come from the family's home on the hub);
            ``quantization_config``, a ``GGUFQuantizationConfig``, keeps packed what the file has packed;
            ``original_config`` (YAML of Stable Diffusion's first programs) changes those of networks and scheduler;
            ``scheduler_type`` and ``prediction_type`` change the scheduler; loading options as for
            ``from_pretrained``; components by name.

    Raises:
        CheckpointError: the file is something else (says what), or lacks a component that nothing gives.
    """
    for name in _DEPRECATED:
        kwargs.pop(name, None)
    home, older = kwargs.pop("config", None), kwargs.pop("original_config_file", None)
    original = original_config.entries(kwargs.pop("original_config", older), bool(kwargs.get("local_files_only")))
    wish = {**original.pop(original_config.SCHEDULER), **_scheduler_wish(kwargs)}
    options = _options(kwargs)
    checkpoint = single_file.open_source(source, **options.base.where)
    verdict = recognise.recognise(checkpoint)
    if verdict.pipeline is None:
        raise CheckpointError(f"{checkpoint.label} is no pipeline; it is {verdict.describe()}")
    if cls.__name__ == "DiffusionPipeline":
        cls = registry.find_class("diffusers", verdict.pipeline)
    _check_family(cls, verdict, checkpoint.label)
    loading._check_arguments(cls, kwargs, options)
    folder = _home(home, options) if home is not None else None
    parts = {n: p for n, p in verdict.parts.items() if n in component_names(cls) and n not in kwargs}
    if "scheduler" in component_names(cls) and "scheduler" not in kwargs:
        kwargs["scheduler"] = _scheduler(verdict, folder, wish)
    rest = _companions(cls, verdict, folder, options, {*parts, *kwargs})
    changes = {n: original.get(p.class_name, {}) for n, p in parts.items()}
    prepared = {n: _prepare(n, p, checkpoint, folder, options, changes[n]) for n, p in parts.items()}
    parameters = inspect.signature(cls.__init__).parameters
    given = {n: v for n, v in {**verdict.settings, **rest, **kwargs}.items() if n in parameters}
    pipe = loading.assemble(cls, prepared, {n: v for n, v in given.items() if n not in prepared})
    return loading._place(pipe, options)


def _options(kwargs: dict[str, Any]) -> loading.PipelineOptions:
    """The loading options in ``kwargs``; with a ``GGUFQuantizationConfig``, what is packed in the file stays so."""
    packed = kwargs.pop("quantization_config", None)
    if packed is not None and getattr(packed, "quant_method", None) != "gguf":
        raise ValueError("`quantization_config`: single files take a GGUFQuantizationConfig only")
    if packed is not None:
        kwargs["dtype"] = packed.compute_dtype
    options = loading.PipelineOptions.take(kwargs)
    options.base.packed = packed is not None
    return options


def _check_family(cls: Any, verdict: Verdict, label: str) -> None:
    """The file may be of another family than ``cls``: that shows in parts for which it has no place."""
    odd = sorted(set(verdict.parts) - set(component_names(cls)))
    if odd and verdict.family not in ("Stable Diffusion XL refiner", ""):
        raise CheckpointError(
            f"{label} is {verdict.describe()}; {cls.__name__} has no {odd}: use {verdict.pipeline}, or `effusion.load`"
        )


def _home(home: Any, options: loading.PipelineOptions) -> Path:
    """The folder with configurations; of a repository only the small files are fetched."""
    if Path(home).is_dir():
        return Path(home)
    where = {k: v for k, v in options.base.where.items() if k != "subfolder"}
    index = hub.resolve_file(str(home), INDEX, **where)
    if where.get("local_files_only"):
        return index.parent
    patterns = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*.txt"]
    return hub.snapshot(str(home), patterns, literal=False, **{**where, "revision": hub.commit_of(index)})


def _prepare(
    name: str,
    part: Part,
    checkpoint: Checkpoint,
    folder: Path | None,
    options: loading.PipelineOptions,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """One component of the file, checked against its configuration."""
    config: Any = dict(part.config)
    if folder is not None and (folder / name / "config.json").is_file():
        config = read_json(folder / name / "config.json")
    own = options.for_component(name, None)
    library_class = native_class(part.class_name, Path()) if part.library == "transformers" else None
    cls = library_class or registry.find_class(part.library, part.class_name)
    if hasattr(cls, "_prepare"):
        return Prepared.of(cls, config, part.read(checkpoint), own, changes, checkpoint.label)
    return prepare_from(cls, config, part.read(checkpoint), own)


def _companions(
    cls: Any, verdict: Verdict, folder: Path | None, options: loading.PipelineOptions, there: set[str]
) -> dict[str, Any]:
    """What the file does not carry: tokenizers, and ``None`` for optional components."""
    found: dict[str, Any] = {}
    for name in component_names(cls):
        if name in there:
            continue
        if name.startswith("tokenizer") and name.replace("tokenizer", "text_encoder") in there:
            found[name] = _tokenizer(name, verdict, folder, options)
        elif name in cls._optional_components:
            found[name] = None
    lacking = [n for n in component_names(cls) if n not in there and n not in found]
    if lacking:
        raise CheckpointError(f"{verdict.describe()}; {cls.__name__} needs {lacking} too: pass them, or `config=`")
    return found


def _scheduler_wish(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``scheduler_type`` and ``prediction_type``, as older scripts pass them, as entries of a configuration."""
    kind, prediction = kwargs.pop("scheduler_type", None), kwargs.pop("prediction_type", None)
    if kind is not None and kind not in _SCHEDULERS:
        raise ValueError(f"scheduler_type={kind!r}: allowed are {', '.join(_SCHEDULERS)}")
    wish: dict[str, Any] = {"prediction_type": prediction} if prediction is not None else {}
    return {**wish, "_class_name": _SCHEDULERS[kind], "timestep_spacing": "leading"} if kind is not None else wish


def _scheduler(verdict: Verdict, folder: Path | None, wish: Mapping[str, Any]) -> Any:
    config = dict(verdict.settings["scheduler"])
    if folder is not None and (folder / "scheduler" / "scheduler_config.json").is_file():
        config = read_json(folder / "scheduler" / "scheduler_config.json")
    elif "beta_start" in wish and config["_class_name"] == "PNDMScheduler":
        config["_class_name"] = "DDIMScheduler"  # PNDM came later than the programs of an original configuration
    config |= wish
    label = str(folder or verdict.name)
    cls = registry.find_component(config.get("_class_name"), label, bases=("SchedulerMixin",))
    try:
        return cls.from_config(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{label}: its {cls.__name__} can't be built: {error}") from error


def _tokenizer(name: str, verdict: Verdict, folder: Path | None, options: loading.PipelineOptions) -> Any:
    root = folder / name if folder is not None else None
    if root is None or not root.is_dir():
        home, where = (
            _HOMES[verdict.family],
            {k: v for k, v in options.base.where.items() if k in ("token", "cache_dir")},
        )
        local = bool(options.base.where.get("local_files_only"))
        try:
            root = hub.snapshot(home, [f"{name}/*"], literal=False, local_files_only=local, **where) / name
        except CheckpointError as error:
            raise CheckpointError(
                f"no single file carries its {name}, and {home} could not be asked for it: pass `{name}=`, or "
                f"`config=` with a folder of {verdict.name} ({error})"
            ) from error
    class_name = _tokenizer_class(name, verdict, root.parent / INDEX)
    return small_component(native_class(class_name, root) or registry.find_class("transformers", class_name), root)


def _tokenizer_class(name: str, verdict: Verdict, index: Path) -> str:
    entry = read_json(index).get(name) if index.is_file() else None
    if isinstance(entry, list) and len(entry) == 2 and entry[0] == "transformers" and isinstance(entry[1], str):
        return entry[1]
    encoder = verdict.parts.get(name.replace("tokenizer", "text_encoder"))
    return "T5TokenizerFast" if encoder is not None and encoder.class_name == "T5EncoderModel" else "CLIPTokenizer"


# -- saving --------------------------------------------------------------------------------------

_CLASSIC = (("unet", "model.diffusion_model.", "network"), ("vae", "first_stage_model.", "network"))
_TEXT = {
    "clip": (("text_encoder", "cond_stage_model.transformer.", "clip"),),
    "open_clip": (("text_encoder", "cond_stage_model.model.", "open_clip"),),
    "xl": (
        ("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
        ("text_encoder_2", "conditioner.embedders.1.model.", "open_clip"),
    ),
    "refiner": (("text_encoder_2", "conditioner.embedders.0.model.", "open_clip"),),
}


# main network -> (component, prefix, kind) of everything that such files have
_WHOLE = {
    "FluxTransformer2DModel": (
        ("transformer", "model.diffusion_model.", "network"), ("vae", "vae.", "network"),
        ("text_encoder", "text_encoders.clip_l.transformer.", "clip"),
        ("text_encoder_2", "text_encoders.t5xxl.transformer.", "t5"),
    ),
    "SD3Transformer2DModel": (
        ("transformer", "model.diffusion_model.", "network"), ("vae", "first_stage_model.", "network"),
        ("text_encoder", "text_encoders.clip_l.transformer.", "clip"),
        ("text_encoder_2", "text_encoders.clip_g.transformer.", "clip"),
        ("text_encoder_3", "text_encoders.t5xxl.transformer.", "t5"),
    ),
    "PixArtTransformer2DModel": (
        ("transformer", "model.diffusion_model.", "network"), ("vae", "first_stage_model.", "network"),
        ("text_encoder", "text_encoders.t5xxl.transformer.", "t5"),
    ),
}  # fmt: skip


def save_single(pipe: Any, path: str | os.PathLike[str], **metadata: str) -> None:
    """Write networks and text encoders of a pipeline into one file in the original layout of its family.

    Raises:
        ValueError: a pipeline whose family has none.
    """
    single_file.write_single(path, original_state(pipe), metadata)


def original_state(pipe: Any) -> dict[str, Tensor]:
    """The weights of a pipeline under the names of its family's original layout."""
    components = pipe.components
    transformer = type(components.get("transformer")).__name__
    if transformer in _WHOLE:
        parts = _WHOLE[transformer]
    elif "unet" not in components or "vae" not in components:
        raise ValueError(f"{type(pipe).__name__} has no single-file layout that is known here; use `save_pretrained`")
    else:
        parts = (*_CLASSIC, *_TEXT[_text_kind(components)])
    return single_file.pipeline_state(components, parts)


def _text_kind(components: Mapping[str, Any]) -> str:
    if components.get("text_encoder_2") is not None:
        return "refiner" if components.get("text_encoder") is None else "xl"
    return "open_clip" if components["unet"].config.use_linear_projection else "clip"


# -- anything ------------------------------------------------------------------------------------


def load(source: single_file.Source, **kwargs: Any) -> Any:
    """Load anything: a pipeline's folder or repository, one network, or a single file, recognised by its content.

    Args:
        source: a folder, a repository (``owner/name``), a file, a link to a file on the hub.
        kwargs: what the ``from_pretrained`` or ``from_single_file`` that fits takes.

    Returns:
        A pipeline or a network.

    Raises:
        CheckpointError: it is something that can't stand alone (a LoRA, an embedding), or unknown: says what.
    """
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.is_dir():
            return _load_folder(path, **kwargs)
        if not path.is_file() and str(source).count("/") <= 1 and "://" not in str(source):
            return _load_repository(str(source), **kwargs)
    where, _ = hub.split_location(kwargs)
    checkpoint = single_file.open_source(source, **where)
    verdict = recognise.recognise(checkpoint)
    if verdict.pipeline is not None:
        cls = registry.find_class("diffusers", verdict.pipeline)
        if verdict.kind == "pipeline" or kwargs.keys() & set(component_names(cls)):
            return load_single(cls, source, **kwargs)
    if verdict.kind != "model" or len(verdict.parts) != 1:
        raise CheckpointError(f"{checkpoint.label} is {verdict.describe()}")
    part = next(iter(verdict.parts.values()))
    if part.library == "transformers":
        return _load_encoder(part, checkpoint, **kwargs)
    return registry.find_class(part.library, part.class_name).from_single_file(source, **kwargs)


def _load_encoder(part: Part, checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """A text encoder alone in a file."""
    home = kwargs.pop("config", None)
    options = _options(kwargs)
    if kwargs:
        raise ValueError(f"{part.class_name} is loaded without {sorted(kwargs)}")
    folder = Path(home).parent if home is not None else None
    return _prepare(Path(home or "x").name, part, checkpoint, folder, options).build()


def _load_folder(folder: Path, **kwargs: Any) -> Any:
    if kwargs.get("subfolder") is None and (folder / INDEX).is_file():
        return loading.load_pipeline(registry.find_class("diffusers", "DiffusionPipeline"), folder, **kwargs)
    inside = folder / (kwargs.get("subfolder") or "")
    if (inside / "config.json").is_file():
        return AutoModel.from_pretrained(folder, **kwargs)
    if (inside / "scheduler_config.json").is_file():
        name = read_json(inside / "scheduler_config.json").get("_class_name")
        return small_component(registry.find_component(name, str(inside)), inside, folder)
    files = sorted(p for p in inside.iterdir() if p.suffix in (".safetensors", ".ckpt", ".pt", ".bin"))
    if len(files) == 1:
        return load(files[0], **kwargs)
    raise MissingFile(
        f"{folder} has neither {INDEX} nor config.json; its weights are {[p.name for p in files]}: name one"
    )


def _load_repository(repo: str, **kwargs: Any) -> Any:
    where, _ = hub.split_location(kwargs)
    where.pop("subfolder", None)
    if kwargs.get("subfolder") is None and hub.try_file(repo, INDEX, **where) is not None:
        return loading.load_pipeline(registry.find_class("diffusers", "DiffusionPipeline"), repo, **kwargs)
    if hub.try_file(repo, "config.json", **where, subfolder=kwargs.get("subfolder")) is not None:
        return AutoModel.from_pretrained(repo, **kwargs)
    _, names = hub.repo_files(repo, revision=where.get("revision"), token=where.get("token"))
    files = [n for n in names if n.endswith((".safetensors", ".ckpt", ".pt", ".bin"))]
    if len(files) == 1:
        return load(f"{repo}/{files[0]}", **kwargs)
    raise MissingFile(f"{repo} has neither {INDEX} nor config.json; name one of its files: {files[:10]}")
