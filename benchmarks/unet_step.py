"""One denoising step of published UNets on the CPU: time side by side, numbers compared, share of the GEMM rate."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import effusion

from . import harness

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def pair(config: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, the peer's), of random weights that both share in memory."""
    torch.manual_seed(0)
    peer = diffusers.UNet2DConditionModel(**config).eval().requires_grad_(False)
    with torch.device("meta"):
        ours = effusion.UNet2DConditionModel(**config).eval().requires_grad_(False)
    ours.load_state_dict(peer.state_dict(), assign=True)
    return ours, peer


def inputs(config: dict[str, Any], batch: int = 2) -> dict[str, Any]:
    """Latents of 512x512 pixels and 77 tokens; ``batch`` 2 is one step with guidance."""
    torch.manual_seed(1)
    given: dict[str, Any] = {
        "sample": torch.randn(batch, 4, 64, 64),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": torch.randn(batch, 77, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 1280),
            "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * batch),
        }
    return given


def seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def gemm_rate(size: int = 2048, repeat: int = 10) -> float:
    """The best measured rate of a float32 matrix product, in flop/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repeat))


def compare(config: dict[str, Any], repeat: int) -> tuple[dict[str, list[float]], float, float]:
    """(seconds of both, largest difference relative to the largest output, flop of a step)."""
    ours, peer = pair(config)
    given = inputs(config)
    with torch.no_grad():
        a, b = ours(**given).sample, peer(**given).sample
        difference = float((a - b).abs().max() / b.abs().max())
        with FlopCounterMode(display=False) as counter:
            ours(**given)
        times = harness.alternate(
            repeat, ours=lambda: seconds(lambda: ours(**given)), peers=lambda: seconds(lambda: peer(**given))
        )
    return times, difference, float(counter.get_total_flops())


def measure(repeat: int) -> str:
    """Both published sizes at 512x512 with guidance (a batch of two)."""
    rate = gemm_rate()
    rows = []
    for name, config, count in (("SD 1.5", SD15, repeat), ("SDXL", SDXL, min(repeat, 3))):
        times, difference, flop = compare(config, count)
        share = flop / min(times["ours"]) / rate
        ours, peers = times["ours"], times["peers"]
        ratio = harness.ratio(ours, peers)
        rows.append([name, harness.median(ours), harness.median(peers), ratio, f"{share:.0%}", f"{difference:.1e}"])
    head = ["UNet", "Effusion", "peer", "ratio", "share of the GEMM rate", "largest difference, relative"]
    note = f"One step at 512x512 with guidance, float32, {torch.get_num_threads()} threads; "
    return f"{note}a 2048³ matrix product runs at {rate / 1e9:.0f} Gflop/s here.\n\n{harness.table(head, rows)}"


if __name__ == "__main__":
    harness.main("unet_step", "A step of the published UNets", measure, repeat=5)
