from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from effusion.placement import lane, policies
from effusion.placement.engine import engine_of


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    gc.collect()
    for found in lane._lanes.values():
        found.sweep()
        assert found.arena is None or found.arena.idle, "room in the ring was not given back"
        assert found.outside == 0, "memory beside the ring was not given back"


def travel_always(module: nn.Module) -> None:
    """Make the CPU a device of its own for the engine of ``module``: weights in host memory travel too."""
    engine = engine_of(module)
    assert engine is not None
    engine.always_travel = True
    engine.install()


Policy = Callable[[nn.Module, Any], None]


def _model(module: nn.Module, folder: Any) -> None:
    policies.model_offload(module, "cpu")
    travel_always(module)


def _sequential(module: nn.Module, folder: Any) -> None:
    policies.cpu_offload(module, "cpu")
    travel_always(module)


def _host(kind: str, stream: bool, **options: Any) -> Policy:
    def apply(module: nn.Module, folder: Any) -> None:
        policies.apply_group_offloading(module, "cpu", offload_type=kind, use_stream=stream, **options)
        travel_always(module)

    return apply


def _disk(kind: str, stream: bool, **options: Any) -> Policy:
    def apply(module: nn.Module, folder: Any) -> None:
        policies.apply_group_offloading(
            module, "cpu", offload_type=kind, use_stream=stream, offload_to_disk_path=folder, **options
        )

    return apply


POLICIES: dict[str, Policy] = {
    "model": _model,
    "sequential": _sequential,
    "block": _host("block_level", False),
    "block-stream": _host("block_level", True),
    "blocks-of-2": _host("block_level", False, num_blocks_per_group=2),
    "leaf": _host("leaf_level", False),
    "leaf-stream": _host("leaf_level", True),
    "disk-block": _disk("block_level", False),
    "disk-block-stream": _disk("block_level", True),
    "disk-blocks-of-3": _disk("block_level", False, num_blocks_per_group=3),
    "disk-leaf": _disk("leaf_level", False),
    "disk-leaf-stream": _disk("leaf_level", True),
}


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]
