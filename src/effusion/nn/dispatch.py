"""The one place where attention is computed: :func:`attend`, and the backends it chooses from.

Every network calls :func:`attend` with queries, keys and values laid out ``(B, L, H, D)``. Which kernel runs
is decided, in this order, by the ``backend`` argument (a module's own choice), by :func:`attention_backend`,
and by the environment variable ``EFFUSION_ATTN_BACKEND`` (``DIFFUSERS_ATTN_BACKEND`` is read too).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.optional import require

# (q, k, v, mask, scale, is_causal, dropout, enable_gqa) -> out, all (B, L, H, D)
Backend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "float | None", bool, float, bool], Tensor]
Factory = Callable[[str, str], Backend]  # (name, what stood behind the colon) -> backend


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017): ``softmax(q k^T * scale + mask) v``.

    Args:
        q: ``(B, L, H, D)``.
        k, v: ``(B, S, H, D)``, or fewer heads with ``enable_gqa``.
        mask: broadcastable to ``(B, H, L, S)``; boolean (true = may look) or added to the scores.
        scale: ``D ** -0.5`` if ``None``.
        backend: a name from :func:`backend_names`; ``None`` takes the one in force.

    Returns:
        ``(B, L, H, D)``.

    Raises:
        ValueError: an unknown backend, or one that can't do what is asked (a mask, dropout).
        MissingExtra: the backend's package is not installed.
    """
    name = _in_force if backend is None else backend
    run = _ready[name] if name in _ready else prepare(name)
    return run(q, k, v, mask, scale, is_causal, dropout, enable_gqa)


# -- backends ------------------------------------------------------------------------------------


def _native(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool, dropout: float, gqa: bool
) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, L, D)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa
    )
    return out.transpose(1, 2)


def _restricted(kernel: SDPBackend) -> Factory:
    """PyTorch's own attention, held to one of its kernels."""

    def make(name: str, argument: str) -> Backend:
        def run(*args: Any) -> Tensor:
            with sdpa_kernel(kernel):
                return _native(*args)

        return run

    return make


def _sliced(name: str, argument: str) -> Backend:
    """A few (batch item, head) pairs at a time, so that the score matrix of a slice is all there is."""
    if argument and not (argument.isdecimal() and int(argument) > 0):
        raise ValueError(
            f"attention backend {name}:{argument}: the slice size must be a positive number, as `sliced:4`"
        )
    size = int(argument or 1)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        causal: bool,
        dropout: float,
        gqa: bool,
    ) -> Tensor:
        b, length, heads, _ = q.shape
        if gqa and k.shape[2] != heads:
            k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
        if mask is not None:
            mask = mask.expand(b, heads, length, k.shape[1]).flatten(0, 1)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * H, L, D)
        out = q.new_empty(q.shape[0], length, v.shape[-1]) if not torch.is_grad_enabled() else None
        parts = []
        for i in range(0, q.shape[0], size):
            s = slice(i, i + size)
            part = F.scaled_dot_product_attention(
                q[s, None],
                k[s, None],
                v[s, None],
                attn_mask=None if mask is None else mask[s, None],
                dropout_p=dropout,
                is_causal=causal,
                scale=scale,
            )[:, 0]
            if out is None:
                parts.append(part)
            else:
                out[s] = part
        out = torch.cat(parts) if out is None else out
        return out.view(b, heads, length, -1).transpose(1, 2)

    return run


def _flash(package: str) -> Factory:
    """FlashAttention (Dao et al., 2022): the function ``flash_attn_func`` of ``package``; no masks."""

    def make(name: str, argument: str) -> Backend:
        kernel = require(package, f"the attention backend {name!r}").flash_attn_func

        def run(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None,
            scale: float | None,
            causal: bool,
            drop: float,
            gqa: bool,
        ) -> Tensor:
            _refuse(name, mask=mask, dropout=drop if package != "flash_attn" else None)
            more = {"dropout_p": drop} if package == "flash_attn" else {}
            out = kernel(q, k, v, softmax_scale=scale, causal=causal, **more)
            return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

        return run

    return make


def _flash_varlen(name: str, argument: str) -> Backend:
    """FlashAttention over sequences of different lengths; takes a boolean mask over keys, ``(B, 1, 1, S)``."""
    kernel = require("flash_attn", f"the attention backend {name!r}").flash_attn_varlen_func

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        causal: bool,
        dropout: float,
        gqa: bool,
    ) -> Tensor:
        b, lq, s = q.shape[0], q.shape[1], k.shape[1]
        if mask is not None and (mask.dtype != torch.bool or mask.shape[-3:-1] != (1, 1)):
            raise ValueError(f"attention backend {name!r} takes a boolean mask (B, 1, 1, S) only; use 'native'")
        keep = mask.expand(b, 1, 1, s)[:, 0, 0] if mask is not None else q.new_ones(b, s, dtype=torch.bool)
        lengths = keep.sum(1)
        out = kernel(
            q.flatten(0, 1),
            k[keep],
            v[keep],
            cu_seqlens_q=torch.arange(0, (b + 1) * lq, lq, dtype=torch.int32, device=q.device),
            cu_seqlens_k=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            max_seqlen_q=lq,
            max_seqlen_k=s,
            softmax_scale=scale,
            causal=causal,
            dropout_p=dropout,
        )
        return out.unflatten(0, (b, lq))  # type: ignore[no-any-return]

    return run


def _xformers(name: str, argument: str) -> Backend:
    """Memory-efficient attention (Rabe & Staats, 2021) of the package ``xformers``."""
    ops = require("xformers.ops", f"the attention backend {name!r}")

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        causal: bool,
        dropout: float,
        gqa: bool,
    ) -> Tensor:
        if mask is not None and causal:
            raise ValueError(f"attention backend {name!r}: give a mask or is_causal, not both")
        if gqa and k.shape[2] != q.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        bias: Any = ops.LowerTriangularMask() if causal else None
        if mask is not None:
            added = q.new_zeros(mask.shape).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask
            bias = added.to(q.dtype).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        return ops.memory_efficient_attention(q, k, v, bias, dropout, scale=scale)  # type: ignore[no-any-return]

    return run


def _sage(name: str, argument: str) -> Backend:
    """SageAttention (Zhang et al., 2024): 8-bit queries and keys; no masks, no dropout."""
    kernel = require("sageattention", f"the attention backend {name!r}").sageattn

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        causal: bool,
        dropout: float,
        gqa: bool,
    ) -> Tensor:
        _refuse(name, mask=mask, dropout=dropout)
        return kernel(q, k, v, tensor_layout="NHD", is_causal=causal, sm_scale=scale)  # type: ignore[no-any-return]

    return run


def _refuse(name: str, **given: Any) -> None:
    for what, value in given.items():
        if value is not None and (what == "mask" or value > 0):
            raise ValueError(f"attention backend {name!r} can't take {what}; use 'native' for this model")


_FACTORIES: dict[str, Factory] = {
    "native": lambda name, argument: _native,
    "_native_math": _restricted(SDPBackend.MATH),
    "_native_flash": _restricted(SDPBackend.FLASH_ATTENTION),
    "_native_efficient": _restricted(SDPBackend.EFFICIENT_ATTENTION),
    "_native_cudnn": _restricted(SDPBackend.CUDNN_ATTENTION),
    "math": _restricted(SDPBackend.MATH),
    "sliced": _sliced,
    "flash": _flash("flash_attn"),
    "_flash_3": _flash("flash_attn_interface"),
    "flash_varlen": _flash_varlen,
    "xformers": _xformers,
    "sage": _sage,
}
_ready: dict[str, Backend] = {"native": _native}
_in_force = os.environ.get("EFFUSION_ATTN_BACKEND") or os.environ.get("DIFFUSERS_ATTN_BACKEND") or "native"


def backend_names() -> tuple[str, ...]:
    """The names :func:`attention_backend` takes; ``sliced`` also as ``sliced:N``, N (item, head) pairs at a time."""
    return tuple(sorted(_FACTORIES))


def register_backend(name: str, factory: Factory) -> None:
    """Add a backend: ``factory(name, argument)`` gives the function that computes it, when first chosen."""
    _FACTORIES[name] = factory
    _ready.pop(name, None)


def prepare(name: str) -> Backend:
    """Find and import the backend ``name``; ``ValueError`` or ``MissingExtra`` if that can't be."""
    base, _, argument = name.partition(":")
    if base not in _FACTORIES:
        raise ValueError(f"no attention backend {name!r}; there are {', '.join(backend_names())}")
    _ready[name] = _FACTORIES[base](base, argument)
    return _ready[name]


@contextmanager
def attention_backend(backend: str = "native") -> Iterator[None]:
    """Within it, :func:`attend` uses ``backend`` wherever a module has no choice of its own.

    It holds for the whole process: compiled code checks it, and threads share it.
    """
    global _in_force
    name = str(backend)
    prepare(name)
    before, _in_force = _in_force, name
    try:
        yield
    finally:
        _in_force = before


class AttentionBackendMixin:
    """``set_attention_backend`` of a model: its modules that call :func:`attend` are told which one to use.

    A module takes part by having an attribute ``attention_backend`` (``None`` at first) that it hands to
    :func:`attend`: ``attend(q, k, v, backend=self.attention_backend)``.
    """

    def set_attention_backend(self, backend: str) -> None:
        """Compute the attention of this model with ``backend``, whatever is in force elsewhere.

        Raises:
            ValueError: an unknown name, with the known ones.
            MissingExtra: its package is not installed.
        """
        name = str(backend)
        prepare(name)
        self._choose_backend(name)

    def reset_attention_backend(self) -> None:
        """Back to the backend in force."""
        self._choose_backend(None)

    def _choose_backend(self, backend: str | None) -> None:
        assert isinstance(self, nn.Module)
        for module in self.modules():
            if hasattr(module, "attention_backend"):
                module.attention_backend = backend  # type: ignore[assignment]
