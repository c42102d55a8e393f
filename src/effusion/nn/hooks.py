"""Hooks of other people's code around a module's ``forward``, in a chain that can be taken apart again.

Nothing in this library hooks itself in like this: placement swaps parameters. It is here for scripts that bring hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_ATTRIBUTE = "_diffusers_hook"  # the ecosystem's name: scripts look for it


class ModelHook:
    """What runs around the ``forward`` of a module; subclasses override what they need.

    One with a method ``new_forward(module, *args, **kwargs)`` replaces what is inside of it, and may call that as
    ``self.fn_ref.original_forward(*args, **kwargs)``.
    """

    _is_stateful = False

    def __init__(self) -> None:
        self.fn_ref: HookFunctionReference | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called once when the hook is put on ``module``; returns the module to use."""
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called once when the hook is taken off ``module``; returns the module to use."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that ``forward`` gets instead of these."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """What the caller gets instead of ``output``."""
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """For hooks that can be detached without being taken off."""
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget what was remembered between calls; must be written for hooks with ``_is_stateful``."""
        if self._is_stateful:
            raise NotImplementedError(f"{type(self).__name__} remembers something: it needs a method `reset_state`")
        return module


class HookFunctionReference:
    """A link of the chain: one hook's two ends and the ``forward`` between them."""

    def __init__(self, hook: ModelHook, module: nn.Module) -> None:
        self.pre_forward, self.post_forward = hook.pre_forward, hook.post_forward
        self.forward: Callable[..., Any] = module.forward
        self.original_forward: Callable[..., Any] | None = None
        replacement = getattr(hook, "new_forward", None)
        if replacement is not None:
            self.original_forward = self.forward
            self.forward = functools.update_wrapper(functools.partial(replacement, module), replacement)

    @property
    def inner(self) -> Callable[..., Any]:
        """What is left where this link is taken out."""
        return self.forward if self.original_forward is None else self.original_forward

    @inner.setter
    def inner(self, forward: Callable[..., Any]) -> None:
        if self.original_forward is None:
            self.forward = forward
        else:
            self.original_forward = forward

    def around(self, module: nn.Module) -> Callable[..., Any]:
        """The ``forward`` with this link outside."""

        @functools.wraps(module.forward)  # so that its signature can still be asked for
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.pre_forward(module, *args, **kwargs)
            return self.post_forward(module, self.forward(*args, **kwargs))

        return forward


class HookRegistry:
    """The hooks of one module by name; the last one registered is outermost."""

    def __init__(self, module_ref: nn.Module) -> None:
        self.hooks: dict[str, ModelHook] = {}
        self._module_ref = module_ref
        self._fn_refs: dict[str, HookFunctionReference] = {}

    def register_hook(self, hook: ModelHook, name: str) -> None:
        """Put ``hook`` around what is there.

        Raises:
            ValueError: there is a hook called ``name``.
        """
        if name in self.hooks:
            raise ValueError(f"there is a hook {name!r} already; remove it first, or choose another name")
        module = self._module_ref = hook.initialize_hook(self._module_ref)
        link = HookFunctionReference(hook, module)
        module.forward = link.around(module)
        hook.fn_ref = link
        self.hooks[name], self._fn_refs[name] = hook, link

    def get_hook(self, name: str) -> ModelHook | None:
        """The hook called ``name``, if there is one."""
        return self.hooks.get(name)

    def remove_hook(self, name: str, recurse: bool = True) -> None:
        """Take the hook called ``name`` off this module, and off all modules in it."""
        if name in self.hooks:
            names = list(self.hooks)
            outer = names[names.index(name) + 1 :]
            inner = self._fn_refs.pop(name).inner
            if outer:
                self._fn_refs[outer[0]].inner = inner
            else:
                _set_forward(self._module_ref, inner)
            self._module_ref = self.hooks.pop(name).deinitalize_hook(self._module_ref)
        if recurse:
            for registry in self._below():
                registry.remove_hook(name, recurse=False)

    def reset_stateful_hooks(self, recurse: bool = True) -> None:
        """Let hooks with a memory forget, here and in all modules below."""
        for hook in reversed(list(self.hooks.values())):
            if hook._is_stateful:
                hook.reset_state(self._module_ref)
        if recurse:
            for registry in self._below():
                registry.reset_stateful_hooks(recurse=False)

    @classmethod
    def check_if_exists_or_initialize(cls, module: nn.Module) -> HookRegistry:
        """The registry of ``module``, a new one if it had none."""
        if not hasattr(module, _ATTRIBUTE):
            setattr(module, _ATTRIBUTE, cls(module))
        registry: HookRegistry = getattr(module, _ATTRIBUTE)
        return registry

    def _below(self) -> list[HookRegistry]:
        whole = getattr(self._module_ref, "_orig_mod", self._module_ref)  # of a compiled module
        modules = [getattr(m, "_orig_mod", m) for m in whole.modules() if m is not whole]
        return list({id(m): getattr(m, _ATTRIBUTE) for m in modules if hasattr(m, _ATTRIBUTE)}.values())

    def __repr__(self) -> str:
        lines = [f"  ({i}) {name} - {type(hook).__name__}" for i, (name, hook) in enumerate(self.hooks.items())]
        return "\n".join(["HookRegistry(", *lines, ")"])


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    if own:
        del module.forward  # the class's own again
    else:
        module.forward = forward
