"""Results that can be read as attributes, as dictionary entries and as tuples."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields
from typing import Any


class BaseOutput(OrderedDict[str, Any]):
    """Base of all result dataclasses.

    ``out.sample``, ``out["sample"]`` and ``out[0]`` are the same value. Fields that are ``None`` are
    left out of the dictionary and of the tuple, as users of the ecosystem expect.
    """

    def __init_subclass__(cls) -> None:
        """Let ``torch.utils._pytree`` (compile, export, fake tensors) look inside the subclass."""
        import torch.utils._pytree as pytree

        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out.keys())),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                OrderedDict.__setitem__(self, field.name, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"an entry of {type(self).__name__} can't be deleted")

    def pop(self, *args: Any) -> Any:
        raise TypeError(f"an entry of {type(self).__name__} can't be popped")

    def __getitem__(self, key: Any) -> Any:
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in self.keys():
            OrderedDict.__setitem__(self, name, value)
        OrderedDict.__setattr__(self, name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        OrderedDict.__setitem__(self, key, value)
        OrderedDict.__setattr__(self, key, value)

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), dict(self))

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not ``None``, in the order of the fields."""
        return tuple(OrderedDict.__getitem__(self, key) for key in self.keys())


def _rebuild(cls: type[BaseOutput], values: dict[str, Any]) -> BaseOutput:
    return cls(**values)
