"""Every memory technique with every other: the same picture, bit for bit.

{resident, model, sequential, group block, group leaf, disk, device map} x {as stored, cast} x {tiling} x {slicing}
x {patched} x {eager, compiled blocks} x {first call, second, after an exception, after switching}, on three tiny
pipelines. In the ordinary run the binary switches rotate over the cells; with EFFUSION_FULL_MATRIX=1 all of them run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effusion.placement import patches
from effusion.placement.engine import engine_of

from . import tiny_pipelines as tiny

FULL = bool(os.environ.get("EFFUSION_FULL_MATRIX"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = ("first", "second", "after an exception", "after switching")


def _travel(pipe: Any) -> None:
    """Without an accelerator, treat the CPU as one, so that weights of the host travel."""
    if DEVICE == "cpu":
        for module in pipe.modules.values():
            if (engine := engine_of(module)) is not None:
                engine.always_travel = True
                engine.install()


def _group(kind: str, stream: bool) -> Callable[[Any, Path], None]:
    def apply(pipe: Any, folder: Path) -> None:
        pipe.enable_group_offload(DEVICE, offload_type=kind, use_stream=stream)
        _travel(pipe)

    return apply


def _model(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device=DEVICE)
    _travel(pipe)


def _sequential(pipe: Any, folder: Path) -> None:
    pipe.enable_sequential_cpu_offload(device=DEVICE)
    _travel(pipe)


def _disk(pipe: Any, folder: Path) -> None:
    pipe.enable_group_offload(DEVICE, offload_type="block_level", use_stream=True, offload_to_disk_path=folder)


def _map(pipe: Any, folder: Path) -> None:
    pipe._apply_device_map(dict.fromkeys(pipe.modules, "disk"), offload_folder=folder)


POLICIES: dict[str, Callable[[Any, Path], None]] = {
    "resident": lambda pipe, folder: pipe.to(DEVICE),
    "model": _model,
    "sequential": _sequential,
    "block": _group("block_level", False),
    "leaf": _group("leaf_level", True),
    "disk": _disk,
    "map": _map,
}
BASE = list(itertools.product(tiny.MAKERS, POLICIES, (False, True)))
# (tiling, slicing, patched, compiled): in the ordinary run each cell has one of these, in turn, and every second cell runs
ROTATION = [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 1, 0), (1, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0), (0, 0, 0, 1)]
ALL = list(itertools.product((0, 1), repeat=4))
CELLS = [
    (*base, *switches)
    for i, base in enumerate(BASE)
    for switches in (ALL if FULL else [ROTATION[(i * 3) % len(ROTATION)]])
    if FULL or i % 2 == (i // 14) % 2 or i % 14 < 2
]
_reference: dict[Any, torch.Tensor] = {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    for name in tiny.MAKERS:
        tiny.save(name, folder)
    return folder


def _prepare(name: str, saved: Path, cast: bool, tiling: int, slicing: int, patched: int, compiled: int) -> Any:
    pipe = tiny.load(name, saved)
    network = tiny.denoiser(pipe)
    if cast:
        pipe.enable_layerwise_casting(torch.float8_e4m3fn)
    if tiling:
        pipe.enable_vae_tiling()
    if slicing:
        pipe.enable_vae_slicing()
    if patched:
        g = torch.Generator().manual_seed(1)
        names = [n for n, p in network.named_parameters() if n.endswith("to_q.weight")]
        deltas = {n: 0.2 * torch.randn(network.get_parameter(n).shape, generator=g) for n in names}
        patches.add_patch(network, "style", deltas)
    if compiled:
        kind = "BasicTransformerBlock" if name != "flux" else "FluxSingleTransformerBlock"
        for module in network.modules():
            if type(module).__name__ == kind:
                module.compile(backend="eager")
    return pipe


class _Stop(Exception):
    pass


def _stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    raise _Stop


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(str(int(x) if isinstance(x, bool) else x) for x in c))
def test_cell(cell: tuple[Any, ...], saved: Path, tmp_path: Path) -> None:
    name, policy, *form = cell
    key = (name, *form)
    if key not in _reference:
        _reference[key] = tiny.run(name, _prepare(name, saved, *form).to(DEVICE))
    wanted = _reference[key]
    pipe = _prepare(name, saved, *form)
    POLICIES[policy](pipe, tmp_path)
    for step in STEPS:
        if step == "after an exception":
            with pytest.raises(_Stop):
                tiny.run(name, pipe, callback_on_step_end=_stop)
        if step == "after switching":
            other = list(POLICIES)[(list(POLICIES).index(policy) + 3) % len(POLICIES)]
            POLICIES[other](pipe, tmp_path)
        found = tiny.run(name, pipe)
        assert torch.equal(found, wanted), f"{step}: differs by {(found - wanted).abs().max()}"
    pipe.remove_all_hooks()


def test_forms_differ_from_one_another() -> None:
    """The matrix would prove nothing if switches did nothing."""
    keys = list(_reference)
    if len(keys) < 4:
        pytest.skip("the matrix has not run")
    for a, b in itertools.combinations(keys, 2):
        if a[0] == b[0] and a[1] != b[1]:  # cast or not
            assert not torch.equal(_reference[a], _reference[b]), (a, b)


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nplacement matrix: {len(CELLS)} of {len(BASE) * len(ALL)} cells x {len(STEPS)} steps on {DEVICE}")
    assert {cell[:2] for cell in CELLS} >= {base[:2] for base in BASE}
