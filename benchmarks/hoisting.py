"""What hoisting leaves out of the loop, counted on the published networks without their weights; and what it costs.

Fractions: the networks of the published configurations on ``meta``, a call at 1024x1024 and 28 steps, with guidance
where the family uses it. Time: a whole run of a random FLUX of medium size, from latents to latents, with hoisting and
without, in turn, in one process; the table is made again for every run, since every run has another prompt.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import effusion
from effusion.placement.hoisting import Hoistable, foresee, hoistable, unhoist

from .harness import alternate, main, median, ratio, table
from .unet_step import SDXL

STEPS = 28
HALF = torch.bfloat16
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def unknown(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=HALF, device="meta")


def known(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=HALF)


def flux() -> tuple[Any, Calls]:
    fixed = {
        "hidden_states": unknown(1, 4096, 64), "encoder_hidden_states": known(1, 512, 4096),
        "pooled_projections": known(1, 768), "img_ids": known(4096, 3), "txt_ids": known(512, 3),
        "guidance": torch.full((1,), 3.5),
    }  # fmt: skip
    calls: Calls = [((), {**fixed, "timestep": torch.full((1,), t, dtype=HALF)}) for t in (1.0, 0.5)]
    return lambda: effusion.FluxTransformer2DModel(guidance_embeds=True), calls


def qwen_image() -> tuple[Any, Calls]:
    fixed = {
        "hidden_states": unknown(1, 4096, 64), "encoder_hidden_states": known(1, 128, 3584),
        "encoder_hidden_states_mask": torch.ones(1, 128, dtype=torch.long), "img_shapes": [[(1, 64, 64)]],
    }  # fmt: skip
    calls: Calls = [((), {**fixed, "timestep": torch.full((1,), t, dtype=HALF)}) for t in (1.0, 0.5)]
    return effusion.QwenImageTransformer2DModel, calls


def stable_diffusion_3() -> tuple[Any, Calls]:
    make = lambda: effusion.SD3Transformer2DModel(  # noqa: E731
        sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=192,
    )  # fmt: skip
    fixed = {
        "hidden_states": unknown(2, 16, 128, 128), "encoder_hidden_states": known(2, 333, 4096),
        "pooled_projections": known(2, 2048),
    }  # fmt: skip
    return make, [((), {**fixed, "timestep": torch.full((2,), t)}) for t in (1000.0, 500.0)]


def sdxl() -> tuple[Any, Calls]:
    make = lambda: effusion.UNet2DConditionModel(**SDXL)  # noqa: E731
    more = {"text_embeds": known(2, 1280), "time_ids": known(2, 6)}
    fixed = {"encoder_hidden_states": known(2, 77, 2048), "added_cond_kwargs": more}
    return make, [((unknown(2, 4, 128, 128), torch.tensor(t)), fixed) for t in (999.0, 499.0)]


def stable_diffusion() -> tuple[Any, Calls]:
    make = lambda: effusion.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)  # noqa: E731
    fixed = {"encoder_hidden_states": known(2, 77, 768)}
    return make, [((unknown(2, 4, 64, 64), torch.tensor(t)), fixed) for t in (999.0, 499.0)]


def pixart() -> tuple[Any, Calls]:
    make = lambda: effusion.PixArtTransformer2DModel(  # noqa: E731
        sample_size=128, caption_channels=4096, in_channels=4, out_channels=8, cross_attention_dim=1152
    )
    fixed = {
        "encoder_hidden_states": known(2, 300, 4096), "encoder_attention_mask": torch.ones(2, 300),
        "added_cond_kwargs": {"resolution": known(2, 2), "aspect_ratio": known(2, 1)},
    }  # fmt: skip
    return make, [((unknown(2, 4, 128, 128),), {**fixed, "timestep": torch.full((2,), t)}) for t in (999.0, 499.0)]


NETWORKS = {
    "FLUX.1": flux,
    "Qwen-Image": qwen_image,
    "Stable Diffusion 3": stable_diffusion_3,
    "SDXL": sdxl,
    "Stable Diffusion 1.5": stable_diffusion,
    "PixArt": pixart,
}


def count(name: str) -> tuple[Hoistable, float]:
    """What can be hoisted in a published network, and how many seconds it took to find out."""
    make, calls = NETWORKS[name]()
    with torch.device("meta"):
        net = make().to(HALF).eval()
    start = time.perf_counter()
    found = hoistable(net, calls, STEPS)
    return found, time.perf_counter() - start


def medium() -> tuple[Any, list[dict[str, Any]]]:
    """A random FLUX of 140 million weights and the known arguments of a run."""
    torch.manual_seed(0)
    net = effusion.FluxTransformer2DModel(
        num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=12, joint_attention_dim=768,
        axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip
    fixed = {
        "encoder_hidden_states": torch.randn(1, 64, 768), "pooled_projections": torch.randn(1, 768),
        "img_ids": torch.zeros(256, 3), "txt_ids": torch.zeros(64, 3), "return_dict": False,
    }  # fmt: skip
    return net, [{**fixed, "timestep": torch.full((1,), 1 - i / STEPS)} for i in range(STEPS)]


def run(net: Any, calls: list[dict[str, Any]], hoists: bool) -> tuple[float, torch.Tensor]:
    """Seconds of a run with a prompt of its own, and its latents."""
    calls = [{**c, "pooled_projections": calls[0]["pooled_projections"] * 1.0} for c in calls]
    x = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    with torch.no_grad():
        if hoists:
            ghost = torch.empty_like(x, device="meta")
            foresee({"net": net}, lambda: [net(hidden_states=ghost, **c) for c in calls])
        for call in calls:
            x = x - net(hidden_states=x, **call)[0] / STEPS
    took = time.perf_counter() - start
    unhoist(net)
    return took, x


def measure(repeat: int) -> str:
    rows = []
    for name in NETWORKS:
        found, seconds = count(name)
        cells = [f"{found.total / 1e9:.2f} GB", f"{found.weights / 1e9:.2f} GB", f"**{found.part:.1%}**"]
        rows.append([name, *cells, f"{found.table / 1e6:.0f} MB", str(len(found.modules)), f"{seconds:.1f} s"])
    counted = table(["network", "weights", "left out", "part", "table", "modules", "found in"], rows)
    net, calls = medium()
    runs = alternate(repeat, hoisted=lambda: run(net, calls, True), plain=lambda: run(net, calls, False))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(runs["hoisted"], runs["plain"], strict=True))
    times = {k: [r[0] for r in v] for k, v in runs.items()}
    return (
        f"{counted}\n\n1024x1024 (Stable Diffusion 1.5: 512x512), {STEPS} steps, bfloat16. A run of as many steps of a "
        f"random FLUX of {sum(p.numel() for p in net.parameters()) / 1e6:.0f} million weights on the CPU, the table made anew: "
        f"{median(times['hoisted'])} hoisted, {median(times['plain'])} not, {ratio(times['hoisted'], times['plain'])}, "
        f"latents bit-identical."
    )


if __name__ == "__main__":
    main("hoisting", "Hoisting", measure, 5)
