"""What a scheduler adds to each call of the network: 1000 steps on a 4x64x64 latent, every class, ours and the peer's."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from typing import Any

import diffusers
import torch

import effusion
from effusion.core import registry

from . import harness

STEPS = 1000
# discrete data, two-call interfaces, and a signature of its own: not steps on a latent
OTHER = ("VQDiffusionScheduler", "ScoreSdeVeScheduler", "CogVideoXDPMScheduler", "DPMSolverMultistepInverseScheduler")
# their time is that of torchsde, which draws the Brownian path for both; fewer steps, and a total without them
PATHS = {"DPMSolverSDEScheduler": 30, "CosineDPMSolverMultistepScheduler": 30}
OPTIONS: dict[str, dict[str, Any]] = {
    "CMStochasticIterativeScheduler": {"num_train_timesteps": STEPS},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
    "LCMScheduler": {"original_inference_steps": STEPS},
    "TCDScheduler": {"original_inference_steps": STEPS},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
}


def classes() -> list[str]:
    names = registry.names_under("effusion.schedulers")
    return sorted(n for n in names if n.endswith("Scheduler") and n not in OTHER)


def begin(library: Any, name: str) -> Any:
    """A scheduler before its first step."""
    scheduler = getattr(library, name)(**OPTIONS.get(name, {}))
    two_calls = getattr(scheduler, "order", 1)
    steps = PATHS.get(name, STEPS) // two_calls
    scheduler.set_timesteps(min(steps, 999 if name.startswith(("DPMSolver", "UniPC", "DEIS", "SA")) else steps))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def run(scheduler: Any) -> float:
    """CPU seconds of all steps, with what a pipeline calls around them; the sample stays, so numbers stay tame."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 64, 64, generator=generator)
    output = torch.randn(1, 4, 64, 64, generator=generator)
    arguments = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scales = hasattr(scheduler, "scale_model_input")
    start = time.process_time()
    for t in scheduler.timesteps:
        if scales:
            scheduler.scale_model_input(sample, t)
        scheduler.step(output, t, sample, **arguments, return_dict=False)
    return time.process_time() - start


def measure(repeat: int) -> str:
    """A row per class and one of the total; CPU time of one thread."""
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    few, total = ({who: [0.0] * repeat for who in (harness.OURS, harness.PEER)} for _ in range(2))
    for name in classes():
        ready = {library.__name__: begin(library, name) for library in (effusion, diffusers)}
        times = harness.alternate(repeat, **{who: lambda s=s: run(copy.deepcopy(s)) for who, s in ready.items()})
        calls = len(ready[harness.OURS].timesteps)
        each = {who: [t / calls * 1e6 for t in values] for who, values in times.items()}
        rows.append([f"`{name}`", *_cells(each)])
        for sums in (total,) if name in PATHS else (total, few):
            for who, values in each.items():
                sums[who] = [a + b for a, b in zip(sums[who], values, strict=True)]
    rows += [[f"**all but {len(PATHS)}**", *_cells(few)], ["**all**", *_cells(total)]]
    head = ["class", "Effusion, µs per step", "peer, µs per step", "ratio"]
    left_out = " and ".join(f"`{n}`" for n in PATHS)
    return (
        "`scale_model_input` and `step`, float32, 1x4x64x64, one thread, CPU time, about 1000 steps. Most of the "
        f"time of {left_out} is that of `torchsde` on both sides.\n\n{harness.table(head, rows)}"
    )


def _cells(times: dict[str, list[float]]) -> list[str]:
    ours, peers = times[harness.OURS], times[harness.PEER]
    return [harness.median(ours, 1, ""), harness.median(peers, 1, ""), harness.ratio(ours, peers)]


if __name__ == "__main__":
    harness.main("schedulers", "Steps of schedulers", measure, repeat=5)
