"""``check_inputs``: the checks of a call, with the parameters that each pipeline of the ecosystem has for it."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from ...blocks.inpaint import check_pictures
from ...core.types import State
from ...families.control import control_of

_CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")


def parse(parameters: str) -> inspect.Signature:
    """The signature of a method whose parameters are written ``"prompt, height, width, image=None"``."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [inspect.Parameter("self", kind)]
    for item in parameters.split(","):
        name, _, default = item.strip().partition("=")
        value = ast.literal_eval(default) if default else inspect.Parameter.empty
        found.append(inspect.Parameter(name, kind, default=value))
    return inspect.Signature(found)


def checks(parameters: str) -> Any:
    """A method ``check_inputs`` with these ``parameters``; there are some thirty lists of them, and one check."""
    signature = parse(parameters)

    def check_inputs(*args: Any, **kwargs: Any) -> None:
        """Raise ``ValueError`` for what a call can't do; nothing is computed."""
        given = signature.bind(*args, **kwargs)
        arguments = dict(given.arguments)
        pipe = arguments.pop("self")
        _check(pipe, arguments)
        if "control_guidance_start" in signature.parameters:
            given.apply_defaults()
            values = [given.arguments[name] for name in _CONTROL]
            control_of(pipe.controlnet, lambda inputs, scales: {}, len(getattr(pipe.controlnet, "nets", "1")), *values)

    check_inputs.__signature__ = signature  # type: ignore[attr-defined]
    return check_inputs


def _check(pipe: Any, arguments: dict[str, Any]) -> None:
    every = arguments.pop("callback_steps", None)
    pipe._legacy_callback({} if every is None else {"callback_steps": every})
    steps = arguments.pop("num_inference_steps", None)
    if steps is not None and not (isinstance(steps, int) and steps > 0):
        raise ValueError(f"`num_inference_steps` has to be at least 1, got {steps!r}")
    if "mask_image" in arguments and "masked_image_latents" not in arguments:
        image, mask, crop = (arguments.get(name) for name in ("image", "mask_image", "padding_mask_crop"))
        check_pictures(image, mask, crop, arguments.get("output_type") or "pil")
    state = State()
    state.update({**pipe.family.defaults.get(pipe.task, {}), **arguments})
    pipe._callback_of(state)
    context = pipe._context()
    for name in ("find_size", "check"):
        if name in pipe.blocks:
            state.update(pipe.blocks[name](state, context))
