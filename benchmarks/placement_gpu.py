"""FLUX.1 in bfloat16 at 1024x1024 on a GPU, random weights on disk, under each memory policy beside the peer's of that name.

Every run is a process of its own: load the pipeline (transformer and autoencoder, the prompt given as embeddings), choose
the policy, one call to warm up, then the call that is timed. Device memory is the most that torch had allocated; host
memory the most that the process held above what it did before loading, pages of mapped files included; pinned memory what
is page-locked after the call. The least possible time of a step is the larger of computing with everything resident and
of the bytes of the transformer over the measured rate from pinned memory to the device.

`--device cpu --tiny` goes through every line of this without a GPU; its numbers mean nothing.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import effusion

from . import harness

STEPS = 4
BLOCK, LEAF = "'block_level', num_blocks_per_group=1", "'leaf_level'"
_GROUP = "pipe.transformer.enable_group_offload(device, offload_type={0}); pipe.vae.to(device)"
_CAST = "pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16); "
# what a user would write, for either library
POLICIES = {
    "resident": "pipe.to(device)",
    "model offload": "pipe.enable_model_cpu_offload(device=device)",
    "sequential": "pipe.enable_sequential_cpu_offload(device=device)",
    "group block": _GROUP.format(BLOCK),
    "group block, stream": _GROUP.format(f"{BLOCK}, use_stream=True"),
    "group block, stream, record_stream": _GROUP.format(f"{BLOCK}, use_stream=True, record_stream=True"),
    "group block, stream, low_cpu_mem_usage": _GROUP.format(f"{BLOCK}, use_stream=True, low_cpu_mem_usage=True"),
    "group block, stream, disk": _GROUP.format(f"{BLOCK}, use_stream=True, offload_to_disk_path=scratch"),
    "group leaf": _GROUP.format(LEAF),
    "group leaf, stream": _GROUP.format(f"{LEAF}, use_stream=True"),
    "group leaf, stream, record_stream": _GROUP.format(f"{LEAF}, use_stream=True, record_stream=True"),
    "group leaf, stream, low_cpu_mem_usage": _GROUP.format(f"{LEAF}, use_stream=True, low_cpu_mem_usage=True"),
    "group leaf, stream, disk": _GROUP.format(f"{LEAF}, use_stream=True, offload_to_disk_path=scratch"),
    "casting": f"{_CAST}pipe.to(device)",
    "casting, group leaf, stream": _CAST + _GROUP.format(f"{LEAF}, use_stream=True"),
}
_RUN = """
import importlib, time, torch
library = importlib.import_module(library)
on_gpu = device.startswith("cuda")
torch.zeros(1, device=device)
before = status("VmRSS:")
absent = "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor"
pipe = library.FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, **dict.fromkeys(absent))
pipe.set_progress_bar_config(disable=True)
width = pipe.transformer.config.joint_attention_dim, pipe.transformer.config.pooled_projection_dim
given = dict(prompt_embeds=torch.full((1, 512, width[0]), 0.1, dtype=torch.bfloat16, device=device),
             pooled_prompt_embeds=torch.full((1, width[1]), 0.1, dtype=torch.bfloat16, device=device),
             height=side, width=side, output_type="pt")

def pinned():
    if not on_gpu:
        return 0
    total = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    if library.__name__ == "effusion":  # registers pages of its own
        from effusion.placement.engine import engine_of
        from effusion.placement.lane import lane_to
        from effusion.placement.machine import check_device
        engines = [engine_of(m) for m in pipe.modules.values()]
        total += sum(e.pinned for e in engines if e is not None) + lane_to(check_device(device)).streams.pinned
    return total

def seconds(steps):
    start = time.perf_counter()
    picture = pipe(**given, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images
    assert picture.isfinite().all()
    return time.perf_counter() - start  # the check above has waited for the device

try:
    exec(policy)
    seconds(1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    decoding = seconds(1)
    report(step=(seconds(1 + steps) - decoding) / steps, device=torch.cuda.max_memory_allocated() if on_gpu else 0,
           host=status("VmHWM:") - before, pinned=pinned())
except Exception as error:  # goes into the table: a policy that is refused here, or has no room
    report(error=f"{type(error).__name__}: {str(error)[:60]}".replace("\\n", " "))
"""
_RATE = """
import time, torch
host = torch.empty(size, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
there = torch.empty(size, dtype=torch.uint8, device=device)
def seconds():
    start = time.perf_counter()
    there.copy_(host, non_blocking=True)[0].item()  # waits for the copy
    return time.perf_counter() - start
report(rate=size / min(seconds() for _ in range(5)))
"""


def make(folder: Path, tiny: bool) -> int:
    """Write a pipeline of FLUX.1's published sizes with random weights; the bytes of its transformer."""
    small: dict[str, Any] = dict(num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2)
    small |= dict(joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6))
    widths = (8, 8) if tiny else (128, 256, 512, 512)
    with torch.device("meta"):
        transformer = effusion.FluxTransformer2DModel(**(small if tiny else {}))
        vae = effusion.AutoencoderKL(
            block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths), latent_channels=16,
            up_block_types=("UpDecoderBlock2D",) * len(widths), layers_per_block=2, norm_num_groups=min(32, widths[0]),
            shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    for network in (transformer, vae):
        network.to(torch.bfloat16).to_empty(device="cpu")
        fill(network.parameters())
    effusion.FluxPipeline(
        scheduler=effusion.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip
    return sum(p.nbytes for p in transformer.parameters())


def fill(parameters: Any) -> None:
    """Random numbers at the speed of memory: one block of them, again and again."""
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    with torch.no_grad():
        for p in parameters:
            for part in p.view(-1).split(block.numel()):
                part.copy_(block[: part.numel()])


def row(name: str, runs: dict[str, list[dict[str, Any]]], least: float | None) -> list[str]:
    """One policy of the table: ours, the peer's, their ratio, ours over the least possible, memory of both."""
    ours, peers = runs[harness.OURS], runs[harness.PEER]
    failed = [next((r["error"] for r in side if "error" in r), "") for side in (ours, peers)]
    steps = [
        error or harness.median([r["step"] for r in side]) for error, side in zip(failed, (ours, peers), strict=True)
    ]
    ratio = "–" if any(failed) else harness.ratio([r["step"] for r in ours], [r["step"] for r in peers])
    over = "–" if failed[0] or least is None else f"{statistics.median(r['step'] for r in ours) / least:.2f}x"
    memory = [" / ".join(_memory(side, key) for side in (ours, peers)) for key in ("device", "host", "pinned")]
    return [name, *steps, ratio, over, *memory]


def _memory(runs: Sequence[dict[str, Any]], key: str) -> str:
    return "–" if any("error" in r for r in runs) else f"{max(r[key] for r in runs) / 1e9:.2f}"


def measure(repeat: int, device: str, tiny: bool) -> str:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise harness.NotHere("needs a CUDA device")
    rows: list[list[str]] = []
    compute: float | None = None
    side = 64 if tiny else 1024
    with tempfile.TemporaryDirectory(dir=".") as name:
        weights = make(Path(name) / "flux", tiny)
        rate = harness.child(_RATE, device=device, size=(1 << 20) if tiny else (1 << 30))["rate"]
        for policy, code in POLICIES.items():
            runs: dict[str, list[dict[str, Any]]] = {harness.OURS: [], harness.PEER: []}
            for i in range(repeat):
                for library in list(runs) if i % 2 else reversed(runs):
                    with tempfile.TemporaryDirectory(dir=name) as scratch:
                        given = dict(
                            library=library, policy=code, device=device, scratch=scratch, side=side, steps=STEPS
                        )
                        runs[library].append(harness.child(_RUN, folder=f"{name}/flux", **given))
            if policy == "resident" and "error" not in runs[harness.OURS][0]:
                compute = statistics.median(run["step"] for run in runs[harness.OURS])
            moved = 0 if policy in ("resident", "casting") else weights / 2 if "casting" in policy else weights
            rows.append(row(policy, runs, None if compute is None else max(compute, moved / rate)))
    head = ["policy", "Effusion, step", "peer, step", "ratio", "over the least", "device GB", "host GB", "pinned GB"]
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    said = (
        f"{weights / 1e9:.1f} GB of weights, {side}x{side}, {STEPS} steps; {rate / 1e9:.1f} GB/s from pinned memory to the "
        f"device ({hardware}, CUDA {torch.version.cuda}). Memory: Effusion / peer."
    )
    return f"{said}\n\n{harness.table(head, rows)}"


if __name__ == "__main__":
    options = {"device": "cuda", "tiny": False}
    harness.main("placement_gpu", "FLUX.1 on a GPU under each memory policy", measure, repeat=3, options=options)
