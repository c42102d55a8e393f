"""Memory that stays constant: a streamed transformer as it gets deeper, tiles as a picture grows, slices as a batch grows.

Each peak is of a fresh process: resident memory above what it was before the call, with freed pages given back at once.
That of the transformer is over several calls, as in a denoising loop: pages of the ring count once they are written to,
and with few blocks one call doesn't come by all of them.
The overhead is of an engine with everything resident, paired with the same network that never had one.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from . import harness

CALLS = 3  # of the streamed transformer

_START = """
import os
os.environ["OMP_NUM_THREADS"] = "1"
import ctypes, torch, effusion
torch.manual_seed(0)
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # large pieces come from the system, and go back to it
def peak(call):
    with torch.no_grad():
        forget_peak()
        before = status("VmRSS:")
        out = call()
        return status("VmHWM:") - before, out
"""
_DEPTH = """
net = effusion.FluxTransformer2DModel.from_pretrained(folder)
net.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=folder)
n, d = 64, net.config.joint_attention_dim
given = dict(hidden_states=torch.randn(1, n, 64), encoder_hidden_states=torch.randn(1, 32, d), timestep=torch.ones(1),
             pooled_projections=torch.randn(1, 64), img_ids=torch.zeros(n, 3), txt_ids=torch.zeros(32, 3))
report(peak=peak(lambda: [net(**given).sample.sum() for _ in range(calls)])[0], weights=sum(p.nbytes for p in net.parameters()))
"""
_DECODE = """
vae = effusion.AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=1, latent_channels=4, sample_size=128,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).eval()
with torch.no_grad():
    vae.decode(torch.randn(1, 4, 8, 8))
vae.enable_tiling() if tiling else vae.enable_slicing()
used, out = peak(lambda: vae.decode(torch.randn(batch, 4, side // 8, side // 8)).sample)
report(peak=used, image=out.nbytes)
"""
_OVERHEAD = """
import time
from effusion.placement.engine import engine_for
unet = effusion.UNet2DConditionModel(block_out_channels=(64, 128), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64).eval()
given = torch.randn(1, 4, 32, 32), 5, torch.randn(1, 77, 64)
def seconds():
    start = time.perf_counter()
    for _ in range(4):
        unet(*given)
    return time.perf_counter() - start
ratios = []
with torch.no_grad():
    seconds()
    for i in range(pairs):
        plain = seconds() if i % 2 else None
        unet.enable_group_offload("cpu", use_stream=True)
        served = seconds()
        unet.disable_group_offload()
        ratios.append(served / (plain or seconds()))
report(ratios=ratios)
"""


def transformer(folder: Path, depth: int) -> None:
    harness.child(
        "import effusion\n"
        "effusion.FluxTransformer2DModel(num_layers=depth, num_single_layers=2 * depth, attention_head_dim=64,"
        " num_attention_heads=8, joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24))"
        ".save_pretrained(folder)",
        folder=str(folder),
        depth=depth,
    )


def growth(name: str, aim: str, small: int, large: int) -> list[str]:
    return [name, f"{small / 1e6:.1f} MB", f"{large / 1e6:.1f} MB", f"**{large / small:.2f}x**", aim]


def measure(repeat: int) -> str:
    def least(code: str, **values: object) -> dict[str, int]:
        runs = [harness.child(_START + code, **values) for _ in range(repeat)]
        return {key: min(int(run[key]) for run in runs) for key in runs[0]}

    rows = []
    with tempfile.TemporaryDirectory() as name:
        found = []
        for depth in (2, 8):
            folder = Path(name) / str(depth)
            transformer(folder, depth)
            found.append(least(_DEPTH, folder=str(folder), calls=CALLS))
        weights = " and ".join(f"{f['weights'] / 1e6:.0f}" for f in found)
        rows.append(
            growth(
                f"streamed FLUX, 6 and 24 blocks ({weights} MB), {CALLS} calls", "<= 1.05x", *(f["peak"] for f in found)
            )
        )
    tiles = [least(_DECODE, tiling=True, side=side, batch=1) for side in (256, 1024)]
    beyond = [t["peak"] - t["image"] for t in tiles]
    rows.append(growth("tiles of 128, 256² and 1024² pixels, beyond the image", "<= 1.10x", *beyond))
    slices = [least(_DECODE, tiling=False, side=128, batch=batch) for batch in (1, 8)]
    beyond = [s["peak"] - s["image"] for s in slices]
    rows.append(growth("slices, batches of 1 and 8, beyond the images", "<= 1.10x", *beyond))
    ratios = harness.child(_START + _OVERHEAD, pairs=5 * repeat)["ratios"]
    head = ["peak of a call", "small", "large", "growth", "aim"]
    said = f"An engine with everything resident takes **{statistics.median(ratios):.3f}x** the time (aim: <= 1.01x)."
    return f"{harness.table(head, rows)}\n\n{said}"


if __name__ == "__main__":
    harness.main("placement_memory", "Memory that stays constant", measure, repeat=3)
