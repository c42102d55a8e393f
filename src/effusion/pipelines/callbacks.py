"""What users run after each step, and the tensors that they may read and replace there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..core.config import ConfigMixin, register_to_config
from ..core.types import Cond, State

# name in `callback_on_step_end_tensor_inputs` -> (part of the conditioning, guidance branch or None for all)
_CONDS = {
    "prompt_embeds": ("tokens", None),
    "negative_prompt_embeds": ("tokens", "negative"),
    "add_text_embeds": ("pooled", None),
    "pooled_prompt_embeds": ("pooled", None),
    "negative_pooled_prompt_embeds": ("pooled", "negative"),
    "add_time_ids": ("time_ids", None),
    "negative_add_time_ids": ("time_ids", "negative"),
    "add_neg_time_ids": ("time_ids", "negative"),
}
_RENAMED = {"w_embedding": "guidance"}
_MASKS = ("mask", "masked_image_latents")  # once for each branch of guidance, like the conditioning


Tensors = dict[str, Any]  # by their names in `callback_on_step_end_tensor_inputs`


class PipelineCallback(ConfigMixin):
    """Base of official callbacks: subclass, set ``tensor_inputs``, write ``callback_fn``.

    Args:
        cutoff_step_ratio: when to act, as a part of all steps in 0..1.
        cutoff_step_index: when to act, as an index; give one of the two.
    """

    config_name = "config.json"
    tensor_inputs: Sequence[str] = ()

    @register_to_config
    def __init__(self, cutoff_step_ratio: float | None = 1.0, cutoff_step_index: int | None = None) -> None:
        if (cutoff_step_ratio is None) == (cutoff_step_index is None):
            raise ValueError("give one of `cutoff_step_ratio` and `cutoff_step_index`, the other as None")
        if cutoff_step_ratio is not None and not 0.0 <= cutoff_step_ratio <= 1.0:
            raise ValueError(f"`cutoff_step_ratio` has to be between 0 and 1, got {cutoff_step_ratio}")

    def cutoff(self, pipeline: Any) -> int:
        """The index of the step at which to act."""
        index: int | None = self.config.cutoff_step_index
        return int(pipeline.num_timesteps * self.config.cutoff_step_ratio) if index is None else index

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} has to define `callback_fn`")

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        return self.callback_fn(pipeline, step_index, timestep, callback_kwargs)


class MultiPipelineCallbacks:
    """Several callbacks as one, run in order."""

    def __init__(self, callbacks: list[PipelineCallback]) -> None:
        self.callbacks = callbacks

    @property
    def tensor_inputs(self) -> list[str]:
        return [name for callback in self.callbacks for name in callback.tensor_inputs]

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        for callback in self.callbacks:
            callback_kwargs = callback(pipeline, step_index, timestep, callback_kwargs)
        return callback_kwargs


class SDCFGCutoffCallback(PipelineCallback):
    """Stop classifier-free guidance after the cutoff: the rest of the steps cost half."""

    tensor_inputs: Sequence[str] = ("prompt_embeds",)
    _whole: Sequence[str] = ()  # inputs that may come for the branch with the prompt alone already

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if step_index == self.cutoff(pipeline):
            pipeline._guidance_scale = 0.0
            tensors = {name: callback_kwargs[name] for name in self.tensor_inputs}
            cut = {name: x.chunk(2)[-1] for name, x in tensors.items() if name not in self._whole}
            batch = len(cut["prompt_embeds"])
            callback_kwargs |= {**cut, **{name: _last(tensors[name], batch) for name in self._whole}}
        return callback_kwargs


class SDXLCFGCutoffCallback(SDCFGCutoffCallback):
    """The same for Stable Diffusion XL."""

    tensor_inputs = ("prompt_embeds", "add_text_embeds", "add_time_ids")


class SDXLControlnetCFGCutoffCallback(SDCFGCutoffCallback):
    """The same for Stable Diffusion XL with control networks, whose pictures come once for each branch."""

    tensor_inputs = ("prompt_embeds", "add_text_embeds", "add_time_ids", "image")
    _whole = ("image",)


class SD3CFGCutoffCallback(SDCFGCutoffCallback):
    """The same for Stable Diffusion 3."""

    tensor_inputs = ("prompt_embeds", "pooled_prompt_embeds")


def _last(value: Any, batch: int) -> Any:
    """The last ``batch`` rows of a tensor, or of each of a list."""
    return [_last(v, batch) for v in value] if isinstance(value, (list, tuple)) else value[-batch:]


def read_tensor(state: State, name: str) -> Any:
    """The tensor that users know as ``name``; branches of guidance side by side, negative first."""
    conds = state.conds or {}
    if name in _MASKS and (mask := state.get(name)) is not None and mask.ndim == 4:
        return torch.cat([mask] * len(conds))
    if name not in _CONDS:
        return state.get(_RENAMED.get(name, name))
    part, branch = _CONDS[name]
    if branch is not None:
        return conds[branch].tensors.get(part) if branch in conds else None
    return torch.cat([cond.tensors[part] for cond in conds.values()])


def write_tensors(state: State, given: dict[str, Any], returned: dict[str, Any]) -> None:
    """Put back what a callback returned in place of what it was given.

    Tensors cut down to one branch end the guidance.
    """
    for name, value in returned.items():
        if value is given.get(name):
            continue
        if name in _MASKS:
            _write_mask(state, name, value)
        elif name not in _CONDS:
            state.update({_RENAMED.get(name, name): value})
        elif _CONDS[name][1] is None:
            _write_branches(state, _CONDS[name][0], value)
        else:
            _write_branch(state, str(_CONDS[name][1]), _CONDS[name][0], value)


def _write_mask(state: State, name: str, value: torch.Tensor) -> None:
    """Let a new mask, or new masked latents, act where the first ones did: in the blend or as input channels."""
    value = value[-state.get(name).shape[0] :]
    state.update({name: value})
    if state.channels is not None and state.mask is not None:
        state.channels = torch.cat([state.mask, state.get("masked_image_latents")], dim=1)
    blend = state.get("blend")
    if blend is not None and name == "mask":
        blend.mask = value


def _write_branches(state: State, part: str, value: torch.Tensor) -> None:
    assert state.conds is not None
    batch = state.conds["positive"].tensors[part].shape[0]
    if value.shape[0] == batch and len(state.conds) > 1:
        state.conds = {"positive": state.conds["positive"]}
    for branch, tensor in zip(list(state.conds), value.chunk(len(state.conds)), strict=True):
        _write_branch(state, branch, part, tensor)


def _write_branch(state: State, branch: str, part: str, value: Any) -> None:
    conds = dict(state.conds or {})
    if branch not in conds or value is None:
        return
    if conds[branch].tensors[part] is value:
        return
    conds[branch] = _with(conds[branch], part, value)
    state.conds = conds


def _with(cond: Cond, part: str, value: Any) -> Cond:
    if part in cond.extras:
        return replace(cond, extras={**cond.extras, part: value})
    return replace(cond, **{part: value})
