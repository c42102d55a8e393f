"""Parts of a solver's step under the ecosystem's names, for scripts that take a step apart.

Each computes the sample at the next level from model outputs that were converted before (``convert_model_output``),
at the step that the scheduler is in. A class says in ``_weights`` what the outputs of ``order`` levels count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import SchedulerMixin, combine


def sample_of(args: Sequence[Any], sample: Tensor | None) -> Tensor:
    """The sample: by name, or by place as older scripts have it, after timesteps.

    Raises:
        ValueError: there is none.
    """
    if sample is not None:
        return sample
    tensors = [a for a in args if isinstance(a, Tensor) and a.ndim > 0]
    if not tensors:
        raise ValueError("`sample` is missing: give the sample that the step starts from")
    return tensors[-1]


class Updates(SchedulerMixin):
    """What all of them are made of."""

    def _weights(self, order: int) -> tuple[float, list[float], float]:
        """``a``, the weights of the newest and older model outputs, the scale of the noise."""
        raise NotImplementedError

    def _here(self) -> int:
        """The index of the step that is under way.

        Raises:
            ValueError: none is.
        """
        if self._step_index is None:
            raise ValueError("no step is under way: call `set_timesteps` and `step`, or `_init_step_index`, before")
        return self._step_index

    def _updated(
        self, outputs: Sequence[Tensor], order: int, args: Sequence[Any], sample: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        sample = sample_of(args, sample)
        a, b, scale = self._weights(order)
        if len(outputs) < order:
            raise ValueError(f"{len(outputs)} model outputs for an update of order {order}: give the last {order}")
        if scale and noise is None:
            raise ValueError(f"`noise` is missing: {self.config.get('algorithm_type', 'this solver')} is stochastic")
        terms = list(zip(b, reversed(outputs), strict=False))
        return combine((a, sample), *terms, *([(scale, noise)] if scale and noise is not None else []))


class FirstOrderUpdate(Updates):
    """DPM-Solver of order 1, which is DDIM."""

    def dpm_solver_first_order_update(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The update of order 1, which is DDIM's; shapes as ``sample``."""
        return self._updated([model_output], 1, args, sample, noise)


class MultistepUpdates(FirstOrderUpdate):
    """DPM-Solver's multistep updates."""

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: Sequence[Tensor], *args: Any, sample: Tensor | None = None,
        noise: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The update of order 2 from the last two model outputs, newest last."""
        return self._updated(model_output_list, 2, args, sample, noise)

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: Sequence[Tensor], *args: Any, sample: Tensor | None = None,
        noise: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The update of order 3 from the last three model outputs, newest last."""
        return self._updated(model_output_list, 3, args, sample, noise)


class SinglestepUpdates(FirstOrderUpdate):
    """DPM-Solver's singlestep updates; ``sample`` is where the whole step began."""

    def singlestep_dpm_solver_second_order_update(
        self, model_output_list: Sequence[Tensor], *args: Any, sample: Tensor | None = None,
        noise: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The second stage, from both model outputs, newest last."""
        return self._updated(model_output_list, 2, args, sample, noise)

    def singlestep_dpm_solver_third_order_update(
        self, model_output_list: Sequence[Tensor], *args: Any, sample: Tensor | None = None,
        noise: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The third stage, from all three model outputs, newest last."""
        return self._updated(model_output_list, 3, args, sample, noise)

    def singlestep_dpm_solver_update(
        self, model_output_list: Sequence[Tensor], *args: Any, sample: Tensor | None = None,
        order: int | None = None, noise: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The stage ``order``.

        Raises:
            ValueError: an ``order`` that is not 1, 2 or 3.
        """
        if order not in (1, 2, 3):
            raise ValueError(f"order={order}: give 1, 2 or 3")
        return self._updated(model_output_list, order, args, sample, noise)


class DEISUpdates(Updates):
    """DEIS's updates."""

    def deis_first_order_update(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The update of order 1, which is DDIM's; shapes as ``sample``."""
        return self._updated([model_output], 1, args, sample, None)

    def multistep_deis_second_order_update(
        self, model_output_list: Sequence[Tensor], *args: Any, sample: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The update of order 2 from the last two model outputs, newest last."""
        return self._updated(model_output_list, 2, args, sample, None)

    def multistep_deis_third_order_update(
        self, model_output_list: Sequence[Tensor], *args: Any, sample: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The update of order 3 from the last three model outputs, newest last."""
        return self._updated(model_output_list, 3, args, sample, None)
