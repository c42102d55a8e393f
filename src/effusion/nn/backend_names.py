"""The ecosystem's names around the choice of an attention backend; :mod:`.dispatch` has the choice itself."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .dispatch import attend


class AttentionBackendName(str, enum.Enum):
    """Every backend that the ecosystem has a name for; choosing one that is not offered here says what is."""

    FLASH = "flash"
    FLASH_HUB = "flash_hub"
    FLASH_VARLEN = "flash_varlen"
    FLASH_VARLEN_HUB = "flash_varlen_hub"
    FLASH_4_HUB = "flash_4_hub"
    _FLASH_3 = "_flash_3"
    _FLASH_VARLEN_3 = "_flash_varlen_3"
    _FLASH_3_HUB = "_flash_3_hub"
    _FLASH_3_VARLEN_HUB = "_flash_3_varlen_hub"
    AITER_FA2_HUB = "aiter_fa2_hub"
    FLEX = "flex"
    NATIVE = "native"
    _NATIVE_CUDNN = "_native_cudnn"
    _NATIVE_EFFICIENT = "_native_efficient"
    _NATIVE_FLASH = "_native_flash"
    _NATIVE_MATH = "_native_math"
    _NATIVE_NPU = "_native_npu"
    _NATIVE_XLA = "_native_xla"
    SAGE = "sage"
    SAGE_HUB = "sage_hub"
    SAGE_BLACKWELL_HUB = "sage_blackwell_hub"
    SAGE_VARLEN = "sage_varlen"
    _SAGE_QK_INT8_PV_FP8_CUDA = "_sage_qk_int8_pv_fp8_cuda"
    _SAGE_QK_INT8_PV_FP8_CUDA_SM90 = "_sage_qk_int8_pv_fp8_cuda_sm90"
    _SAGE_QK_INT8_PV_FP16_CUDA = "_sage_qk_int8_pv_fp16_cuda"
    _SAGE_QK_INT8_PV_FP16_TRITON = "_sage_qk_int8_pv_fp16_triton"
    XFORMERS = "xformers"

    __str__ = str.__str__  # its value: what `attend` and the others take


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str | AttentionBackendName | None = None,
    parallel_config: None = None,
) -> Tensor:
    """:func:`~.dispatch.attend` under the ecosystem's name, for attention processors; all ``(B, L, H, D)``.

    Raises:
        ValueError: ``attention_kwargs`` or ``parallel_config``, which no backend here takes.
    """
    if attention_kwargs or parallel_config is not None:
        raise ValueError(
            "dispatch_attention_fn: `attention_kwargs` and `parallel_config` are not offered; leave them out"
        )
    return attend(
        query,
        key,
        value,
        attn_mask,
        scale=scale,
        is_causal=is_causal,
        dropout=dropout_p,
        enable_gqa=enable_gqa,
        backend=None if backend is None else str(backend),
    )
