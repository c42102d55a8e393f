"""Networks of a pipeline that are opened and checked, and get their weights when somebody first asks for them.

What a pipeline is loaded for is often not all of it: an encoder is replaced, a network goes to an accelerator before the
next is read. Converting a gigabyte of half precision to float32 takes half a second, and two gigabytes of memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..weights.prepare import Prepared

Self = TypeVar("Self", bound="PendingComponents")
_lock = threading.RLock()


class PendingComponents:
    """For classes whose components are attributes: ``pipe.unet`` reads the weights of the UNet if nobody has yet."""

    def _hold_back(self, prepared: Mapping[str, Prepared[Any]]) -> None:
        """Let the networks ``prepared``, which the pipeline has without weights, wait."""
        for name in prepared:
            del self.__dict__[name]
        self.__dict__["_pending"] = dict(prepared)

    def _is_component(self, name: str) -> bool:
        """Whether ``name`` is registered as a component: its entry is (library, class)."""
        entry = self.__dict__.get("_internal_dict", {}).get(name)
        return isinstance(entry, tuple) and len(entry) == 2

    def _has(self, name: str) -> bool:
        return name in self.__dict__ or name in self.__dict__.get("_pending", {})

    def __getattr__(self, name: str) -> Any:
        with _lock:
            pending: dict[str, Prepared[Any]] = self.__dict__.get("_pending", {})
            if name in pending:
                self.__dict__[name] = pending[name].build()
                del pending[name]
            if name in self.__dict__:  # another thread may have been faster
                return self.__dict__[name]
        if self._is_component(name):
            raise AttributeError(f"{type(self).__name__!r} object has no component {name!r} any more")
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        with _lock:
            self.__dict__.get("_pending", {}).pop(name, None)
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self.__dict__.get("_pending", {}).pop(name, None) is None:
            object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self.__dict__.get("_pending", {})})

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Networks that wait go from their files straight to a device: the host never holds them whole."""
        kwargs.pop("silence_dtype_warnings", None)
        device, _, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        for prepared in self.__dict__.get("_pending", {}).values():
            prepared.options = replace(prepared.options, device=device)
        return super().to(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of."""
        for name in list(self.__dict__.get("_pending", {})):
            getattr(self, name)
        return self.__dict__
