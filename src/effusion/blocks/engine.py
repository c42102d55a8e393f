"""The block engine: ordered, editable lists of functions that pass one ``State`` along.

A block is a function. The names of its parameters are its inputs, the dictionary it returns are
its outputs, its docstring is its documentation. A parameter is filled, in this order, from the
state (fields, arguments of the call, earlier outputs), from the run's context (components by name,
``family``, ``components``, ``device``, ``state`` itself), from its own default. A generator function
is a loop: each thing it yields is handed to the consumer of the run, who may change the state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ..core.types import State

BlockFunction = Callable[..., Any]


@cache
def _parameters(function: BlockFunction) -> tuple[inspect.Parameter, ...]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p for p in inspect.signature(function).parameters.values() if p.kind in named)


@dataclass(frozen=True)
class Block:
    """A named block of a list."""

    name: str
    function: BlockFunction

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(p.name for p in _parameters(self.function))

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""

    def __call__(self, state: State, context: Mapping[str, Any]) -> Any:
        """Run on ``state``; what the function returns (a generator, if it is a loop)."""
        arguments = {}
        for parameter in _parameters(self.function):
            name = parameter.name
            if name == "state":
                arguments[name] = state
            elif name in state.user or state.get(name) is not None:
                arguments[name] = state.get(name)
            elif name in context:
                arguments[name] = context[name]
            elif parameter.default is inspect.Parameter.empty:
                arguments[name] = self._missing(name, state)
        return self.function(**arguments)

    def _missing(self, name: str, state: State) -> Any:
        if name in State.__dataclass_fields__:
            return state.get(name)
        raise ValueError(
            f"the block `{self.name}` needs `{name}`: neither the call nor the components nor an earlier block gave it"
        )


class BlockList:
    """An ordered, editable list of blocks.

    >>> blocks = pipe.blocks
    >>> blocks.insert_before("denoise", "tint", lambda latents: {"latents": latents * 1.01})
    >>> blocks.replace("decode", my_decode)
    """

    def __init__(self, blocks: Iterable[Block | BlockFunction | tuple[str, BlockFunction]] = ()) -> None:
        self._blocks: list[Block] = []
        for block in blocks:
            self.append(block)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, name: str) -> Block:
        return self._blocks[self._index(name)]

    def __contains__(self, name: str) -> bool:
        return any(b.name == name for b in self._blocks)

    def __repr__(self) -> str:
        rows = (f"  {b.name}({', '.join(b.inputs)}): {b.doc.splitlines()[0] if b.doc else ''}" for b in self)
        return "BlockList(\n" + "\n".join(rows) + "\n)"

    @property
    def names(self) -> list[str]:
        return [b.name for b in self._blocks]

    @property
    def inputs(self) -> list[str]:
        """Every name that a block of the list asks for, in order of first use."""
        return list(dict.fromkeys(name for block in self._blocks for name in block.inputs))

    def append(self, block: Block | BlockFunction | tuple[str, BlockFunction], name: str | None = None) -> None:
        self._blocks.append(self._check(_block(block, name)))

    def insert_before(self, anchor: str, name: str, function: BlockFunction) -> None:
        self._blocks.insert(self._index(anchor), self._check(Block(name, function)))

    def insert_after(self, anchor: str, name: str, function: BlockFunction) -> None:
        self._blocks.insert(self._index(anchor) + 1, self._check(Block(name, function)))

    def replace(self, name: str, function: BlockFunction) -> None:
        self._blocks[self._index(name)] = Block(name, function)

    def remove(self, name: str) -> Block:
        """Take the block ``name`` out and return it."""
        return self._blocks.pop(self._index(name))

    def copy(self) -> BlockList:
        return BlockList(self._blocks)

    def _index(self, name: str) -> int:
        for index, block in enumerate(self._blocks):
            if block.name == name:
                return index
        raise ValueError(f"no block is called {name!r}; there are {self.names}")

    def _check(self, block: Block) -> Block:
        if block.name in self:
            raise ValueError(f"a block called {block.name!r} is in the list already; give the new one another name")
        return block


def _block(block: Block | BlockFunction | tuple[str, BlockFunction], name: str | None) -> Block:
    if isinstance(block, Block):
        return block
    if isinstance(block, tuple):
        return Block(*block)
    return Block(name or block.__name__, block)


def stream(
    blocks: Iterable[Block],
    state: State,
    context: Mapping[str, Any],
    on_block: Callable[[Block, State], None] | None = None,
) -> Iterator[Any]:
    """Run ``blocks`` on ``state``, yielding what their loops yield (:class:`~effusion.core.types.Step`).

    ``on_block`` is told of each block before it starts.
    """
    for block in blocks:
        if on_block is not None:
            on_block(block, state)
        rescue = context.get("rescue")
        if rescue is None:
            outputs = block(state, context)
        else:
            generator = state.get("generator")
            outputs = rescue(f"the block {block.name!r}", partial(block, state, context), state, generator)
        if inspect.isgenerator(outputs):
            outputs = yield from outputs
        if outputs is None:
            continue
        if not isinstance(outputs, Mapping):
            raise TypeError(f"the block `{block.name}` returned {type(outputs).__name__}, not a dict of its outputs")
        state.update(outputs)
