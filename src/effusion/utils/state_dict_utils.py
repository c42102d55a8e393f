"""How the weights of a LoRA are called: by ``peft``, by the ecosystem's files, old and new, by the trainer kohya."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class StateDictType(enum.Enum):
    """The ways of naming."""

    DIFFUSERS_OLD = "diffusers_old"
    KOHYA_SS = "kohya_ss"
    PEFT = "peft"
    DIFFUSERS = "diffusers"


_STEPS = (("up", "B"), ("down", "A"))
# text encoders: what a projection is called in old files and in transformers
_TEXT = (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj"))
_UNET = {
    **{f".to_out_lora.{step}": f".to_out.0.lora_{letter}" for step, letter in _STEPS},
    **{f".to_{x}_lora.{step}": f".to_{x}.lora_{letter}" for x in "qkv" for step, letter in _STEPS},
    **{f".lora.{step}": f".lora_{letter}" for step, letter in _STEPS},
    ".to_out.lora_magnitude_vector": ".to_out.0.lora_magnitude_vector",
}
_LAYER_TO_PEFT = {f".lora_linear_layer.{step}": f".lora_{letter}" for step, letter in _STEPS}
_TO_PEFT = {
    StateDictType.DIFFUSERS_OLD: {f".{old}_lora.{s}": f".{new}.lora_{x}" for old, new in _TEXT for s, x in _STEPS}
    | _LAYER_TO_PEFT,
    StateDictType.DIFFUSERS: _LAYER_TO_PEFT
    | {f"text_projection.lora.{s}.weight": f"text_projection.lora_{x}.weight" for s, x in _STEPS},
}
_TO_DIFFUSERS = {
    StateDictType.DIFFUSERS_OLD: {
        **{f".{old}_lora.{s}": f".{new}.lora_linear_layer.{s}" for old, new in _TEXT for s, _ in _STEPS},
        **{f".{old}.lora_magnitude_vector": f".{new}.lora_magnitude_vector" for old, new in _TEXT},
    },
    StateDictType.PEFT: {
        **{f".{new}.lora_{x}": f".{new}.lora_linear_layer.{s}" for _, new in _TEXT for s, x in _STEPS},
        **{f"{to}.lora_{x}": f"{to}.lora.{s}" for to in ("to_q", "to_k", "to_v", "to_out.0") for s, x in _STEPS},
    },
}
_KOHYA_PREFIXES = (("text_encoder_2.", "lora_te2."), ("text_encoder.", "lora_te1."), ("unet", "lora_unet"))


def convert_state_dict(state_dict: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """``state_dict`` with the first part of each name that ``mapping`` knows replaced."""

    def renamed(name: str) -> str:
        name = name.replace(".processor.", ".")
        part = next((part for part in mapping if part in name), None)
        return name if part is None else name.replace(part, mapping[part])

    return {renamed(name): value for name, value in state_dict.items()}


def _has(state_dict: Mapping[str, Any], part: str) -> bool:
    return any(part in name for name in state_dict)


def _unknown(state_dict: Mapping[str, Any]) -> ValueError:
    names = ", ".join(list(state_dict)[:3])
    return ValueError(f"no way of naming LoRA weights that is known here: {names}, …; say which with `original_type`")


def _choose(table: Mapping[StateDictType, Mapping[str, str]], kind: StateDictType) -> Mapping[str, str]:
    if kind not in table:
        raise ValueError(f"original_type={kind} can't be converted so; {', '.join(str(k) for k in table)} can")
    return table[kind]


def convert_state_dict_to_peft(
    state_dict: Mapping[str, Any], original_type: StateDictType | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The names that ``peft`` has, from the ecosystem's, old or new.

    Raises:
        ValueError: other names.
    """
    if original_type is None:
        if _has(state_dict, "to_out_lora"):
            original_type = StateDictType.DIFFUSERS_OLD
        elif _has(state_dict, "lora_linear_layer"):
            original_type = StateDictType.DIFFUSERS
        else:
            raise _unknown(state_dict)
    return convert_state_dict(state_dict, _choose(_TO_PEFT, original_type))


def convert_state_dict_to_diffusers(
    state_dict: Mapping[str, Any], original_type: StateDictType | None = None, **kwargs: Any
) -> Mapping[str, Any]:
    """The names of the ecosystem's files, from those of ``peft`` or old ones; new ones stay as they are.

    Args:
        adapter_name: what ``peft`` put into the names, if anything.

    Raises:
        ValueError: other names.
    """
    adapter = kwargs.get("adapter_name")
    if original_type is None:
        if _has(state_dict, "to_out_lora"):
            original_type = StateDictType.DIFFUSERS_OLD
        elif _has(state_dict, f".lora_A{f'.{adapter}' if adapter else ''}.weight"):
            original_type = StateDictType.PEFT
        elif _has(state_dict, "lora_linear_layer"):
            return state_dict
        else:
            raise _unknown(state_dict)
    return convert_state_dict(state_dict, _choose(_TO_DIFFUSERS, original_type))


def convert_unet_state_dict_to_peft(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The names that ``peft`` has, from those that files have for denoisers."""
    return convert_state_dict(state_dict, _UNET)


def convert_all_state_dict_to_peft(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The names that ``peft`` has, from those of text encoders or denoisers.

    Raises:
        ValueError: no LoRA weights among them.
    """
    text = _has(state_dict, "to_out_lora") or _has(state_dict, "lora_linear_layer")
    made = (convert_state_dict_to_peft if text else convert_unet_state_dict_to_peft)(state_dict)
    if not (_has(made, "lora_A") or _has(made, "lora_B")):
        raise _unknown(state_dict)
    return made


def convert_state_dict_to_kohya(
    state_dict: Mapping[str, Any], original_type: StateDictType | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The names that kohya's trainer and most user interfaces have, with their ``alpha``, from those of ``peft``.

    Raises:
        ValueError: other names.
    """
    adapter = f".{kwargs['adapter_name']}" if kwargs.get("adapter_name") else ""
    if original_type is None and not _has(state_dict, f".lora_A{adapter}.weight"):
        raise _unknown(state_dict)
    _choose({StateDictType.PEFT: {}}, original_type or StateDictType.PEFT)
    made: dict[str, Any] = {}
    for name, value in convert_state_dict(state_dict, {"lora_A": "lora_down", "lora_B": "lora_up"}).items():
        prefix = next((p for p in _KOHYA_PREFIXES if p[0] in name), ("lora_magnitude_vector", "dora_scale"))
        name = name.replace(*prefix)
        name = name.replace(".", "_", name.count(".") - 2).replace(adapter, "")
        made[name] = value
        if "lora_down" in name:
            made[f"{name.split('.')[0]}.alpha"] = torch.tensor(len(value))
    return made


def state_dict_all_zero(state_dict: Mapping[str, Any], filter_str: str | Sequence[str] | None = None) -> bool:
    """Whether all tensors (those whose name has a part of ``filter_str``) are zero."""
    parts = [filter_str] if isinstance(filter_str, str) else filter_str
    chosen = [v for k, v in state_dict.items() if parts is None or any(part in k for part in parts)]
    return all(not bool(value.any()) for value in chosen)
