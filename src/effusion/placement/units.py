"""How a module is cut into units: by component, by block or by leaf."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_WEIGHT = r"\.(?:weight|bias|in_proj_weight)\b(?!\s*\.(?:shape|size|ndim|numel))"
_PEEK = re.compile(r"\bself((?:\.\w+|\[[^\]]*\])+?)" + _WEIGHT)
_ITEM = re.compile(r"\b(\w+) = self\.(\w+)\[\w+\]")  # an item of a container, named first: PEFT's adapters
_GENERAL = (
    "torch.nn.modules.module",
    "torch.nn.modules.container",
    "transformers.modeling_utils",
    "effusion.models.base",
)
_NOT_RUN = re.compile(r"^(__|_?init|reset_|load|from_|set_|get_|tie|_tie|fuse|unfuse|resize|copy|save|extra_repr)")


@dataclass(frozen=True)
class Slot:
    """A place in a module that holds a weight: an entry of its ``_parameters`` or ``_buffers``."""

    module: nn.Module
    name: str
    path: str  # qualified name in the component
    is_buffer: bool

    @property
    def store(self) -> dict[str, Tensor | None]:
        found: Any = self.module._buffers if self.is_buffer else self.module._parameters
        return found  # type: ignore[no-any-return]

    @property
    def tensor(self) -> Tensor:
        value = self.store[self.name]
        assert value is not None
        return value


@dataclass
class Group:
    """Slots that travel together, and the modules whose call needs them."""

    name: str
    slots: list[Slot] = field(default_factory=list)
    triggers: list[nn.Module] = field(default_factory=list)


def own_slots(module: nn.Module, path: str) -> list[Slot]:
    """The parameters and buffers of ``module`` itself."""
    dot = f"{path}." if path else ""
    found = [Slot(module, n, dot + n, False) for n, p in module._parameters.items() if p is not None]
    return found + [Slot(module, n, dot + n, True) for n, b in module._buffers.items() if b is not None]


def all_slots(module: nn.Module, path: str = "") -> list[Slot]:
    """The parameters and buffers of ``module`` and everything in it."""
    dot = f"{path}." if path else ""
    return [s for name, m in module.named_modules() for s in own_slots(m, (dot + name).rstrip("."))]


def is_called(module: nn.Module) -> bool:
    """Whether ``module`` is called itself (a ModuleList is not)."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def called_children(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that ``module`` calls: its children, or theirs where a child is a container."""
    for child in module.children():
        if is_called(child):
            yield child
        else:
            yield from called_children(child)


# -- the three ways to cut -------------------------------------------------------------------------------


def by_component(root: nn.Module) -> list[Group]:
    """Everything at once. Any entry will do: the module itself, or, for methods like ``decode``, a child."""
    return [Group("", all_slots(root), [root, *called_children(root)])]


def by_leaf(root: nn.Module) -> list[Group]:
    """Every module with weights of its own."""
    owner = peeking_owners(root)
    groups: dict[int, Group] = {}
    for path, module in root.named_modules():
        slots = own_slots(module, path)
        if not slots:
            continue
        top_path, top = owner.get(id(module), (path, module))
        group = groups.setdefault(id(top), Group(top_path, [], [top] if is_called(top) else []))
        group.slots += slots
        if module is not top and is_called(module):
            group.triggers.append(module)
    return [g if g.triggers else _called_from(root, g) for g in groups.values()]


def by_block(root: nn.Module, blocks_per_group: int = 1, block_modules: Sequence[str] | None = None) -> list[Group]:
    """Blocks (the elements of lists of modules) in groups of ``blocks_per_group``, the rest child by child.

    Args:
        block_modules: names of children that are one block each although they are no lists.
    """
    groups: list[Group] = []
    _cut(root, "", blocks_per_group, set(block_modules or ()), groups)
    return [g if g.triggers else _called_from(root, g) for g in groups if g.slots]


def _cut(module: nn.Module, path: str, n: int, whole: set[str], groups: list[Group]) -> None:
    own = own_slots(module, path)
    peeked = {id(m) for m, _ in _peeked_children(module)}
    if own or peeked:
        group = Group(path, own, [module] if is_called(module) else [])
        groups.append(group)
        for child, relative in _peeked_children(module):
            group.slots += all_slots(child, f"{path}.{relative}".lstrip("."))
            group.triggers += [child] if is_called(child) else []
    for name, child in module.named_children():
        where = f"{path}.{name}".lstrip(".")
        if id(child) in peeked:
            continue
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) and name not in whole:
            named = [(f"{where}.{i}", m) for i, m in child.named_children() if id(m) not in peeked]
            for start in range(0, len(named), n):
                part = named[start : start + n]
                slots = [s for p, m in part for s in all_slots(m, p)]
                last = "" if len(part) == 1 else "-" + part[-1][0].rpartition(".")[2]
                groups.append(Group(part[0][0] + last, slots, [m for _, m in part]))
        elif name not in whole and any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in child.modules()):
            _cut(child, where, n, whole, groups)
        else:
            groups.append(
                Group(where, all_slots(child, where), [child] if is_called(child) else [*called_children(child)])
            )
    _expand_uncalled(groups)


def _expand_uncalled(groups: list[Group]) -> None:
    """A block that is never called itself (a list in a list) is needed when one of its modules is."""
    for group in groups:
        for trigger in [t for t in group.triggers if not is_called(t)]:
            at = group.triggers.index(trigger)
            group.triggers[at : at + 1] = list(called_children(trigger))


def _called_from(root: nn.Module, group: Group) -> Group:
    """Weights in a module that is never called (a container) are needed by whoever holds it."""
    parent = group.name
    while parent:
        parent = parent.rpartition(".")[0]
        module = root.get_submodule(parent)
        if is_called(module):
            group.triggers.append(module)
            break
    return group


def outer(groups: Sequence[Group]) -> list[bool]:
    """For each group whether modules of other groups are called within a call that needs it."""
    triggers = {id(t) for g in groups for t in g.triggers}
    found = []
    for group in groups:
        own = {id(t) for t in group.triggers}
        below = {id(m) for t in group.triggers for m in t.modules()} - own
        found.append(bool(below & (triggers - own)))
    return found


# -- weights that are used without calling their module ----------------------------------------------------


def peeking_owners(root: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """id of a module -> the (path, module) above it that reads its weights instead of calling it."""
    owner: dict[int, tuple[str, nn.Module]] = {}
    for path, module in root.named_modules():
        above = owner.get(id(module), (path, module))
        for child, _ in _peeked_children(module):
            for inner in child.modules():
                owner.setdefault(id(inner), above)
    return owner


def _peeked_children(module: nn.Module) -> list[tuple[nn.Module, str]]:
    found = []
    for relative in peeked_names(type(module)):  # type: ignore[arg-type]
        try:
            child = module.get_submodule(relative)
        except AttributeError:
            continue
        found.append((child, relative))
    return found


@functools.cache
def peeked_names(cls: type[Any]) -> tuple[str, ...]:
    """Children whose ``weight`` or ``bias`` the code of ``cls`` reads itself: ``("out_proj",)`` for attention."""
    found: dict[str, None] = {}
    for value in _methods(cls):
        try:
            source = inspect.getsource(value)
        except (OSError, TypeError):
            continue
        for match in _PEEK.finditer(source):
            path = match.group(1).lstrip(".")
            if "[" not in path:
                found.setdefault(path, None)
        for item, container in _ITEM.findall(source):
            if re.search(rf"\b{item}{_WEIGHT}", source):
                found.setdefault(container, None)
    return tuple(found)


def _methods(cls: type[Any]) -> list[Any]:
    """The functions that a call of ``cls`` may run; not those of general base classes, nor those that only set up."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if not issubclass(base, nn.Module) or base.__module__.startswith(_GENERAL):
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and not _NOT_RUN.match(name):
                found.setdefault(name, value)
    return list(found.values())
