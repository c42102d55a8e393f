"""What stands in front of a module while an engine serves it: lends weights, calls, takes them back.

It takes the place that ``nn.Module`` keeps for a compiled version of the call. There it is outside
of everything: outside the module's own hooks, outside a compiled ``forward``, and it sees exceptions.
Networks know nothing of it, ``copy.deepcopy`` and pickling leave it behind.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import PlanConflict
from .arena import tensors_in
from .compiling import set_eval_frame, skip_code
from .trees import mapped

if TYPE_CHECKING:
    from .engine import Engine
    from .transform import Transform
    from .unit import Unit

MISS = object()  # what a table says that has no answer
ENTRIES = ("encode", "decode", "get_image_features", "get_text_features")  # methods that start work without a call


class StandsIn:
    """Base of what is in front of a module instead of a lender while its calls are only rehearsed."""


class Lender:
    """Serves one module: its units are lent, its weights decoded and patched, for the time of a call."""

    def __init__(self, engine: Engine, module: nn.Module, run: Callable[..., Any]) -> None:
        self.engine = engine
        self.module = module
        self.run = run  # the call as it would be without us: plain or compiled
        self.units: list[Unit] = []
        self.transforms: list[Transform] = []
        self.device: torch.device | None = None  # where inputs have to be
        self.exclude: frozenset[str] = frozenset()  # keyword arguments that stay where they are
        self.give_back = False  # move the output to where the first input was

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.units and torch._C._get_tracing_state() is not None:
            self._refuse_tracing()
        compiling = set_eval_frame(None)  # what is ours is not compiled; what is called may be
        hoisting, top = self.engine.hoisting, self.module is self.engine.root
        if hoisting is not None and not top:
            answer = hoisting.answer(self.module, args, kwargs)
            if answer is not MISS:
                set_eval_frame(compiling)
                return answer
        before = hoisting.begin(args, kwargs) if hoisting is not None and top else None
        origin = None
        if self.device is not None:
            origin = first_device(args, kwargs) if self.give_back else None
            args = move(args, self.device)
            kwargs = {k: v if k in self.exclude else move(v, self.device) for k, v in kwargs.items()}
        entered: list[Unit] = []
        changed: list[Transform] = []
        failed = True
        try:
            for unit in self.units:
                self.engine.enter(unit)
                entered.append(unit)
            for transform in self.transforms:
                transform.enter()
                changed.append(transform)
            set_eval_frame(compiling)
            try:
                out = self.run(*args, **kwargs)
            finally:
                set_eval_frame(None)
            if entered:
                out = self.engine.own_output(out)
            failed = False
        finally:
            for transform in reversed(changed):
                transform.exit()
            for unit in reversed(entered):
                self.engine.exit(unit, self.module, failed)
            if hoisting is not None and top:
                hoisting.end(before)
            set_eval_frame(compiling)
        return out if origin is None else move(out, origin)

    def _refuse_tracing(self) -> None:
        """A trace keeps the weights that it sees; lent ones are gone after the call."""
        engine = self.engine
        raise PlanConflict(
            f"{engine.name} can't be traced while its weights travel ({engine.policy.get('kind')}): trace it before, or after "
            "`remove_all_hooks()` (of a single network `disable_group_offload()`); what was traced then goes with any policy"
        )

    # whoever compiles a whole model around us: go round this function, and don't compile its own frame
    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]
    skip_code(__call__.__code__)


class CompileLater:
    """Stands for ``module.compile`` while an engine serves it or what is in it.

    Weights must be lent outside a compiled region; so whoever compiles a module moves the lending of
    everything inside it to that module.
    """

    def __init__(self, engine: Engine, module: nn.Module) -> None:
        self.engine = engine
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.engine.compile(self.module, *args, **kwargs)

    def __reduce__(self) -> Any:  # copies and pickles of the module are served by nobody
        return _method, ("compile", self.module)


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """The compiled version of the call of ``module``, if it has one."""
    run = module.__dict__.get("_compiled_call_impl")
    return (
        run.run
        if isinstance(run, Lender) and run.run != module._call_impl
        else None
        if isinstance(run, Lender)
        else run
    )


def is_rehearsed(module: nn.Module) -> bool:
    """Whether a call of ``module`` would only be rehearsed."""
    return isinstance(module.__dict__.get("_compiled_call_impl"), StandsIn)


def has_compiled_forward(module: nn.Module) -> bool:
    """``module.forward = torch.compile(module.forward)``."""
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def install(lender: Lender) -> None:
    module = lender.module
    module.__dict__["_compiled_call_impl"] = lender
    if lender.units and lender.engine.root is module:
        for name in ENTRIES:
            method = getattr(module, name, None)
            if isinstance(method, types.MethodType) and name not in module.__dict__:
                module.__dict__[name] = Entry(lender, method)


def uninstall(module: nn.Module) -> None:
    run = compiled_call(module)
    if run is None:
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module.__dict__["_compiled_call_impl"] = run
    if isinstance(module.__dict__.get("compile"), CompileLater):
        del module.__dict__["compile"]
    for name in ENTRIES:
        if isinstance(module.__dict__.get(name), Entry):
            del module.__dict__[name]


class Entry:
    """A method such as ``vae.decode`` that uses weights of the module without calling it."""

    def __init__(self, lender: Lender, method: types.MethodType) -> None:
        self.lender = lender
        self.method = method
        self.__doc__ = method.__doc__
        self.__wrapped__ = method.__func__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        through = Lender(self.lender.engine, self.lender.module, self.method)
        through.units, through.device = self.lender.units, self.lender.device
        through.exclude, through.give_back = self.lender.exclude, self.lender.give_back
        return through(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _method, (self.method.__name__, self.method.__self__)


def _method(name: str, module: nn.Module) -> types.MethodType:
    return types.MethodType(getattr(type(module), name), module)


# -- inputs and outputs --------------------------------------------------------------------------------------


def move(value: Any, device: torch.device) -> Any:
    """``value`` with the tensors in it on ``device``; itself where there is nothing to move."""
    return mapped(value, lambda tensor: tensor if tensor.device == device else tensor.to(device))


def first_device(args: Any, kwargs: Any) -> torch.device | None:
    """Where the first tensor among the arguments of a call is."""
    return next((t.device for t in tensors_in([args, kwargs])), None)
