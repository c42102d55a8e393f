"""FLUX.1 whole, 11.9 billion weights in bfloat16, from disk in 4 GiB of memory on the CPU; the peer beside it.

Random weights of the published configuration are written once, into the folder that ``BENCHMARK_DIR`` names if it is
set. Each run is a process of its own in a memory control group (needs root) and begins with a cold file cache. Beside the
time of a step stand the time to read all weights from the cold disk and the time to compute a step with weights in memory:
that of a network with fewer blocks, times how many more there are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import harness

NAME = "twelve_billion"
LIMIT = 4 << 30  # of the control group
BUDGET = "3.4GB"  # for the run; what is left is for the process itself and the system's file cache
SIZE, STEPS, TOKENS = 256, 2, 512
BLOCKS = (19, 38)  # published numbers, of two kinds
PATIENCE = 300  # seconds that a run may take
FEW = (2, 4)  # those that are computed with in memory, to know how long computing takes
HALF = torch.bfloat16
ENCODERS: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
PEERS = {
    "peer-mapped": "peer, as loaded (mapped)",
    "peer-group": "peer, group offload to disk",
}


# -- the weights -----------------------------------------------------------------------------------------


def noise(count: int) -> Tensor:
    """Random bfloat16 numbers, +-(1/128 … 1/32): sign, mantissa and the exponent's last bit are random."""
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    return bits.bitwise_and_(-0x7F01).bitwise_or_(0x3C00).view(HALF)


def make(folder: Path) -> None:
    """Write the pipeline; every weight is another window of one piece of noise, so nothing large is held."""
    import effusion

    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = effusion.FluxTransformer2DModel(guidance_embeds=True)
    largest = max(p.numel() for p in transformer.parameters())
    pool = noise(largest + (1 << 20))
    for module in transformer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            start = int(torch.randint(1 << 20, ()))
            value = pool[start : start + weight.numel()].view(weight.shape)
            module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    vae = effusion.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), latent_channels=16, layers_per_block=2, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).to(HALF)  # fmt: skip
    scheduler = effusion.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    effusion.FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **ENCODERS).save_pretrained(folder)


@contextlib.contextmanager
def checkpoint() -> Iterator[Path]:
    """The folder of the pipeline: kept if ``BENCHMARK_DIR`` says where, else removed afterwards."""
    with contextlib.ExitStack() as stack:
        kept = os.environ.get("BENCHMARK_DIR")
        base = Path(kept) if kept else Path(stack.enter_context(tempfile.TemporaryDirectory(dir=".")))
        folder = base / "flux-12b"
        if not (folder / "model_index.json").exists():
            make(folder)
        yield folder


# -- one run, in a process of its own --------------------------------------------------------------------


def call(pipe: Any) -> dict[str, Any]:
    """Denoise with given embeddings; seconds of each step, and the latents."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(1, TOKENS, 4096, generator=draw).to(HALF)
    pooled = torch.randn(1, 768, generator=draw).to(HALF)
    marks = [time.perf_counter()]

    def step(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return values

    latents = pipe(
        prompt_embeds=text, pooled_prompt_embeds=pooled, height=SIZE, width=SIZE, num_inference_steps=STEPS,
        generator=draw, output_type="latent", callback_on_step_end=step,
    ).images  # fmt: skip
    return {"steps": [b - a for a, b in itertools.pairwise(marks)], "latents": latents.float().tolist()}


def ours(folder: Path) -> dict[str, Any]:
    import effusion

    pipe = effusion.FluxPipeline.from_pretrained(folder, torch_dtype=HALF)
    pipe.set_progress_bar_config(disable=True)
    text, pooled = torch.zeros(1, TOKENS, 4096, dtype=HALF), torch.zeros(1, 768, dtype=HALF)
    start = time.perf_counter()
    plan = pipe.fit(
        BUDGET, height=SIZE, width=SIZE, num_inference_steps=STEPS, prompt_embeds=text, pooled_prompt_embeds=pooled
    )
    planned = time.perf_counter() - start
    print(plan, file=sys.stderr)
    done = call(pipe)
    report = pipe.memory_report()
    print(report, file=sys.stderr)
    rows = {r["stage"]: r for r in report.rows()}
    return {**done, "planned": planned, "predicted": plan.peak, "peak": report.peak, "rows": rows}


def peer(folder: Path, scratch: str, way: str) -> dict[str, Any]:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=HALF, **ENCODERS)
    pipe.set_progress_bar_config(disable=True)
    if way == "peer-group":
        pipe.transformer.enable_group_offload(
            torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=scratch
        )
    return call(pipe)


def compute() -> dict[str, float]:
    """Seconds of a step with weights in memory: of a network of few blocks, scaled by their number.

    What is not in blocks is a thousandth of the work.
    """
    import effusion

    double, single = FEW
    with torch.device("meta"):
        net = effusion.FluxTransformer2DModel(guidance_embeds=True, num_layers=double, num_single_layers=single)
    net = net.to(HALF).to_empty(device="cpu").eval()
    for weight in net.parameters():
        weight.data = noise(weight.numel()).view(weight.shape)
    tokens = (SIZE // 16) ** 2
    given = {
        "hidden_states": torch.randn(1, tokens, 64).to(HALF), "encoder_hidden_states": torch.randn(1, TOKENS, 4096).to(HALF),
        "pooled_projections": torch.randn(1, 768).to(HALF), "timestep": torch.ones(1).to(HALF),
        "guidance": torch.ones(1), "img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(TOKENS, 3),
    }  # fmt: skip
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            net(**given)
            times.append(time.perf_counter() - start)
    return {"seconds": min(times) * BLOCKS[0] / double}


def child(mode: str, folder: str, scratch: str) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    if mode == "compute":
        done: dict[str, Any] = compute()
    else:
        done = ours(Path(folder)) if mode == "ours" else peer(Path(folder), scratch, mode)
    print(json.dumps(done))


# -- the table -------------------------------------------------------------------------------------------


def run(mode: str, folder: Path) -> dict[str, Any]:
    """One run in a control group of its own; why there is no result if there is none."""
    harness.drop_cache(folder.rglob("*.safetensors"))
    with harness.memory_group(LIMIT) as group, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            done = harness.run_module(NAME, mode, str(folder), scratch, inside=group, limit=PATIENCE)
        except harness.ChildFailed as error:
            done = {"failed": str(error)}
        return {**done, "group": harness.group_peak(group)}


def row(label: str, done: dict[str, Any], least: float) -> list[str]:
    if "failed" in done:
        return [label, done["failed"], "–", f"{done['group'] / 1e9:.2f} GB"]
    steps = done["steps"]
    took = sum(steps) / len(steps)
    cells = [", ".join(f"{s:.1f} s" for s in steps), f"**{took / least:.2f}x**"]
    return [label, *cells, f"{done['group'] / 1e9:.2f} GB"]


def measure(repeat: int) -> str:
    with checkpoint() as folder:
        files = sorted((folder / "transformer").glob("*.safetensors"))
        size = sum(f.stat().st_size for f in files)
        reading = min(harness.read_cold(files) for _ in range(repeat))
        computing = min(harness.run_module(NAME, "compute", "", "")["seconds"] for _ in range(repeat))
        try:
            mine = min((run("ours", folder) for _ in range(repeat)), key=lambda r: sum(r["steps"]))
        except OSError as error:
            return f"Needs a memory control group of its own, which this machine does not give: {error.strerror}."
        peers = {mode: run(mode, folder) for mode in PEERS}
    least = max(reading, computing)
    rows = [row("Effusion, `fit`", mine, least), *(row(PEERS[mode], done, least) for mode, done in peers.items())]
    head = [
        "",
        "seconds of each step",
        "mean step / max(compute, reading)",
        "most the group held",
    ]
    return (
        f"{size / 1e9:.1f} GB of weights, {SIZE}x{SIZE} pixels, {TOKENS} tokens of text, "
        f"{STEPS} steps, bfloat16, a control group of {LIMIT >> 30} GiB. Reading all weights from the cold disk takes "
        f"{reading:.1f} s, computing a step with weights in memory {computing:.1f} s.\n\n{harness.table(head, rows)}\n\n"
        f"{_said(mine)} {_alike(mine, peers)}"
    )


def _said(mine: dict[str, Any]) -> str:
    """The forecast beside what happened."""
    stage = mine["rows"]["transformer"]
    return (
        f"`fit({BUDGET!r})`, planned in {mine['planned']:.1f} s, foretold a peak of {mine['predicted'] / 1e9:.2f} GB above "
        f"the level before the call, and {stage['predicted_seconds']:.0f} s of denoising; it was {mine['peak'] / 1e9:.2f} GB "
        f"({mine['predicted'] / mine['peak']:.3f}x) and {stage['measured_seconds']:.0f} s."
    )


def _alike(mine: dict[str, Any], peers: dict[str, Any]) -> str:
    """How far the latents are from the peer's."""
    done = next((d for d in peers.values() if "failed" not in d), None)
    if done is None:
        return ""
    a, b = torch.tensor(mine["latents"]), torch.tensor(done["latents"])
    assert bool(a.isfinite().all())
    return f"Latents differ from the peer's by {float((a - b).norm() / b.norm()):.1e} (relative)."


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(*sys.argv[2:])
    else:
        harness.main(NAME, "12 billion weights in 4 GiB", measure, repeat=1)
