"""How large a call is: what is compared with the call that was planned for, as soon as a run knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# inputs that a rehearsal of a call has to do without: they are the run's own, or set the number of its steps
OF_THE_RUN = frozenset((
    "generator", "output_type", "return_dict", "strength", "timesteps", "sigmas", "denoising_start", "denoising_end",
    "callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
))  # fmt: skip


def extent(state: Any) -> dict[str, int]:
    """The size of the run that ``state`` passes through; nothing before the call was checked."""
    if state.get("batch") is None:
        return {}
    found = {n: state.get(n) for n in ("height", "width", "num_frames", "max_sequence_length", "num_inference_steps")}
    found |= {"batch_size": state.get("batch"), "branches": 1 + bool(state.get("guide"))}
    found |= {"pictures": _count(state.get("image")), "tokens": _tokens(state)}
    return {n: int(v) for n, v in found.items() if isinstance(v, int) and v}


def larger(state: Any, planned: Mapping[str, Any], hoisted: bool) -> list[str]:
    """In what the run of ``state`` is larger than ``planned``."""
    found = extent(state)
    if not hoisted:
        found.pop("num_inference_steps", None)  # only a table grows with the steps
    if state.get("prompt_embeds") is None:
        found.pop("tokens", None)  # a prompt may be longer than the one of the rehearsal: that is within the forecast
    return [n for n, v in found.items() if planned.get(n) is not None and v > planned[n]]


def _count(image: Any) -> int:
    """How many pictures ``image`` is, in whatever form a caller gives them."""
    if isinstance(image, (list, tuple)):
        return sum(map(_count, image))
    shape: Any = getattr(image, "shape", ())
    return int(shape[0]) if len(shape) == 4 else int(image is not None)


def _tokens(state: Any) -> int | None:
    """The length of the conditioning: of embeddings that the caller gave, else of what was encoded."""
    embeds, conds = state.get("prompt_embeds"), state.get("conds")
    if embeds is None and conds:
        embeds = conds["positive"].tokens
    shape: Any = getattr(embeds, "shape", ())
    return int(shape[1]) if len(shape) == 3 else None


def asked(inputs: Mapping[str, Any]) -> dict[str, int]:
    """The size of a call, as far as its arguments say it."""
    found = {n: int(inputs[n]) for n in ("height", "width", "num_frames") if inputs.get(n) is not None}
    per_prompt = int(inputs.get("num_images_per_prompt") or 1)
    found["batch_size"] = int(inputs.get("batch_size") or prompts(inputs)) * per_prompt
    return found


def prompts(inputs: Mapping[str, Any]) -> int:
    """How many prompts a call is given."""
    prompt, embeds = inputs.get("prompt"), inputs.get("prompt_embeds")
    if embeds is not None:
        return int(embeds.shape[0])
    return len(prompt) if isinstance(prompt, (list, tuple)) else 1
