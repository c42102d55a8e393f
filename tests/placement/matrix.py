"""Every memory technique with every other, on three tiny pipelines: the same picture, bit for bit.

A *form* is what may change a picture: {as stored, cast} x {tiling or not} x {slicing or not} x {patched or not} x
{eager, compiled blocks}. A pipeline of each form paints the picture of everything resident first, with no policy in
front. Then it goes through all policies, and every *cell* (a form under a policy) is looked at four times: at the
first call, the second, after an exception in the middle of a step, and after switching to another policy, whose first
call that is.

``python -m tests.placement.matrix [--device cuda] [--write]`` runs all of it and puts the counts into docs/memory.md.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from effusion.placement import patches
from effusion.placement.engine import engine_of

from . import tiny_pipelines as tiny

STEPS = ("first call", "second call", "after an exception", "after switching")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
MARK = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", re.DOTALL)


class Form(NamedTuple):
    """One of the pictures that the matrix compares; the policies must not change it."""

    pipeline: str
    cast: bool
    tiling: bool
    slicing: bool
    patched: bool
    compiled: bool

    def __str__(self) -> str:
        return "-".join([self.pipeline, *(name for name in self._fields[1:] if getattr(self, name))])


FORMS = [Form(*row) for row in itertools.product(tiny.MAKERS, *[(False, True)] * 5)]


# -- policies --------------------------------------------------------------------------------------------------


def _travel(pipe: Any, device: str) -> None:
    """Without an accelerator, treat the CPU as one, so that weights of the host travel."""
    engines = [engine_of(module) for module in pipe.modules.values()] if device == "cpu" else []
    for engine in engines:
        if engine is not None:
            engine.always_travel = True
            engine.install()


def _model(pipe: Any, device: str, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device=device)
    _travel(pipe, device)


def _sequential(pipe: Any, device: str, folder: Path) -> None:
    pipe.enable_sequential_cpu_offload(device=device)
    _travel(pipe, device)


def _block(pipe: Any, device: str, folder: Path) -> None:
    pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
    _travel(pipe, device)


def _leaf(pipe: Any, device: str, folder: Path) -> None:
    pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=True)
    _travel(pipe, device)


def _disk(pipe: Any, device: str, folder: Path) -> None:
    pipe.enable_group_offload(device, use_stream=True, offload_to_disk_path=folder)


LAYERS = {"unet": ("mid_block", "up_blocks.0"), "transformer": ("transformer_blocks.0", "single_transformer_blocks.1")}


def _map(pipe: Any, device: str, folder: Path) -> None:
    """The denoiser's layers on the device, in host memory and on disk; the rest on disk where that computes alike."""
    others = dict.fromkeys(pipe.modules, "disk" if device == "cpu" else device)
    pipe._apply_device_map(others, offload_folder=folder)
    name, network = next((n, m) for n, m in pipe.modules.items() if n in LAYERS)
    host, disk = LAYERS[name]
    network.apply_device_map({"": device, host: "cpu", disk: "disk"}, offload_folder=folder)
    _travel(pipe, device)


POLICIES: dict[str, Callable[[Any, str, Path], object]] = {
    "resident": lambda pipe, device, folder: pipe.to(device),
    "model": _model,
    "sequential": _sequential,
    "group block": _block,
    "group leaf": _leaf,
    "disk": _disk,
    "device map": _map,
}


# -- forms -----------------------------------------------------------------------------------------------------


def prepare(form: Form, saved: Path, device: str) -> Any:
    """A pipeline of this form, loaded from ``saved``, without a policy."""
    pipe = tiny.load(form.pipeline, saved)
    network = tiny.denoiser(pipe)
    if form.cast:
        pipe.enable_layerwise_casting(torch.float8_e4m3fn)
    if form.tiling:
        pipe.enable_vae_tiling()
    if form.slicing:
        pipe.enable_vae_slicing()
    if form.patched:
        g = torch.Generator().manual_seed(1)
        names = [n for n, _ in network.named_parameters() if n.endswith(("to_q.weight", "to_v.weight"))]
        deltas = {n: 0.2 * torch.randn(network.get_parameter(n).shape, generator=g) for n in names}
        patches.add_patch(network, "style", deltas)
    if form.compiled:
        network.compile_repeated_blocks(backend="eager" if device == "cpu" else "inductor", fullgraph=True)
    return pipe


def paint(form: Form, pipe: Any) -> torch.Tensor:
    """Two pictures of 8x24, each of two tiles where tiling is on."""
    return tiny.run(form.pipeline, pipe, num_inference_steps=1, height=8, width=24, guidance_scale=1.0)


class Broken(Exception):
    """Raised in the middle of a step."""


def _break(form: Form, pipe: Any) -> None:
    def stop(*_: Any) -> None:
        raise Broken

    network = tiny.denoiser(pipe)
    middle = network.mid_block if form.pipeline != "flux" else network.norm_out
    handle = middle.register_forward_pre_hook(stop)
    try:
        with pytest.raises(Broken):
            paint(form, pipe)
    finally:
        handle.remove()


def check(form: Form, saved: Path, folder: Path, device: str = "cpu") -> Iterator[tuple[str, str]]:
    """Go through all cells of ``form``; yields (policy, step) for each look that found the same bits."""
    torch._dynamo.config.recompile_limit = 64  # the blocks of three pipelines in every form
    pipe = prepare(form, saved, device).to(device)
    wanted = paint(form, pipe)
    first = FORMS.index(form) % len(POLICIES)
    order = [*POLICIES][first:] + [*POLICIES][:first]
    if FORMS.index(form) // len(POLICIES) % 2:
        order.reverse()
    for at, policy in enumerate([*order, order[0]]):
        POLICIES[policy](pipe, device, folder)
        _same(paint(form, pipe), wanted, form, policy, "first call")
        if at:
            yield order[at - 1], "after switching"
        if at == len(order):
            break
        yield policy, "first call"
        _same(paint(form, pipe), wanted, form, policy, "second call")
        yield policy, "second call"
        _break(form, pipe)
        _same(paint(form, pipe), wanted, form, policy, "after an exception")
        yield policy, "after an exception"
    pipe.remove_all_hooks()
    pipe.reset_device_map()


def _same(found: torch.Tensor, wanted: torch.Tensor, form: Form, policy: str, step: str) -> None:
    assert torch.equal(found, wanted), f"{form}, {policy}, {step}: differs by {(found - wanted).abs().max()}"


def save_all(folder: Path) -> Path:
    for name in tiny.MAKERS:
        tiny.save(name, folder)
    return folder


def counts(seen: Counter[tuple[str, str]], device: str) -> str:
    """A Markdown table: how many forms of all were the same bits, for each policy and step."""
    head = "| policy | " + " | ".join(STEPS) + " |\n|---|" + "---:|" * len(STEPS)
    rows = [f"| {p} | " + " | ".join(str(seen[p, step]) for step in STEPS) + " |" for p in POLICIES]
    cells, total = len(FORMS) * len(POLICIES), sum(seen.values())
    said = (
        f"{cells} cells ({len(FORMS)} forms under {len(POLICIES)} policies), {len(STEPS)} looks at each, on {device}: "
    )
    return "\n".join([f"{said}{total} of {cells * len(STEPS)} are the same bits, none is refused.", "", head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.placement.matrix", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="put the counts into docs/memory.md")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        saved = save_all(Path(name))
        seen = Counter(cell for form in FORMS for cell in check(form, saved, saved / "offload", args.device))
    text = counts(seen, args.device)
    print(text, f"\n\n{time.perf_counter() - start:.0f} s")
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(MARK.sub(lambda m: m[1] + text + "\n" + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
