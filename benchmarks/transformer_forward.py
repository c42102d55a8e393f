"""One forward pass of transformers at their published width with fewer blocks: time side by side, numbers compared."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import effusion

from . import harness
from .unet_step import gemm_rate, seconds

TOKENS, TEXT = 1024, 512  # an image of 512x512, and the longest prompt
# the same share of the two kinds of blocks as in the whole network
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1": ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {"num_layers": 2}),
    "SD 3.5 medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 4,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
    ),
}


def inputs(name: str) -> dict[str, Any]:
    """One image of 512x512 and one prompt."""
    torch.manual_seed(1)
    if name == "SD3Transformer2DModel":
        return {
            "hidden_states": torch.randn(1, 16, 64, 64),
            "encoder_hidden_states": torch.randn(1, TEXT, 4096),
            "pooled_projections": torch.randn(1, 2048),
            "timestep": torch.tensor([500.0]),
        }
    width = 3584 if name.startswith("Qwen") else 4096
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, TOKENS, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, width),
        "timestep": torch.tensor([0.5]),
    }
    if name.startswith("Qwen"):
        return {**given, "img_shapes": [[(1, 32, 32)]]}
    side = torch.arange(32.0)
    ids = torch.stack([torch.zeros(32, 32), side[:, None].expand(32, 32), side.expand(32, 32)], dim=-1).reshape(-1, 3)
    pooled, guidance = torch.randn(1, 768), torch.tensor([3.5])
    return {
        **given,
        "pooled_projections": pooled,
        "guidance": guidance,
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def pair(name: str, config: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, the peer's), of random weights that both share in memory."""
    torch.manual_seed(0)
    peer = getattr(diffusers, name)(**config).eval().requires_grad_(False)
    with torch.device("meta"):
        ours = getattr(effusion, name)(**config).eval().requires_grad_(False)
    ours.load_state_dict(peer.state_dict(), assign=True)
    return ours, peer


def compare(name: str, config: dict[str, Any], repeat: int) -> tuple[dict[str, list[float]], float, float]:
    """(seconds of both, largest difference relative to the largest output, flop of a pass)."""
    ours, peer = pair(name, config)
    given = inputs(name)
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
    """Each network in turn."""
    rate = gemm_rate()
    rows = []
    for label, (name, config) in CASES.items():
        times, difference, flop = compare(name, config, repeat)
        ours, peers = times["ours"], times["peers"]
        share = flop / min(ours) / rate
        ratio = harness.ratio(ours, peers)
        rows.append([label, harness.median(ours), harness.median(peers), ratio, f"{share:.0%}", f"{difference:.1e}"])
    head = ["transformer", "Effusion", "peer", "ratio", "share of the GEMM rate", "largest difference, relative"]
    note = (
        f"{TOKENS} image tokens and {TEXT} of text, published width, a few blocks in the published proportion, "
        f"float32, {torch.get_num_threads()} threads; a 2048³ matrix product runs at {rate / 1e9:.0f} Gflop/s here."
    )
    return f"{note}\n\n{harness.table(head, rows)}"


if __name__ == "__main__":
    harness.main("transformer_forward", "A forward pass of the transformers", measure, repeat=7)
