"""What holds for every scheduler: predictions and noise are inverse, levels fall, runs and copies are separate."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effusion
from effusion.core import registry
from effusion.schedulers import noise, prediction, spacing

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = sorted(n for n in registry.names_under("effusion.schedulers") if n.endswith("Scheduler"))
PLAIN = [n for n in NAMES if n not in ("ScoreSdeVeScheduler", "VQDiffusionScheduler", "CogVideoXDPMScheduler")]
NOISING = [n for n in PLAIN if n not in ("IPNDMScheduler", "CMStochasticIterativeScheduler", "UnCLIPScheduler")
           and "Inverse" not in n]  # fmt: skip
few = settings(max_examples=25, deadline=None)


def make(name: str, **options: Any) -> Any:
    if name == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = 5
    return getattr(effusion, name)(**options)


def run(scheduler: Any, steps: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """All samples of a run with a smooth stand-in for the network."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 4, generator=generator) * float(scheduler.init_noise_sigma)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    samples = []
    for t in scheduler.timesteps:
        output = torch.sin(scheduler.scale_model_input(x, t))
        x = scheduler.step(output, t, x, **({"generator": generator} if takes else {})).prev_sample
        samples.append(x)
    return samples


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", PLAIN)
def test_a_second_run_starts_clean(name: str) -> None:
    scheduler = make(name)
    first = run(scheduler)
    run(scheduler, steps=9, seed=1)
    scheduler.set_timesteps(6)
    t = scheduler.timesteps[0]
    x = torch.ones(2, 3, 4, 4)
    scheduler.step(torch.sin(scheduler.scale_model_input(x, t)), t, x)  # a run that is left after one step
    assert same(run(scheduler), first)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_shares_nothing(name: str, how: Any) -> None:
    scheduler = make(name)
    expected = run(scheduler)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator) * float(scheduler.init_noise_sigma)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        if i == 2:  # in the middle of a run, another one goes its own way
            run(how(scheduler), steps=4, seed=3)
        output = torch.sin(scheduler.scale_model_input(x, t))
        x = scheduler.step(output, t, x, **({"generator": generator} if takes else {})).prev_sample
        assert torch.equal(x, expected[i])
    tensors = {v.data_ptr() for v in vars(scheduler).values() if isinstance(v, torch.Tensor)}
    assert not tensors & {v.data_ptr() for v in vars(how(scheduler)).values() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("name", PLAIN)
def test_saved_and_loaded_it_takes_the_same_steps(name: str, tmp_path: Path) -> None:
    scheduler = make(name)
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = type(scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    assert same(run(loaded), run(scheduler))


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_leaves_its_input_alone(name: str) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[:4]:
        output = torch.sin(x)
        before = x.clone(), output.clone()
        scheduler.scale_model_input(x, t)
        after = scheduler.step(output, t, x).prev_sample
        assert torch.equal(x, before[0])
        assert torch.equal(output, before[1])
        x = after


def predicting() -> list[tuple[str, str]]:
    """The classes that keep their denoised estimate, with each prediction type that they take."""
    without = ("DEIS", "Cosine", "EDMDPM", "TCD", "PNDM", "CMStoch")
    cases = []
    for name in (n for n in NOISING if not n.startswith(without)):
        takes = getattr(getattr(effusion, name), "_predictions", ("flow_prediction",))
        cases += [(name, kind) for kind in takes if (kind == "flow_prediction") == name.startswith("FlowMatch")]
    return [(name, kind) for name, kind in cases if kind in prediction.KINDS]


@pytest.mark.parametrize(("name", "kind"), predicting())
def test_the_true_prediction_gives_the_sample_back(name: str, kind: str) -> None:
    """`add_noise`, then a step with what the network should say, has the clean sample as its denoised estimate."""
    cls = getattr(effusion, name)
    is_flow = name.startswith("FlowMatch")
    options = {} if is_flow else {"prediction_type": kind}
    options |= {k: False for k in ("clip_sample", "thresholding") if k in cls._init_names()}
    scheduler = cls(**options)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    index = 2
    t = scheduler.timesteps[index]
    batch = t.repeat(2)
    noisy = scheduler.scale_noise(clean, batch, eps) if is_flow and name != "FlowMatchHeunDiscreteScheduler" else None
    if name == "FlowMatchHeunDiscreteScheduler":
        noisy = scheduler.scale_noise(clean, t, eps)
    noisy = scheduler.add_noise(clean, eps, batch) if noisy is None else noisy
    scheduler.scale_model_input(noisy, t)
    if name.startswith("EDM"):
        sigma, data = float(scheduler.sigmas[index]), scheduler.config.sigma_data
        c_out = sigma * data / (sigma**2 + data**2) ** 0.5 * (1 if kind == "epsilon" else -1)
        output = (clean - data**2 / (sigma**2 + data**2) * noisy) / c_out
    else:
        alpha = _alpha(scheduler, name, index, t)
        output = prediction.target(kind, clean, eps, alpha, (1 - alpha**2) ** 0.5)
    result = scheduler.step(output, t, noisy)
    if "pred_original_sample" in result:
        estimate = result.pred_original_sample
    elif "denoised" in result:  # the consistency function's value mixes the sample in
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(float(t))
        estimate = (result.denoised - c_skip * noisy) / c_out
    elif is_flow:
        estimate = noisy - float(scheduler.sigmas[index]) * output
    else:
        estimate = scheduler.model_outputs[-1]
    assert torch.allclose(estimate, clean, atol=2e-5, rtol=0)


def _alpha(scheduler: Any, name: str, index: int, t: torch.Tensor) -> float:
    if name.startswith("FlowMatch") or not hasattr(scheduler, "sigmas"):
        return 0.0 if name.startswith("FlowMatch") else float(scheduler.alphas_cumprod[int(t)]) ** 0.5
    return float(1 / (float(scheduler.sigmas[index]) ** 2 + 1) ** 0.5)


@given(kind=st.sampled_from(prediction.KINDS), bar=st.floats(0.01, 0.99), seed=st.integers(0, 99))
@few
def test_targets_and_estimates_are_inverse(kind: str, bar: float, seed: int) -> None:
    x0, eps = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    alpha, sigma = (1 - bar, bar) if kind == "flow_prediction" else (bar**0.5, (1 - bar) ** 0.5)
    x = alpha * x0 + sigma * eps
    output = prediction.target(kind, x0, eps, alpha, sigma)
    assert torch.allclose(prediction.to_denoised(kind, output, x, alpha, sigma), x0)
    a, b = prediction.noise(kind, alpha, sigma)
    assert torch.allclose(a * x + b * output, eps)


@given(kind=st.sampled_from(spacing.SPACINGS), train=st.integers(1, 1200), data=st.data(), extra=st.integers(0, 1))
@few
def test_a_spacing_never_repeats_a_timestep(kind: str, train: int, data: Any, extra: int) -> None:
    steps = data.draw(st.integers(1, train))
    times = spacing.timesteps(kind, steps, train, extra=extra)
    assert len(times) == steps
    assert (np.diff(times) < 0).all()
    assert times[-1] >= 0
    assert times[0] < train


@given(low=st.floats(1e-3, 1.0), ratio=st.floats(1.5, 1e5), steps=st.integers(2, 200))
@few
def test_transforms_of_levels_fall_between_their_ends(low: float, ratio: float, steps: int) -> None:
    high = low * ratio
    for levels in (spacing.karras(low, high, steps), spacing.exponential(low, high, steps),
                   spacing.beta(low, high, steps), spacing.lu(np.log(low), np.log(high), steps)):  # fmt: skip
        assert len(levels) == steps
        assert (np.diff(levels) < 0).all()
        assert levels[0] == pytest.approx(high, rel=1e-6)
        assert levels[-1] == pytest.approx(low, rel=1e-6)


@given(schedule=st.sampled_from(noise.BETA_SCHEDULES), train=st.integers(10, 1000), zero=st.booleans())
@few
def test_training_schedules_lose_signal_steadily(schedule: str, train: int, zero: bool) -> None:
    made = noise.NoiseSchedule.build(train, 0.0001, 0.02, schedule, rescale_betas_zero_snr=zero)
    bar = made.alphas_cumprod
    assert (bar.diff() <= 0).all()
    assert 0 < bar[0] < 1
    assert not zero or bar[-1] == 0


@pytest.mark.parametrize("name", [n for n in PLAIN if "Inverse" not in n])
@given(steps=st.integers(4, 40))
@settings(max_examples=4, deadline=None)
def test_runs_fall(name: str, steps: int) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(steps if name != "CMStochasticIterativeScheduler" else min(steps, 20))
    if name != "PNDMScheduler":  # its starting steps go forth and back
        assert (scheduler.timesteps.diff() <= 1e-3).all()
    if hasattr(scheduler, "sigmas"):
        assert (scheduler.sigmas.diff() <= 0).all()
        assert (scheduler.sigmas >= 0).all()


# torchsde, behind the other two, draws no half-precision noise on the CPU and reads the times
WITHOUT_PATHS = [n for n in PLAIN if not n.startswith(("Cosine", "DPMSolverSDE"))]


@pytest.mark.parametrize("name", WITHOUT_PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_half_precision_out(name: str, dtype: torch.dtype) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(5)
    x = torch.ones(1, 2, 4, 4, dtype=dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), t, x).prev_sample
        assert x.dtype == dtype
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("name", WITHOUT_PATHS)
def test_steps_never_ask_the_accelerator(name: str) -> None:
    """On a device whose tensors have no values to read, a run goes through: nothing waits for the accelerator."""
    scheduler = make(name)
    scheduler.set_timesteps(5, device="meta")
    x = torch.empty(1, 2, 4, 4, device="meta")
    for t in scheduler.timesteps:
        assert t.device.type == "meta"
        x = scheduler.step(torch.sin(scheduler.scale_model_input(x, t)), t, x).prev_sample
    assert x.device.type == "meta"
