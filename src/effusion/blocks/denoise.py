"""The denoising loop: a generator over steps, the same for every family and task."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..core.types import Cond, ModelInput, State, Step
from .guiders import ClassifierFree


def denoise(
    state: State,
    family: Any,
    components: Any,
    scheduler: Any,
    timesteps: Tensor,
    eta: float = 0.0,
    generator: Any = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    guider: Any = None,
    blend: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    use_clipped_model_output: bool | None = None,
    hoist: Any = None,
    rescue: Any = None,
) -> Iterator[Step]:
    """Go from noise to latents: per step scale the input, predict each branch, guide, step, blend.

    Yields a :class:`Step` after each; the consumer may change ``state`` (latents, conditioning,
    ``interrupted``) and the loop goes on with what it finds there.

    Args:
        hoist: is shown the calls of the network that will be made, before they are, and again when conditions changed
            or a step begins again.
        rescue: does a step, given its name, the step and what it changes, again if need be.
    """
    model = components[family.denoiser]
    options = step_options(scheduler, eta=eta, generator=generator, use_clipped_model_output=use_clipped_model_output)
    state.guider = guider or ClassifierFree(guidance_scale, guidance_rescale)
    scale_input = getattr(scheduler, "scale_model_input", lambda x, t: x)
    predictor = Predictor(family, model, state, cross_attention_kwargs or joint_attention_kwargs or attention_kwargs)
    assert state.latents is not None and state.conds is not None
    ahead = LookAhead(hoist, predictor, timesteps)

    def advance(index: int, t: Tensor) -> None:
        assert state.latents is not None and state.conds is not None
        ahead.tries(index)
        done, total = index / len(timesteps), len(timesteps)
        predict = predictor.at(scale_input(state.latents, t), t, (done, (index + 1) / total))
        prediction = state.guider(predict, state.conds, done)
        stepped = scheduler.step(prediction, t, state.latents, **options, return_dict=False)
        state.latents = stepped[0]
        state.denoised = stepped[1] if len(stepped) > 1 else None
        if blend is not None:
            state.latents = blend(state.latents, index, timesteps)

    for index, t in enumerate(timesteps):
        ahead.comes_to(index)
        if rescue is None:
            advance(index, t)
        else:
            what = f"step {index + 1} of {len(timesteps)}"
            rescue(what, partial(advance, index, t), state, scheduler, generator, state.guider, state.control)
        yield Step(index, t, len(timesteps), state)
        if state.interrupted:
            break


class LookAhead:
    """Shows ``hoist`` the rest of the loop."""

    def __init__(self, hoist: Any, predictor: Predictor, timesteps: Tensor) -> None:
        self.hoist, self.predictor, self.timesteps = hoist, predictor, timesteps
        self._seen: tuple[Cond, ...] = ()  # the conditions that it was shown with
        self._tried = -1

    def comes_to(self, index: int) -> None:
        """The step ``index`` is next: it is shown if the conditions are others than before."""
        conds = tuple((self.predictor.state.conds or {}).values())
        if self.hoist is not None and any(a is not b for a, b in zip_longest(self._seen, conds)):
            self._seen = conds
            self.hoist(partial(foresee, self.predictor, self.timesteps, index))

    def tries(self, index: int) -> None:
        """The step ``index`` begins: for the second time if memory ran out, and then weights are all back."""
        if index == self._tried:
            self._seen = ()
            self.comes_to(index)
        self._tried = index


def foresee(predictor: Predictor, timesteps: Tensor, start: int = 0) -> None:
    """Ask for the predictions of the steps from ``start`` on with latents that have a shape and no values."""
    state = predictor.state
    assert state.latents is not None
    x = torch.empty_like(state.latents, device="meta")
    guider, control = copy.copy(state.guider), state.control
    state.control = copy.copy(control)
    try:
        for index, t in enumerate(timesteps[start:], start):
            part = (index / len(timesteps), (index + 1) / len(timesteps))
            guider(predictor.at(x, t, part), state.conds, part[0])
    finally:
        state.control = control


class Predictor:
    """Evaluates the network for some branches, as one batch or (``family.one_by_one``) in turn."""

    def __init__(self, family: Any, model: Any, state: State, attention: dict[str, Any] | None) -> None:
        self.family, self.model, self.state, self.attention = family, model, state, attention
        self._batched: tuple[tuple[Cond, ...], Cond] | None = None

    def at(self, x: Tensor, t: Tensor, part: tuple[float, float]) -> Any:
        """The predictions at ``x``, ``t`` as a function of the branches and of changes to the input.

        ``part`` of the steps, in 0..1, begins and ends with this one.
        """

        def predict(conds: Sequence[Cond], **changes: Any) -> Sequence[Tensor]:
            if self.family.one_by_one:
                return [self._evaluate(x, t, [cond], part, changes) for cond in conds]
            prediction = self._evaluate(x, t, conds, part, changes)
            return (prediction,) if len(conds) == 1 else prediction.chunk(len(conds))

        return predict

    def _evaluate(
        self, x: Tensor, t: Tensor, conds: Sequence[Cond], part: tuple[float, float], changes: dict[str, Any]
    ) -> Tensor:
        n, state = len(conds), self.state
        inputs = ModelInput(
            x=_tile(x, n),
            t=t,
            cond=conds[0] if n == 1 else self._cat(conds),
            channels=_tile(state.channels, n),
            tokens=_tile(state.tokens, n),
            guidance=_tile(state.guidance, n),
            positions=state.positions or {},
            attention=self.attention,
        )
        if state.control is not None:
            inputs = inputs.replace(residuals=state.control(inputs, *part))
        return self.family.call(self.model, inputs.replace(**changes) if changes else inputs)  # type: ignore[no-any-return]

    def _cat(self, conds: Sequence[Cond]) -> Cond:
        """The branches as one batch; made again only when one of them was replaced."""
        key = tuple(conds)
        before = self._batched
        if before is None or len(before[0]) != len(key) or any(a is not b for a, b in zip(before[0], key, strict=True)):
            before = self._batched = (key, Cond.cat(key))
        return before[1]


def _tile(x: Tensor | None, n: int) -> Any:
    return x if x is None or n == 1 else torch.cat([x] * n)


def step_options(scheduler: Any, **options: Any) -> dict[str, Any]:
    """Those of ``options`` that the scheduler's ``step`` takes."""
    accepted = inspect.signature(scheduler.step).parameters
    return {k: v for k, v in options.items() if k in accepted and v is not None}
