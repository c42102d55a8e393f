"""Pipelines in one file, recognised by what is in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import hub, log, registry
from ..core.config import read_json
from ..core.errors import CheckpointError
from ..models.foreign import native_class, prepare_from, small_component
from ..weights import original_config, recognise, single_file
from ..weights.entries import Checkpoint
from ..weights.prepare import LoadOptions, Prepared
from ..weights.verdict import Part, Verdict
from . import loading
from .components import component_names
from .index import INDEX
from .options import PipelineOptions, place

logger = log.get_logger(__name__)
# where the tokenizers of a family are, which no single file carries
_HOMES = {
    "Stable Diffusion 1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Stable Diffusion 2.x": "stabilityai/stable-diffusion-2-1",
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
    "Stable Diffusion XL, LCM": "stabilityai/stable-diffusion-xl-base-1.0",
    "Playground 2.5": "playgroundai/playground-v2.5-1024px-aesthetic",
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
    options = single_options(kwargs)
    checkpoint = single_file.open_source(source, options.base.use_safetensors is not True, **options.base.where)
    verdict = recognise.recognise(checkpoint)
    cls = _class_for(cls, verdict, checkpoint.label)
    loading.check_arguments(cls, kwargs, options)
    folder = _home(home, options) if home is not None else None
    parts = {n: p for n, p in verdict.parts.items() if n in component_names(cls) and n not in kwargs}
    if "scheduler" in component_names(cls) and "scheduler" not in kwargs:
        kwargs["scheduler"] = _scheduler(verdict, folder, wish)
    given = {**verdict.settings, **_companions(cls, verdict, folder, options, {*parts, *kwargs}), **kwargs}
    prepared = {
        n: _prepare(n, p, checkpoint, folder, options, original.get(p.class_name, {})) for n, p in parts.items()
    }
    wanted = set(inspect.signature(cls.__init__).parameters) - set(prepared)
    return place(loading.assemble(cls, prepared, {n: v for n, v in given.items() if n in wanted}), options)


def single_options(kwargs: dict[str, Any]) -> PipelineOptions:
    """The loading options in ``kwargs``; with a ``GGUFQuantizationConfig``, what is packed in the file stays so."""
    packed = kwargs.pop("quantization_config", None)
    if packed is not None and getattr(packed, "quant_method", None) != "gguf":
        raise ValueError("`quantization_config`: single files take a GGUFQuantizationConfig only")
    if packed is not None:
        kwargs["dtype"] = packed.compute_dtype
    options = PipelineOptions.take(kwargs)
    options.base.packed = packed is not None
    return options


def _class_for(cls: Any, verdict: Verdict, label: str) -> Any:
    """``cls``, or the pipeline that the file is of where ``cls`` leaves that open.

    Raises:
        CheckpointError: the file is no pipeline, or (which shows in parts that ``cls`` has no place for) one of another
            family.
    """
    if verdict.pipeline is None:
        raise CheckpointError(f"{label} is no pipeline; it is {verdict.describe()}")
    if cls.__name__ == "DiffusionPipeline":
        return registry.find_class("diffusers", verdict.pipeline)
    odd = sorted(set(verdict.parts) - set(component_names(cls)))
    if odd and verdict.family not in ("Stable Diffusion XL refiner", ""):
        raise CheckpointError(
            f"{label} is {verdict.describe()}; {cls.__name__} has no {odd}: use {verdict.pipeline}, or `effusion.load`"
        )
    return cls


def _home(home: Any, options: PipelineOptions) -> Path:
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
    options: PipelineOptions,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """One component of the file, checked against its configuration."""
    if folder is not None and (folder / name / "config.json").is_file():
        config = read_json(folder / name / "config.json")
    else:
        config = part.configuration(checkpoint, changes or ())
    return prepare_part(part, config, checkpoint, options.for_component(name, None), changes)


def prepare_part(
    part: Part,
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    options: LoadOptions,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """A network of ``config`` with the tensors of ``part``, checked against each other, and ready to be built."""
    own = native_class(part.class_name, Path()) if part.library == "transformers" else None
    cls = own or registry.find_class(part.library, part.class_name)
    if hasattr(cls, "_prepare"):
        return Prepared.of(cls, config, part.read(checkpoint), options, changes, checkpoint.label)
    return prepare_from(cls, config, part.read(checkpoint), options)


def _companions(
    cls: Any, verdict: Verdict, folder: Path | None, options: PipelineOptions, there: set[str]
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
        raise CheckpointError(f"{verdict.describe()}; {cls.__name__} needs {lacking} too: pass them by name")
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


def _tokenizer(name: str, verdict: Verdict, folder: Path | None, options: PipelineOptions) -> Any:
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
