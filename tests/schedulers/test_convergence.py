"""Independent of the peer: measured orders of convergence, and the statistics of what stochastic solvers draw."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import effusion

from .gaussian import MU, Exact, S, moved, spread

pytestmark = pytest.mark.filterwarnings("ignore")
SMOOTH = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
KARRAS = {"use_karras_sigmas": True}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LONG = {"lower_order_final": False}

# class, options, order of the theory, calls per step, steps whose history is exact to begin with
DETERMINISTIC = [
    ("EulerDiscrete", KARRAS, 1, 1, 0),
    ("EulerDiscrete", KARRAS | {"prediction_type": "v_prediction"}, 1, 1, 0),
    ("HeunDiscrete", KARRAS, 2, 2, 0),
    ("KDPM2Discrete", KARRAS, 2, 2, 0),
    ("LMSDiscrete", KARRAS, 4, 1, 3),
    ("DPMSolverMultistep", SMOOTH | {"solver_order": 1}, 1, 1, 0),
    ("DPMSolverMultistep", SMOOTH | {"solver_order": 2}, 2, 1, 0),
    ("DPMSolverMultistep", SMOOTH | {"solver_order": 2, "solver_type": "heun"}, 2, 1, 0),
    # the ecosystem's multistep third order halves the weight of the second difference, which leaves order 2;
    # test_third_order_with_the_full_weight shows what is missing
    ("DPMSolverMultistep", SMOOTH | {"solver_order": 3}, 2, 1, 2),
    ("DPMSolverMultistep", SMOOTH | {"solver_order": 2, "algorithm_type": "dpmsolver"}, 2, 1, 0),
    ("DPMSolverMultistep", SMOOTH | {"solver_order": 3, "algorithm_type": "dpmsolver"}, 2, 1, 2),
    ("DPMSolverSinglestep", SMOOTH | LONG | {"solver_order": 1}, 1, 1, 0),
    ("DPMSolverSinglestep", SMOOTH | LONG | {"solver_order": 2}, 2, 2, 0),
    ("DPMSolverSinglestep", SMOOTH | LONG | {"solver_order": 3, "solver_type": "heun"}, 3, 3, 0),
    ("DEISMultistep", KARRAS | {"solver_order": 1}, 1, 1, 0),
    ("DEISMultistep", KARRAS | {"solver_order": 2}, 2, 1, 0),
    ("DEISMultistep", KARRAS | {"solver_order": 3}, 3, 1, 2),
    ("UniPCMultistep", SMOOTH | {"solver_order": 1}, 2, 1, 0),  # UniC raises the order of UniP by one
    ("UniPCMultistep", SMOOTH | {"solver_order": 2}, 3, 1, 1),
    ("UniPCMultistep", SMOOTH | {"solver_order": 2, "disable_corrector": list(range(999))}, 2, 1, 0),
    ("UniPCMultistep", SMOOTH | {"solver_order": 2, "solver_type": "bh1"}, 3, 1, 1),
    ("SASolver", KARRAS | {"predictor_order": 1, "corrector_order": 1}, 1, 1, 0),
    ("SASolver", KARRAS | {"predictor_order": 2, "corrector_order": 2}, 2, 1, 0),
    ("SASolver", KARRAS | {"predictor_order": 3, "corrector_order": 3}, 3, 1, 2),
    ("DDIM", {"clip_sample": False}, 1, 1, 0),
    ("CogVideoXDDIM", {"clip_sample": False}, 1, 1, 0),
    ("PNDM", {"skip_prk_steps": True}, 2, 1, 0),
    ("IPNDM", {}, 1, 1, 0),  # its first step, from α = 0, has order 1 and the rest 2
    ("IPNDM", {}, 2, 1, 2),
    ("EDMEuler", {"final_sigmas_type": "sigma_min", "sigma_min": 0.05, "sigma_max": 10.0}, 1, 1, 0),
    ("EDMDPMSolverMultistep", {"sigma_min": 0.05, "sigma_max": 10.0, "final_sigmas_type": "sigma_min"}, 2, 1, 0),
    ("EDMDPMSolverMultistep", {"sigma_min": 0.05, "sigma_max": 10.0, "solver_order": 3}, 2, 1, 2),
    ("FlowMatchEulerDiscrete", {}, 1, 1, 0),
    ("FlowMatchHeunDiscrete", {}, 2, 2, 0),
    ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}, 2, 1, 0),
]


def error_after(name: str, options: dict[str, Any], steps: int, calls: int, exact_start: int) -> float:
    """The error of a run that stops before its last step (which ends at another kind of level)."""
    options = dict(options)
    if name == "SASolver":
        options["tau_func"] = lambda t: 0.0
    if "sigma_min" not in options and not name.startswith(("DDIM", "Cog", "PNDM", "IPNDM", "Flow", "EDM")):
        options |= SD
    s = getattr(effusion, f"{name}Scheduler")(**options)
    s.set_timesteps(steps)
    exact = Exact(s, "v_prediction" if name == "IPNDM" else None)
    calls_in_all = len(s.timesteps) - (1 if calls == 1 else calls - 1)
    if name.startswith("DPMSolverSinglestep"):
        calls_in_all = (steps - 1) // calls * calls
    if name == "PNDM":  # σ is no smooth function of t at t = 0
        calls_in_all = int(0.7 * steps)
    start = exact.level(s.timesteps[0], 0)
    x = start[0] * MU + spread(*start) * torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    first = x
    for index, t in enumerate(s.timesteps[:calls_in_all]):
        x = s.step(exact(x, t, index), t, x).prev_sample
        if index < exact_start:
            x = moved(first, start, exact.level(s.timesteps[index + 1], index + 1))
    end = exact.level(s.timesteps[calls_in_all], calls_in_all)
    return float((x - moved(first, start, end)).abs().max() / spread(*end))


@pytest.mark.parametrize(("name", "options", "order", "calls", "exact_start"), DETERMINISTIC,
                         ids=[f"{d[0]}-{i}" for i, d in enumerate(DETERMINISTIC)])  # fmt: skip
def test_order_of_convergence(name: str, options: dict[str, Any], order: int, calls: int, exact_start: int) -> None:
    """Twice the steps divide the error by two to the order of the theory, where the grid is fine enough."""
    if name in ("DDIM", "CogVideoXDDIM", "PNDM"):
        grid = [50, 100, 200]
    elif options.get("predictor_order") == 3:
        grid = [193, 385, 769]  # its error changes sign on coarser ones
    elif "Flow" in name or "use_flow_sigmas" in options or name == "IPNDM":
        grid = [40, 80, 160]
    else:
        grid = [6 * k * max(1, calls if name.endswith("Singlestep") else 1) + 1 for k in (4, 8, 16)]
    errors = [error_after(name, options, n, calls, exact_start) for n in grid]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert measured[-1] == pytest.approx(order, abs=0.35), f"errors {errors}, orders {measured}"


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_third_order_with_the_full_weight(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the last weight makes the third order of theory: everything else about the step is right."""
    from effusion.schedulers import dpmsolver

    integrals = dpmsolver.integrals

    def full(*arguments: Any) -> Any:
        a, (phi1, phi2, phi3), c = integrals(*arguments)
        return a, (phi1, phi2, 2 * phi3), c

    monkeypatch.setattr(dpmsolver, "integrals", full)
    options = SMOOTH | {"solver_order": 3, "algorithm_type": algorithm}
    errors = [error_after("DPMSolverMultistep", options, n, 1, 2) for n in (49, 97, 193)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(3, abs=0.2)


STOCHASTIC = [
    ("DDPM", {"clip_sample": False}, {}, 500),
    ("DDPM", {"clip_sample": False, "prediction_type": "v_prediction", "variance_type": "fixed_small_log"}, {}, 500),
    ("DDIM", {"clip_sample": False}, {"eta": 1.0}, 500),
    ("EulerAncestralDiscrete", {}, {}, 500),
    ("EulerDiscrete", KARRAS, {"s_churn": 20.0}, 500),
    ("KDPM2AncestralDiscrete", KARRAS, {}, 60),
    ("DPMSolverMultistep", SMOOTH | {"algorithm_type": "sde-dpmsolver++"}, {}, 60),
    ("DPMSolverMultistep", SMOOTH | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}, 60),
    ("DPMSolverMultistep", SMOOTH | {"algorithm_type": "sde-dpmsolver"}, {}, 60),
    ("DPMSolverSinglestep", KARRAS | {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}, {}, 500),
    ("DPMSolverSDE", KARRAS | {"noise_sampler_seed": 0}, {}, 40),
    ("SASolver", KARRAS | {"tau_func": lambda t: 1.0}, {}, 60),
    ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}, 60),
    ("EDMEuler", {}, {"s_churn": 20.0}, 1000),
    ("CosineDPMSolverMultistep", {"sigma_min": 0.01, "sigma_max": 50.0}, {}, 60),
    ("FlowMatchHeunDiscrete", {}, {"s_churn": 0.0}, 40),
]


@pytest.mark.parametrize(("name", "options", "arguments", "steps"), STOCHASTIC,
                         ids=[f"{d[0]}-{i}" for i, d in enumerate(STOCHASTIC)])  # fmt: skip
def test_mean_and_variance(name: str, options: dict[str, Any], arguments: dict[str, Any], steps: int) -> None:
    """What the solver draws has the mean and the variance of the data, within the error of so many draws."""
    if not name.startswith(("Flow", "EDM", "Cosine", "DDPM", "DDIM")):
        options = options | SD
    s = getattr(effusion, f"{name}Scheduler")(**options)
    s.set_timesteps(steps)
    exact = Exact(s)
    draws = 16384
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 64, 64, generator=generator, dtype=torch.float64)
    start = exact.level(s.timesteps[0], 0)
    x = start[0] * MU + spread(*start) * noise
    if "Brownian" not in name and not name.startswith(("DPMSolverSDE", "FlowMatchHeun")):
        arguments = arguments | {"generator": generator}
    for index, t in enumerate(s.timesteps):
        x = s.step(exact(x, t, index), t, x, **arguments).prev_sample
    end = exact.level(s.timesteps[-1], len(s.timesteps) - 1)
    variance = S**2 + (end[1] ** 2 if options.get("final_sigmas_type") == "sigma_min" else 0)
    assert float(x.mean()) == pytest.approx(MU, abs=4 * S / draws**0.5 + 0.003)
    assert float(x.var()) == pytest.approx(variance, rel=4 * (2 / draws) ** 0.5 + 0.01)
