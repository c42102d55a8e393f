"""Running a network on what is known before its latents are: results that come out with values depend on nothing else.

Unknown tensors are on ``meta``, they have a shape and no values. :class:`Foresight` carries every operator with an
unknown argument out on ``meta`` and every other one for real. Tensors that are known and differ from one call to the
next are :class:`Known`: one value per call, and an operator is applied to each of them by itself, with the shapes that
the call has, because a product of all at once rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.errors import EffusionError
from .arena import tensors_in
from .exhausted import is_out_of_memory
from .trees import mapped

LIMIT = 32 << 20  # bytes: a result larger than this for all calls together is not worth knowing
_META = torch.device("meta")
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_PLACES = ("device", "is_cuda", "is_cpu", "is_meta")


class Unforeseen(EffusionError, RuntimeError):
    """What a network does depends on values that are not known beforehand."""


class Known(Tensor):
    """A tensor with a value for each call (or one for all); as a tensor it looks like the first of them."""

    parts: list[Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(parts: list[Tensor]) -> Known:
        made = Tensor._make_subclass(Known, parts[0].detach())  # type: ignore[attr-defined]
        made.parts = parts
        return made  # type: ignore[no-any-return]


class Weights(Protocol):
    """What lends the weights of the network, one at a time."""

    device: torch.device  # where the network computes

    def __contains__(self, tensor: Tensor) -> bool: ...

    def like(self, tensor: Tensor) -> Tensor: ...  # without values, as it is computed with

    def note(self, tensor: Tensor) -> None: ...

    def borrow(self, tensor: Tensor) -> Tensor: ...

    def give_back(self) -> None: ...


class NoWeights:
    """For code around networks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __contains__(self, tensor: Tensor) -> bool:
        return False

    def like(self, tensor: Tensor) -> Tensor:
        return tensor

    def note(self, tensor: Tensor) -> None:
        pass

    def borrow(self, tensor: Tensor) -> Tensor:
        return tensor

    def give_back(self) -> None:
        pass


class Foresight(TorchFunctionMode):
    """Moves an operator to ``meta`` as soon as one argument is unknown, and runs it for every known value otherwise.

    Args:
        symbolic: known tensors have no values either (weights that were not read yet): only find out what is known.
        calls: for how many calls a symbolic :class:`Known` with several values stands.

    Raises:
        Unforeseen: inside of it, where code asks for the value of what is unknown or differs between the calls.
    """

    def __init__(self, weights: Weights, symbolic: bool = False, calls: int = 1) -> None:
        super().__init__()
        self.weights = weights
        self.symbolic = symbolic
        self.calls = calls
        self._tainted: dict[int, Tensor] = {}  # storages with values into which something unknown was written

    def unknown(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` depends on what is not known."""
        if isinstance(tensor, Known):
            return bool(self._tainted) and tensor.parts[0].untyped_storage()._cdata in self._tainted
        if tensor in self.weights:
            return False
        return tensor.is_meta or (bool(self._tainted) and tensor.untyped_storage()._cdata in self._tainted)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        found = [*tensors_in([args, kwargs])]
        target = _written(name, args, kwargs)
        for tensor in found:
            if tensor in self.weights:
                self.weights.note(tensor)
        if target is not None and target in self.weights:
            raise Unforeseen(f"{name} writes into a weight")
        try:
            if any(self.unknown(t) for t in found):
                return self._unknown(func, name, args, kwargs, target)
            return self._known(func, found, args, kwargs, target)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, Unforeseen) or is_out_of_memory(error):
                raise
            raise Unforeseen(f"{name}: {str(error).splitlines()[0] if str(error) else error!r}") from error

    # -- attributes --------------------------------------------------------------------------------

    def _attribute(self, func: Any, tensor: Any) -> Any:
        """Tensors say what they would say in the run: that they are on the compute device, in the compute dtype."""
        name = func.__self__.__name__
        weight = isinstance(tensor, Tensor) and tensor in self.weights
        if name in _PLACES and (weight or tensor.is_meta):
            place = self.weights.device
            return place if name == "device" else place.type == name.removeprefix("is_")
        if isinstance(tensor, Known):
            return self._combined([func(part) for part in tensor.parts])
        value = func(self.weights.like(tensor) if weight else tensor)
        return self._known(func, [tensor], (tensor,), {}, None) if weight and isinstance(value, Tensor) else value

    # -- operators ---------------------------------------------------------------------------------

    def _known(self, func: Any, found: list[Tensor], args: Any, kwargs: Any, target: Tensor | None) -> Any:
        count = max((len(t.parts) for t in found if isinstance(t, Known)), default=1)
        if target is not None and count > 1 and not (isinstance(target, Known) and len(target.parts) == count):
            return self._taint(target)
        lent = {} if self.symbolic else {id(t): self.weights.borrow(t) for t in found if t in self.weights}
        try:
            results = []
            for index in range(count):
                take = partial(self._value, index=index, lent=lent)
                results.append(func(*_carried(args, take, self.symbolic), **_carried(kwargs, take, self.symbolic)))
        finally:
            self.weights.give_back()
        return target if target is not None and results[0] is not None else self._combined(results)

    def _value(self, tensor: Tensor, index: int, lent: Mapping[int, Tensor]) -> Tensor:
        if isinstance(tensor, Known):
            tensor = tensor.parts[index if len(tensor.parts) > 1 else 0]
        return self._shape(tensor) if self.symbolic else lent.get(id(tensor), tensor)

    def _combined(self, results: list[Any]) -> Any:
        first = results[0]
        if isinstance(first, Tensor):
            if self.symbolic:
                times = self.calls if len(results) > 1 else 1
                return first if first.nbytes * times > LIMIT else Known.of(results)
            if len(results) == 1:
                return first
            return self._shape(first) if sum(t.nbytes for t in results) > LIMIT else Known.of(results)
        if isinstance(first, (tuple, list)) and not isinstance(first, torch.Size):
            items = [self._combined(list(each)) for each in zip(*results, strict=True)]
            return type(first)(items) if type(first) in (tuple, list) else first._make(items)  # type: ignore[union-attr]
        if any(type(r) is not type(first) or r != first for r in results[1:]):
            raise Unforeseen(f"a value that the code looks at differs between the calls: {results[:3]}")
        return first

    def _unknown(self, func: Any, name: str, args: Any, kwargs: Any, target: Tensor | None) -> Any:
        if target is not None and not (target.is_meta and not isinstance(target, Known)):
            return self._taint(target)
        if name in ("cpu", "cuda"):
            return args[0]
        a, k = (_carried(v, self._shape, True) for v in (args, kwargs))
        if name == "to":
            _, dtype, _, _ = torch._C._nn._parse_to(*a[1:], **{n: v for n, v in k.items() if n != "copy"})
            return a[0].to(dtype=dtype or a[0].dtype)
        return func(*a, **k)

    def _taint(self, target: Tensor) -> Tensor:
        for part in target.parts if isinstance(target, Known) else [target]:
            self._tainted[part.untyped_storage()._cdata] = part
        return target

    def _shape(self, tensor: Tensor) -> Tensor:
        """``tensor`` without values, a weight as it is computed with."""
        if tensor in self.weights:
            return self.weights.like(tensor)
        return tensor if tensor.is_meta and not isinstance(tensor, Known) else shape_of(tensor)


def shape_of(tensor: Tensor) -> Tensor:
    """``tensor`` on ``meta``."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _written(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that the operator writes to, if it does."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]  # type: ignore[no-any-return]
    in_place = name in ("__setitem__", "__set__") or name in _IN_PLACE or (name.endswith("_") and name[-2:] != "__")
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


def _carried(value: Any, function: Callable[[Tensor], Tensor], to_meta: bool) -> Any:
    """Arguments with ``function`` applied to the tensors among them; an operator ``to_meta`` makes no others either."""
    if not to_meta:
        return mapped(value, function)
    if isinstance(value, dict) and "device" in value:
        value = {**value, "device": _META}
    return mapped(value, function, lambda leaf: _META if isinstance(leaf, torch.device) else leaf)
