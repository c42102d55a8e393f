"""What callbacks and scripts read off a pipeline about its current run."""

from __future__ import annotations

from typing import Any

LIVE = (
    "guidance_scale",
    "guidance_rescale",
    "clip_skip",
    "cross_attention_kwargs",
    "joint_attention_kwargs",
    "attention_kwargs",
    "skip_guidance_layers",
    "denoising_start",
    "denoising_end",
)


class RunFacts:
    """For pipelines that set these at the beginning of a run."""

    _guidance_scale: Any = None
    _guidance_rescale: Any = None
    _clip_skip: Any = None
    _cross_attention_kwargs: Any = None
    _joint_attention_kwargs: Any = None
    _attention_kwargs: Any = None
    _skip_guidance_layers: Any = None
    _denoising_start: Any = None
    _denoising_end: Any = None
    _current_timestep: Any = None
    _num_timesteps: int = 0
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale  # type: ignore[no-any-return]

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale  # type: ignore[no-any-return]

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip  # type: ignore[no-any-return]

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs  # type: ignore[no-any-return]

    @property
    def joint_attention_kwargs(self) -> dict[str, Any] | None:
        return self._joint_attention_kwargs  # type: ignore[no-any-return]

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs  # type: ignore[no-any-return]

    @property
    def skip_guidance_layers(self) -> list[int] | None:
        return self._skip_guidance_layers  # type: ignore[no-any-return]

    @property
    def denoising_start(self) -> float | None:
        return self._denoising_start  # type: ignore[no-any-return]

    @property
    def denoising_end(self) -> float | None:
        return self._denoising_end  # type: ignore[no-any-return]

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current run has a negative branch."""
        return self._guidance_scale is not None and self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the current run."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The timestep of the step that a callback is told of; ``None`` outside of the loop."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt
