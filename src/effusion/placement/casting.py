"""Layerwise casting: weights rest in a small dtype and are decoded for the time of a layer's call."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core import log
from ..weights.slices import MappedFile, TensorSlice
from .engine import Engine, engine_for, engine_of, neighbours
from .sources import Mappings, Span, is_dense
from .transform import Transform
from .units import own_slots

logger = log.get_logger(__name__)
# layers whose weights may be stored in a small dtype, and names of layers for which that costs quality
CASTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CASTABLE += (nn.Linear, nn.Embedding)  # type: ignore[assignment]
DEFAULT_SKIP_MODULES_PATTERN = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")

SAMPLE = 1 << 16  # values of a weight that are compared with what they were

Pattern = str | Sequence[str] | None
Classes = Sequence[type[nn.Module] | str] | None


@dataclass(frozen=True)
class Original:
    """What a cast weight was before: a slice of a file."""

    span: Span
    dtype: torch.dtype
    shape: torch.Size
    wanted: torch.dtype  # what it would be now if it had not been cast


def apply_layerwise_casting(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | tuple[str, ...] | None = "auto",
    skip_modules_classes: tuple[type[nn.Module] | str, ...] | None = None,
    non_blocking: bool = False,
) -> float:
    """Store the weights of the layers in ``module`` as ``storage_dtype``, compute with them in ``compute_dtype``.

    It goes with every way of offloading (small weights travel faster) and can be called again with
    other dtypes, or on a part of a network.

    Args:
        skip_modules_pattern: regular expressions; what they are found in (the qualified name) is left
            as it is. ``"auto"`` leaves out embeddings of positions, norms and the outer projections.
        skip_modules_classes: classes that are left as they are, or parts of their names (``"norm"``).
        non_blocking: accepted; transfers never block longer than they have to.

    Raises:
        ValueError: dtypes that are no floating-point types, or a broken pattern.
    """
    _check_dtypes(storage_dtype=storage_dtype, compute_dtype=compute_dtype)
    return cast(
        module, layers_to_cast(module, skip_modules_pattern, skip_modules_classes), storage_dtype, compute_dtype
    )


def usual_patterns(module: nn.Module) -> tuple[str, ...]:
    """What is left as it is unless someone says otherwise: norms, positions, and what the network names itself."""
    return tuple(dict.fromkeys([*DEFAULT_SKIP_MODULES_PATTERN, *own_patterns(module)]))


def own_patterns(module: nn.Module) -> list[str]:
    """What the network names itself, to be left as it is."""
    names = ("_keep_in_fp32_modules", "_skip_layerwise_casting_patterns")
    return [pattern for name in names for pattern in getattr(module, name, None) or ()]


def layers_to_cast(module: nn.Module, skip: Pattern, skip_classes: Classes | None = None) -> list[nn.Module]:
    """The layers of ``module`` whose weights may rest in another dtype."""
    if skip is None and skip_classes is None:
        layers = [m for m in module.modules() if own_slots(m, "")]
    else:
        layers = list(_layers(module, "", _patterns(skip), skip_classes or ()))
    spokesman = _says_dtype(module)
    return [layer for layer in layers if not any(t is spokesman for t in layer._parameters.values() if t is not None)]


def apply_layerwise_casting_hook(
    module: nn.Module, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool
) -> None:
    """:func:`apply_layerwise_casting` of the weights of ``module`` itself, whatever it is; of nothing below it."""
    _check_dtypes(storage_dtype=storage_dtype, compute_dtype=compute_dtype)
    cast(module, [module], storage_dtype, compute_dtype)


def _check_dtypes(**dtypes: torch.dtype) -> None:
    for name, dtype in dtypes.items():
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name}={dtype!r}: give a floating-point dtype, such as torch.float8_e4m3fn")


def _says_dtype(module: nn.Module) -> Tensor | None:
    """The weight that a foreign network takes its ``dtype`` from: it has to say what is computed with."""
    if not isinstance(getattr(type(module), "dtype", None), property) or hasattr(module, "enable_layerwise_casting"):
        return None
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def _patterns(pattern: Pattern) -> list[re.Pattern[str]]:
    if pattern == "auto":
        pattern = DEFAULT_SKIP_MODULES_PATTERN
    texts = [pattern] if isinstance(pattern, str) else list(pattern or ())
    try:
        return [re.compile(text) for text in texts]
    except re.error as error:
        raise ValueError(f"skip_modules_pattern={pattern!r} is no regular expression: {error}") from None


def _layers(
    module: nn.Module, name: str, skip: list[re.Pattern[str]], classes: Sequence[type[nn.Module] | str]
) -> Iterator[nn.Module]:
    if any(p.search(name) for p in skip) or any(_is_a(module, c) for c in classes):
        return
    if isinstance(module, CASTABLE):
        yield module
        return
    for child_name, child in module.named_children():
        yield from _layers(child, f"{name}.{child_name}" if name else child_name, skip, classes)


def _is_a(module: nn.Module, what: type[nn.Module] | str) -> bool:
    if isinstance(what, str):
        return what.lower() in type(module).__name__.lower()
    return isinstance(module, what)


def cast(module: nn.Module, layers: Sequence[nn.Module], storage: torch.dtype, compute: torch.dtype) -> float:
    """Let the weights of ``layers``, all inside ``module``, rest in ``storage`` and compute in ``compute``.

    Returns:
        How far they are from what they were, relative to their norm; from a sample of each.
    """
    engine = _serving(module)
    engine.unhoist()
    originals: dict[int, Span | None] = {}
    mappings = Mappings()
    away = total = 0.0
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            transform = engine.transforms.setdefault(layer, Transform(layer))
            for slot in own_slots(layer, ""):
                tensor = slot.tensor
                if not tensor.is_floating_point() or tensor.is_meta:
                    continue
                if tensor.dtype != storage and id(tensor) not in originals:
                    span = originals[id(tensor)] = mappings.span(tensor)
                    if span is not None and slot.name not in transform.casts:
                        original = Original(span, tensor.dtype, tensor.shape, tensor.dtype)
                        engine.originals[slot.module, slot.name] = original
                    before = _sample(tensor)
                    _retype(tensor, storage)
                    away += float((_sample(tensor) - before).square().sum())
                    total += float(before.square().sum())
                transform.casts[slot.name] = (storage, compute)
    engine.rehome()
    engine.install()
    return float((away / total) ** 0.5) if total else 0.0


def _sample(tensor: Tensor) -> Tensor:
    """The first values of ``tensor``, on the CPU."""
    dense = is_dense(tensor)
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)) if dense else tensor.detach().flatten()
    return flat[:SAMPLE].cpu().double()


def uncast(module: nn.Module, goes_on: bool = False) -> None:
    """Undo :func:`cast`: the weights as they were in their file where it is known, else what is stored, decoded.

    Args:
        goes_on: whether the module will be served on, so that files that weights were written to stay.
    """
    engine = engine_of(module)
    if engine is None:
        return
    engine.unhoist()
    engine.planned = None
    with torch.inference_mode(False), torch.no_grad():
        files: dict[int, MappedFile] = {}
        for layer, transform in list(engine.transforms.items()):
            for name, (_, compute) in transform.casts.items():
                store = layer._parameters if name in layer._parameters else layer._buffers
                tensor = store[name]
                assert tensor is not None
                original = engine.originals.pop((layer, name), None)
                if original is not None:
                    tensor.data = _mapped(original, files).to(tensor.device, original.wanted)
                elif tensor.dtype != compute:
                    _retype(tensor, compute)
            transform.casts = {}
            if transform.idle:
                del engine.transforms[layer]
    engine.rehome()
    engine.install()
    if not goes_on:
        engine.close_if_idle()


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that cast weights of ``module`` are decoded to; ``None`` if none are cast."""
    engine = engine_of(module)
    if engine is None:
        return None
    return next((compute for t in engine.transforms.values() for _, compute in t.casts.values()), None)


def _serving(module: nn.Module) -> Engine:
    """The engine of ``module``, or of the component that it is a part of."""
    if engine_of(module) is None:
        for engine in neighbours(module):
            if any(m is module for m in engine.root.modules()):
                return engine
    return engine_for(module)


def _retype(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.requires_grad and not tensor.grad_fn:
        tensor.requires_grad_(False)  # a weight in storage form can't be trained
    tensor.data = tensor.data.to(dtype)


def _mapped(original: Original, files: dict[int, MappedFile]) -> Tensor:
    """``original``, mapped once more; the file is named by its descriptor, whatever has its name by now."""
    span = original.span
    span.file.check()
    path = Path(f"/proc/self/fd/{span.file.fd}")
    if span.file.fd not in files:
        files[span.file.fd] = MappedFile(path)
    return files[span.file.fd].tensor(
        TensorSlice(path, span.offset, span.nbytes, original.dtype, tuple(original.shape))
    )


def recast(engine: Engine, dtype: torch.dtype | None = None) -> None:
    """After weights were converted by hand (``half()``), all to ``dtype`` if that is given: store them small again, and
    compute in the new dtype; that is also what they will be when the cast is undone.

    Nothing is lost by that: what was decoded from a smaller dtype is exactly representable in it.
    """
    with torch.inference_mode(False), torch.no_grad():
        for layer, transform in engine.transforms.items():
            for name, (storage, compute) in list(transform.casts.items()):
                store = layer._parameters if name in layer._parameters else layer._buffers
                tensor = store.get(name)
                if tensor is None or tensor.is_meta:
                    continue
                now = dtype or (tensor.dtype if tensor.dtype != storage else compute)
                if now != compute and (original := engine.originals.get((layer, name))) is not None:
                    engine.originals[layer, name] = replace(original, wanted=now)
                transform.casts[name] = (storage, now)
                if tensor.dtype != storage:
                    _retype(tensor, storage)
