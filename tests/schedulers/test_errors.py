# ruff: noqa: E501 (one line per case)
"""Bad input: the error names the options that are wrong, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.bounds import bounded

import effusion
from effusion.core import registry

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = sorted(n for n in registry.names_under("effusion.schedulers") if n.endswith("Scheduler"))
STEPPING = [n for n in NAMES if n not in ("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler",
                                          "ScoreSdeVeScheduler", "VQDiffusionScheduler", "CogVideoXDPMScheduler")]  # fmt: skip
X = torch.zeros(1, 2, 4, 4)


@pytest.mark.parametrize(("name", "options", "said"), [
    ("EulerDiscrete", {"use_karras_sigmas": True, "use_beta_sigmas": True}, ["use_karras_sigmas", "use_beta_sigmas"]),
    ("DPMSolverMultistep", {"use_exponential_sigmas": True, "use_lu_lambdas": True}, ["use_exponential_sigmas", "use_lu_lambdas"]),
    ("DPMSolverMultistep", {"use_flow_sigmas": True, "use_karras_sigmas": True}, ["use_flow_sigmas", "use_karras_sigmas"]),
    ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, ["use_karras_sigmas"]),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver"}, ["final_sigmas_type='zero'", "dpmsolver"]),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}, ["solver_order"]),
    ("DPMSolverMultistep", {"solver_order": 5}, ["solver_order=5", "1, 2, 3"]),
    ("DPMSolverMultistep", {"solver_type": "bh9"}, ["solver_type='bh9'", "midpoint"]),
    ("DPMSolverMultistep", {"final_sigmas_type": "one"}, ["final_sigmas_type='one'"]),
    ("EulerAncestralDiscrete", {"prediction_type": "sample"}, ["prediction_type='sample'", "v_prediction"]),
    ("PNDM", {"prediction_type": "sample"}, ["prediction_type='sample'", "PNDM"]),
    ("DDIM", {"prediction_type": "flow_prediction"}, ["flow_prediction"]),
    ("UniPCMultistep", {"prediction_type": "flow_prediction", "predict_x0": False}, ["flow_prediction", "predict_x0"]),
    ("UniPCMultistep", {"shift_terminal": 0.1}, ["shift_terminal", "use_flow_sigmas"]),
    ("SASolver", {"algorithm_type": "deis"}, ["algorithm_type='deis'", "data_prediction"]),
    ("DDPM", {"variance_type": "big"}, ["variance_type='big'"]),
    ("DDPM", {"beta_schedule": "circle"}, ["beta_schedule='circle'", "scaled_linear"]),
    ("EDMEuler", {"sigma_schedule": "beta"}, ["sigma_schedule='beta'", "karras"]),
    ("FlowMatchEulerDiscrete", {"time_shift_type": "cubic"}, ["time_shift_type='cubic'"]),
])  # fmt: skip
def test_contradicting_options(name: str, options: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        getattr(effusion, f"{name}Scheduler")(**options)
    assert all(word in str(error.value) for word in said), error.value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [2_000_000_000, float("inf"), float("nan"), 10**400])
def test_schedules_without_end(name: str, steps: Any) -> None:
    cls = getattr(effusion, name)
    config = {"num_train_timesteps": steps, **({"num_vec_classes": 4} if name == "VQDiffusionScheduler" else {})}
    with pytest.raises(ValueError, match="num_train_timesteps is more than 1000000"):
        bounded(lambda: cls.from_config(config))


@pytest.mark.parametrize(("name", "options", "arguments", "said"), [
    ("EulerDiscrete", {}, {"timesteps": [999, 1], "sigmas": [2.0, 0.0]}, ["timesteps", "sigmas"]),
    ("EulerDiscrete", {}, {"num_inference_steps": 3, "sigmas": [2.0, 0.0]}, ["num_inference_steps", "sigmas"]),
    ("EulerDiscrete", {}, {}, ["num_inference_steps", "none"]),
    ("EulerDiscrete", {"use_karras_sigmas": True}, {"timesteps": [999, 1]}, ["timesteps", "use_karras_sigmas"]),
    ("EulerDiscrete", {}, {"timesteps": [5, 900]}, ["timesteps", "descending", "900"]),
    ("EulerDiscrete", {}, {"sigmas": [1.0, 2.0, 0.0]}, ["sigmas", "descending"]),
    ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {"timesteps": [9, 1]}, ["timestep_type"]),
    ("DDPM", {}, {"timesteps": [500, 500]}, ["timesteps", "descending"]),
    ("DDPM", {}, {"timesteps": [1000, 500]}, ["num_train_timesteps"]),
    ("DDPM", {}, {"timesteps": [900], "num_inference_steps": 1}, ["num_inference_steps", "timesteps"]),
    ("DDIM", {}, {"num_inference_steps": 1001}, ["num_inference_steps=1001", "1000"]),
    ("DDIM", {}, {"num_inference_steps": 0}, ["num_inference_steps=0"]),
    ("HeunDiscrete", {}, {"timesteps": [1, 2]}, ["descending"]),
    ("DPMSolverMultistep", {"use_lu_lambdas": True}, {"timesteps": [900, 1]}, ["use_lu_lambdas", "timesteps"]),
    ("DPMSolverMultistep", {}, {"num_inference_steps": 3, "mu": 1.0}, ["mu", "use_dynamic_shifting"]),
    ("LCM", {}, {"num_inference_steps": 60}, ["num_inference_steps=60", "original_inference_steps=50"]),
    ("LCM", {}, {"timesteps": [1, 2]}, ["descending"]),
    ("CMStochasticIterative", {}, {"timesteps": [1, 2]}, ["descending"]),
    ("UniPCMultistep", {}, {"sigmas": [0.9, 0.1]}, ["sigmas", "use_flow_sigmas"]),
    ("FlowMatchEulerDiscrete", {}, {"sigmas": [1.0, 0.5], "timesteps": [900.0]}, ["sigmas", "timesteps"]),
    ("FlowMatchEulerDiscrete", {}, {"sigmas": [0.5, 1.0]}, ["sigmas", "descending"]),
    ("FlowMatchEulerDiscrete", {}, {"sigmas": [1.0], "num_inference_steps": 4}, ["num_inference_steps"]),
    ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, {"num_inference_steps": 4}, ["mu", "use_dynamic_shifting"]),
    ("FlowMatchEulerDiscrete", {}, {}, ["num_inference_steps"]),
    ("PNDM", {}, {"num_inference_steps": 3}, ["num_inference_steps=3", "skip_prk_steps"]),
    ("UnCLIP", {}, {"num_inference_steps": 1}, ["num_inference_steps=1"]),
])  # fmt: skip
def test_runs_that_cannot_be(name: str, options: dict[str, Any], arguments: dict[str, Any], said: list[str]) -> None:
    scheduler = getattr(effusion, f"{name}Scheduler")(**options)
    with pytest.raises(ValueError) as error:
        scheduler.set_timesteps(**arguments)
    assert all(word in str(error.value) for word in said), error.value


@pytest.mark.parametrize("name", STEPPING)
def test_a_step_before_set_timesteps(name: str) -> None:
    scheduler = getattr(effusion, name)()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(X, scheduler.timesteps[0], X)


@pytest.mark.parametrize("name", STEPPING)
def test_wrong_shapes(name: str) -> None:
    scheduler = getattr(effusion, name)()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"`model_output` has shape \(1, 2, 4, 5\), `sample` \(1, 2, 4, 4\)"):
        scheduler.step(torch.zeros(1, 2, 4, 5), scheduler.timesteps[0], X)


def test_a_run_that_is_over_and_strange_timesteps() -> None:
    s = effusion.EulerDiscreteScheduler()
    s.set_timesteps(2)
    for t in s.timesteps:
        s.step(X, t, X)
    with pytest.raises(ValueError, match="all 2 steps are done"):
        s.step(X, s.timesteps[0], X)
    s.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep 5 is not in this run"):
        s.step(X, torch.tensor(5.0), X)
    with pytest.raises(ValueError, match="integer"):
        s.step(X, 0, X)
    d = effusion.DDIMScheduler()
    d.set_timesteps(4)
    with pytest.raises(ValueError, match="0 to 999"):
        d.step(X, 1000, X)


def test_impossible_steps() -> None:
    s = effusion.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    s.set_timesteps(4)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True"):
        s.step(X, s.timesteps[0], X)
    with pytest.raises(ValueError, match="`generator` and `variance_noise`"):
        s.step(X, s.timesteps[1], X, eta=1.0, generator=torch.Generator(), variance_noise=X)
    with pytest.raises(ValueError, match="step_correct"):
        effusion.ScoreSdeVeScheduler().step(X, 1, X)
    t = effusion.TCDScheduler()
    t.set_timesteps(4)
    with pytest.raises(ValueError, match="eta=2"):
        t.step(X, t.timesteps[0], X, eta=2)
