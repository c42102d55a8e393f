# ruff: noqa: E501 (one line of the table per group of configurations)
"""Per-step parity with the peer: the same sample and model output give the same next sample, at every step."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import effusion

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {"prediction_type": "v_prediction"}
KARRAS, EXPONENTIAL, BETA = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.5}
SDE = {"algorithm_type": "sde-dpmsolver++"}
NOISE = {"final_sigmas_type": "sigma_min"}
MU = {"set": {"num_inference_steps": 8, "mu": 0.7}}
TWICE = {"channels": 2}


def cases() -> dict[str, list[dict[str, Any]]]:
    """Class -> configurations; ``set``, ``step``, ``channels`` and ``begin`` are about the run, not the class."""
    cog = [
        {},
        V | TRAILING | {"rescale_betas_zero_snr": True},
        {"prediction_type": "sample"},
        {"beta_schedule": "linear", "snr_shift_scale": 1.0},
        {"set_alpha_to_one": False, "timestep_spacing": "linspace"},
    ]
    sigma = [{}, SD | KARRAS | V, EXPONENTIAL | LEADING, BETA | TRAILING, SD | {"begin": 4}]
    distilled = [
        {},
        V | {"set": {"num_inference_steps": 4}},
        {"prediction_type": "sample"},
        {"set": {"timesteps": [999, 759, 499, 259]}},
        {"set": {"num_inference_steps": 8, "strength": 0.5}},
        {"set": {"num_inference_steps": 5, "original_inference_steps": 100}, "rescale_betas_zero_snr": True} | V,
    ]
    flow = [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True} | MU,
        {"shift_terminal": 0.1, "shift": 2.0},
        KARRAS,
        EXPONENTIAL,
        BETA,
        {"invert_sigmas": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"} | MU,
        {"set": {"sigmas": [1.0, 0.7, 0.3]}},
        {"set": {"timesteps": [1000.0, 700.0, 300.0]}},
        {"begin": 3},
    ]
    multistep = [
        {},
        SD | KARRAS,
        V | TRAILING | {"rescale_betas_zero_snr": True},
        FLOW,
        {"solver_order": 3} | EXPONENTIAL,
        {"solver_order": 1, "prediction_type": "sample"},
        {"thresholding": True, "sample_max_value": 2.0},
        {"lambda_min_clipped": -5.1},
        {"use_lu_lambdas": True},
        SD | SDE,
        SD | SDE | {"solver_order": 3} | KARRAS,
        SDE | {"solver_type": "heun"},
        {"algorithm_type": "dpmsolver"} | NOISE,
        {"algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun"} | NOISE,
        {"algorithm_type": "sde-dpmsolver"} | NOISE | SD,
        {"algorithm_type": "dpmsolver", "thresholding": True} | NOISE,
        {"set": {"timesteps": [999, 600, 300, 20]}},
        {"solver_type": "heun", "euler_at_final": True} | LEADING,
        {"set": {"num_inference_steps": 20}, "solver_order": 3},
        {"begin": 3, "solver_order": 3},
        {"use_dynamic_shifting": True} | FLOW | MU,
    ]
    return {
        "DDPM": [{}, V | TRAILING, {"prediction_type": "sample", "thresholding": True}, {"variance_type": "fixed_large"},
                 {"variance_type": "learned_range"} | TWICE, {"variance_type": "learned"} | TWICE,
                 {"variance_type": "fixed_small_log", "clip_sample": False}, {"beta_schedule": "squaredcos_cap_v2"},
                 {"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}, {"set": {"timesteps": [900, 500, 499, 3]}},
                 {"trained_betas": [0.001 * (i + 1) for i in range(50)], "num_train_timesteps": 50}],
        "DDPMParallel": [{}, V, TRAILING, {"clip_sample": False}],
        "DDIM": [{}, V | TRAILING | {"rescale_betas_zero_snr": True}, {"prediction_type": "sample"} | SD,
                 {"thresholding": True, "clip_sample": False}, {"step": {"eta": 0.6}},
                 {"step": {"eta": 1.0, "use_clipped_model_output": True}}, {"set_alpha_to_one": False} | LEADING,
                 {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}],
        "DDIMParallel": [{}, V, TRAILING, {"step": {"eta": 1.0}}],
        "DDIMInverse": [{}, V | TRAILING, SD | {"clip_sample": False}, {"prediction_type": "sample", "set_alpha_to_one": False}],
        "PNDM": [{}, SD | {"skip_prk_steps": True} | LEADING, V, TRAILING | {"set_alpha_to_one": True}],
        "IPNDM": [{}, {"set": {"num_inference_steps": 3}}, {"set": {"num_inference_steps": 15}}, {"begin": 2}],
        "LMSDiscrete": [{}, SD | KARRAS | V, EXPONENTIAL | LEADING, BETA | TRAILING, {"step": {"order": 2}}],
        "EulerDiscrete": [*sigma, V | TRAILING | {"rescale_betas_zero_snr": True}, {"prediction_type": "sample"},
                          SD | {"step": {"s_churn": 3.0, "s_noise": 1.05}}, {"interpolation_type": "log_linear"}, NOISE,
                          V | {"timestep_type": "continuous"}, KARRAS | {"sigma_min": 0.01, "sigma_max": 50.0},
                          {"set": {"sigmas": [14.0, 7.0, 2.0, 0.5, 0.0]}}, {"set": {"timesteps": [999, 500, 200, 10]}}],
        "EulerAncestralDiscrete": [{}, SD | V, LEADING, TRAILING, V | TRAILING | {"rescale_betas_zero_snr": True}],
        "HeunDiscrete": [*sigma, {"beta_schedule": "exp", "clip_sample": True}, {"set": {"timesteps": [999, 500, 200, 10]}}],
        "KDPM2Discrete": sigma,
        "KDPM2AncestralDiscrete": sigma,
        "DPMSolverSDE": [{"noise_sampler_seed": 3} | c for c in sigma[:4]] + [{"noise_sampler_seed": [1, 2]} | SD],
        "DPMSolverMultistep": multistep,
        "DPMSolverSinglestep": [{"lower_order_final": True} | c for c in (
            {}, {"solver_order": 3}, {"solver_order": 3, "solver_type": "heun"} | SD | KARRAS, V | EXPONENTIAL, SDE | SD,
            SDE | {"solver_order": 3}, {"algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun"} | NOISE,
            FLOW, {"set": {"timesteps": [999, 600, 300, 20]}}, {"solver_order": 1}, {"thresholding": True}, {"begin": 3})],
        "DPMSolverMultistepInverse": [{}, SD | KARRAS, V | TRAILING, {"solver_order": 3} | EXPONENTIAL, LEADING,
                                      {"algorithm_type": "dpmsolver"}],
        "DEISMultistep": [{}, SD | KARRAS, V | TRAILING, {"solver_order": 3}, {"solver_order": 1} | BETA | LEADING,
                          {"prediction_type": "sample", "thresholding": True}],
        "UniPCMultistep": [{}, SD | KARRAS, {"solver_order": 3, "solver_type": "bh1"} | NOISE, FLOW,
                           V | TRAILING | {"rescale_betas_zero_snr": True}, {"predict_x0": False} | NOISE | EXPONENTIAL,
                           {"disable_corrector": [0, 2], "solver_order": 3}, FLOW | KARRAS, FLOW | {"shift_terminal": 0.2},
                           {"use_dynamic_shifting": True} | FLOW | MU, FLOW | {"set": {"sigmas": np.array([0.95, 0.6, 0.2])}},
                           KARRAS | {"sigma_min": 0.1, "sigma_max": 20.0}, {"begin": 3, "thresholding": True}],
        "SASolver": [{}, SD | KARRAS, {"predictor_order": 3, "corrector_order": 3}, {"algorithm_type": "noise_prediction"},
                     V | TRAILING, {"predictor_order": 1, "corrector_order": 1} | FLOW, {"tau_func": lambda t: 0.5}],
        "LCM": [*distilled, {"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True}],
        "TCD": [*distilled, {"step": {"eta": 0.0}}, {"step": {"eta": 1.0}}],
        "CMStochasticIterative": [{}, {"clip_denoised": False, "s_noise": 1.1}, {"sigma_max": 20.0, "rho": 5.0},
                                  {"set": {"timesteps": [22, 10, 0]}}],
        "EDMEuler": [{}, V | {"step": {"s_churn": 3.0}}, {"sigma_schedule": "exponential"}, NOISE,
                     {"set": {"sigmas": torch.linspace(0, 1, 6)}}],
        "EDMDPMSolverMultistep": [{}, V, {"solver_order": 3, "sigma_schedule": "exponential"}, SDE, NOISE | {"thresholding": True},
                                  {"solver_type": "heun", "set": {"num_inference_steps": 16}}],
        "CosineDPMSolverMultistep": [{}, {"sigma_schedule": "karras"}, {"prediction_type": "epsilon", "solver_type": "heun"},
                                     {"solver_order": 1}],
        "FlowMatchEulerDiscrete": [*flow, {"stochastic_sampling": True}],
        "FlowMatchHeunDiscrete": [{}, {"shift": 3.0}, {"step": {"s_churn": 2.0}}, {"begin": 2}],
        "FlowMatchLCM": flow,
        "UnCLIP": [{}, {"variance_type": "learned_range"} | TWICE, {"prediction_type": "sample", "clip_sample": False},
                   {"clip_sample_range": 5.0}],
        "CogVideoXDDIM": cog,
    }  # fmt: skip


def model(x: torch.Tensor, call: int) -> torch.Tensor:
    """A smooth function that stands for a network."""
    return torch.sin(0.7 * x + 0.3 * call) * 0.8 + 0.1 * x / (1 + x.abs().mean())


ALL = [(name, config) for name, configs in cases().items() for config in configs]
# where the peer's coefficients are made in float64, or rounded to float32 in an order that can be followed
EXACT = {"DDIM", "DDIMParallel", "DDIMInverse", "TCD", "CogVideoXDDIM"}
SLOW = ("KDPM2", "Heun", "LMS", "DPMSolverSDE")  # the peer lays out a run over all timesteps when it builds these


def both(name: str, config: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    config = dict(config)
    run = {k: config.pop(k) for k in ("set", "step", "channels", "begin") if k in config}
    if name.startswith(SLOW) and "timesteps" not in run.get("set", {}):
        config["num_train_timesteps"] = 100
    ours, peers = (getattr(library, f"{name}Scheduler")(**config) for library in (effusion, diffusers))
    begin((ours, peers), run)
    return ours, peers, run


def begin(pair: tuple[Any, Any], run: dict[str, Any]) -> None:
    for scheduler in pair:
        scheduler.set_timesteps(**run.get("set", {"num_inference_steps": 8}))
        if "begin" in run:
            scheduler.set_begin_index(run["begin"])


def close(ours: torch.Tensor, peers: torch.Tensor, tolerance: float) -> None:
    assert ours.dtype == peers.dtype
    assert ours.shape == peers.shape
    assert torch.isfinite(peers).all(), "the peer's numbers say nothing here"
    error = ((ours - peers).abs().max() / peers.abs().max().clamp(min=1e-30)).item()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize(("name", "config"), ALL, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ALL)])
def test_every_step(name: str, config: dict[str, Any]) -> None:
    ours, peers, run = both(name, config)
    close(ours.timesteps.double(), peers.timesteps.double(), 1e-5)
    if hasattr(peers, "sigmas"):
        close(ours.sigmas, peers.sigmas, 1e-6)
    scale = float(getattr(peers, "init_noise_sigma", 1.0))
    assert float(ours.init_noise_sigma) == pytest.approx(scale, rel=1e-6)
    follow(ours, peers, run, torch.float32, scale, 1e-5)
    begin((ours, peers), run)  # a second run of the same objects
    follow(ours, peers, run, torch.float64, scale, 1e-10 if name in EXACT else 1e-5)


def follow(ours: Any, peers: Any, run: dict[str, Any], dtype: torch.dtype, scale: float, tolerance: float) -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype) * scale
    keys = inspect.signature(peers.step).parameters
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    arguments = [dict(run.get("step", {})) | ({"generator": g} if "generator" in keys else {}) for g in generators]
    times = zip(ours.timesteps[run.get("begin", 0) :], peers.timesteps[run.get("begin", 0) :], strict=True)
    for call, (t, peer_t) in enumerate(times):
        inputs = x, x
        if hasattr(peers, "scale_model_input"):
            inputs = ours.scale_model_input(x, t), peers.scale_model_input(x, peer_t)
            close(*inputs, 1e-6)
        output = model(inputs[1], call)
        if run.get("channels") == 2:
            output = torch.cat([output, model(inputs[1], call + 5).abs()], dim=1)
        mine, theirs = ours.step(output, t, x, **arguments[0]), peers.step(output, peer_t, x, **arguments[1])
        assert list(mine.keys()) == list(theirs.keys())
        for key in theirs:
            close(mine[key], theirs[key], tolerance)
        x = theirs.prev_sample


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "linear"}, {"timestep_spacing": "trailing"},
                                    V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cogvideox_dpm(config: dict[str, Any], dtype: torch.dtype) -> None:
    ours, peers, _ = both("CogVideoXDPM", config)
    x = torch.randn(1, 3, 4, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    old, back = None, None
    for call, t in enumerate(peers.timesteps):
        output = model(x, call)
        mine, theirs = (
            s.step(output, old, t, back, x, generator=g, return_dict=False)
            for s, g in zip((ours, peers), generators, strict=True)
        )
        exact = 1e-10 if dtype == torch.float64 and config.get("beta_schedule") != "linear" else 1e-5
        close(mine[0], theirs[0], exact)
        close(mine[1], theirs[1], exact)
        (x, old), back = theirs, t


@pytest.mark.parametrize("config", [{}, {"snr": 0.3}, {"sigma_max": 50.0}, {"sampling_eps": 1e-3}])
def test_score_sde_ve(config: dict[str, Any]) -> None:
    ours, peers = effusion.ScoreSdeVeScheduler(**config), diffusers.ScoreSdeVeScheduler(**config)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 50
    for s in (ours, peers):
        s.set_timesteps(6)
        s.set_sigmas(6)
    close(ours.sigmas, peers.sigmas, 1e-6)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    for call, t in enumerate(peers.timesteps):
        output = model(x, call) / 100
        pair = list(zip((ours, peers), generators, strict=True))
        corrected = [s.step_correct(output, x, generator=g).prev_sample for s, g in pair]
        close(*corrected, 1e-5)
        mine, theirs = (s.step_pred(output, t, corrected[1], generator=g) for s, g in pair)
        close(mine.prev_sample, theirs.prev_sample, 1e-5)
        close(mine.prev_sample_mean, theirs.prev_sample_mean, 1e-5)
        x = theirs.prev_sample


@pytest.mark.parametrize("config", [{}, {"alpha_cum_start": 0.99, "gamma_cum_end": 0.9}, {"num_train_timesteps": 30},
                                    {"num_train_timesteps": 10, "gamma_cum_end": 0.99}])  # fmt: skip
def test_vq_diffusion(config: dict[str, Any]) -> None:
    ours = effusion.VQDiffusionScheduler(num_vec_classes=9, **config)
    peers = diffusers.VQDiffusionScheduler(num_vec_classes=9, **config)
    for s in (ours, peers):
        s.set_timesteps(10)
    x = torch.full((2, 16), 8)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    for call, t in enumerate(peers.timesteps):
        log_p = torch.log_softmax(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(call)), dim=1)
        if t > 0:
            close(ours.q_posterior(log_p, x, int(t)), peers.q_posterior(log_p, x, t), 1e-5)
        mine, theirs = (s.step(log_p, t, x, g).prev_sample for s, g in zip((ours, peers), generators, strict=True))
        assert torch.equal(mine, theirs)
        x = theirs


@pytest.mark.parametrize("name", ["DDPMParallel", "DDIMParallel"])
@pytest.mark.parametrize("config", [{}, V, {"clip_sample": False}, {"thresholding": True}])
def test_parallel_steps(name: str, config: dict[str, Any]) -> None:
    ours, peers, _ = both(name, config)
    x, t = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)), ours.timesteps
    close(ours.batch_step_no_noise(model(x, 1), t, x), peers.batch_step_no_noise(model(x, 1), t, x), 1e-5)


def public_classes() -> list[str]:
    names = effusion.core.registry.names_under("effusion.schedulers")
    return sorted(n for n in names if n.endswith("Scheduler"))


@pytest.mark.parametrize("name", public_classes())
def test_signatures_and_config(name: str) -> None:
    """The same arguments and defaults, the same configuration, and the same compatible classes."""
    ours, peers = getattr(effusion, name), getattr(diffusers, name)
    arguments: dict[str, Any] = {"num_vec_classes": 5} if name == "VQDiffusionScheduler" else {}
    if name.startswith(SLOW):
        arguments = {"num_train_timesteps": 100}

    def names(function: Any) -> dict[str, Any]:
        return {n: p.default for n, p in inspect.signature(inspect.unwrap(function)).parameters.items()}

    assert names(ours.__init__) == names(peers.__init__)
    for method in ("step", "set_timesteps", "add_noise", "scale_noise", "get_velocity", "step_pred", "step_correct"):
        if method in vars(peers) or any(method in vars(c) for c in peers.__mro__):
            own, theirs = names(getattr(ours, method)), names(getattr(peers, method))
            assert set(theirs) - {"args", "kwargs"} <= set(own), method
    config, theirs = dict(ours(**arguments).config), dict(peers(**arguments).config)
    assert {k: v for k, v in config.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}
    compatible = {c.__name__ for c in ours(**arguments).compatibles}
    assert compatible == {c.__name__ for c in peers(**arguments).compatibles}
    assert ours.order == getattr(peers, "order", 1)
    assert len(ours(**arguments)) == getattr(peers(**arguments).config, "num_train_timesteps", 0) or name.startswith(
        "Score"
    )


@pytest.mark.parametrize("source", diffusers.schedulers.KarrasDiffusionSchedulers.__members__)
@pytest.mark.parametrize(
    "target", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_from_config_between_compatible_classes(source: str, target: str) -> None:
    def converted(library: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        first = getattr(library, source)(num_train_timesteps=100)
        second = getattr(library, target).from_config(first.config)
        back = getattr(library, source).from_config(second.config)
        return tuple({k: v for k, v in s.config.items() if k[0] != "_"} for s in (second, back))

    assert converted(effusion) == converted(diffusers)


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "HeunDiscrete",
                                  "DEISMultistep", "SASolver", "UnCLIP", "EDMEuler", "CogVideoXDDIM", "TCD", "FlowMatchEulerDiscrete"])  # fmt: skip
def test_add_noise(name: str) -> None:
    ours, peers, _ = both(name, {})
    x, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    t = peers.timesteps[[1, 4, 6]]
    method = "scale_noise" if name.startswith("Flow") else "add_noise"
    arguments = (x, t, noise) if name.startswith("Flow") else (x, noise, t)
    close(getattr(ours, method)(*arguments), getattr(peers, method)(*arguments), 1e-6)
    if hasattr(peers, "get_velocity"):
        close(ours.get_velocity(x, noise, t), peers.get_velocity(x, noise, t), 1e-6)
    if hasattr(peers, "set_begin_index"):
        for s in (ours, peers):
            s.set_begin_index(2)
        close(getattr(ours, method)(*arguments), getattr(peers, method)(*arguments), 1e-6)


# methods whose parameters are others than the peer's, by class ("*" is all), and why
ODD: dict[tuple[str, str], str] = {
    ("*", "scale_model_input"): "one signature for all, (sample, timestep=None); some of the peer's take *args",
    ("FlowMatchHeunDiscreteScheduler", "scale_noise"): "`noise` may be left out, as with the Euler scheduler",
}
# public methods of the peer's that are not here, and why
_STEPS = "a step is a row of coefficients here; there are no such intermediate values"
LACKING: dict[str, str] = {
    "push_to_hub": "of another base class",
    "get_mult": _STEPS,
    "get_variables": _STEPS,
    "get_coefficients_exponential_negative": _STEPS,
    "get_coefficients_exponential_positive": _STEPS,
    "get_coefficients_fn": _STEPS,
    "lagrange_polynomial_coefficient": _STEPS,
    "apply_cumulative_transitions": _STEPS,
    "log_Q_t_transitioning_to_known_class": _STEPS,
}


def methods(cls: Any) -> list[str]:
    """The names of the functions that a class and its bases define, without those of Python's own."""
    found = {n for c in cls.__mro__ for n, v in vars(c).items() if inspect.isfunction(v) or isinstance(v, classmethod)}
    return sorted(n for n in found if not n.startswith("_") or n == "_init_step_index")


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(inspect.unwrap(function)).parameters.values()  # decorators show `cls` of some
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", "cls")]


@pytest.mark.parametrize("name", public_classes())
def test_methods_have_the_peers_parameters(name: str) -> None:
    """Every public method of the peer's is there with the same parameters in the same order and the same defaults."""
    ours, peers = getattr(effusion, name), getattr(diffusers, name)
    lacking, different = [], []
    for method in methods(peers):
        if not hasattr(ours, method):
            lacking.append(method)
        elif parameters(getattr(ours, method)) != parameters(getattr(peers, method)):
            different.append((name, method))
    assert [m for m in lacking if m not in LACKING] == []
    known = {(c, m) for c, m in ODD if c in (name, "*")}
    assert [d for d in different if d not in known and ("*", d[1]) not in known] == []


# -- parts of a step under the ecosystem's names -------------------------------------------------------

X = torch.randn(5, 1, 2, 4, 4, generator=torch.Generator().manual_seed(4))


def at(index: int, name: str, **config: Any) -> tuple[Any, Any]:
    """Both schedulers in the middle of a run, with the same model outputs in their memory."""
    pair = both(name, config)[:2]
    for scheduler in pair:
        scheduler.set_timesteps(8)
        scheduler._init_step_index(scheduler.timesteps[index])
        scheduler.model_outputs = [X[2], X[3], X[4]][-len(scheduler.model_outputs) :]
    assert pair[0].step_index == pair[1].step_index == index
    pair[1].timestep_list = list(pair[1].timesteps[:3])
    return pair


UPDATES: list[tuple[str, dict[str, Any], str, tuple[Any, ...], dict[str, Any]]] = [
    ("DPMSolverMultistep", SD, "dpm_solver_first_order_update", (X[0],), {}),
    ("DPMSolverMultistep", {}, "multistep_dpm_solver_second_order_update", ([X[0], X[2]],), {}),
    ("DPMSolverMultistep", {"solver_type": "heun"}, "multistep_dpm_solver_second_order_update", ([X[0], X[2]],), {}),
    ("DPMSolverMultistep", {"solver_order": 3}, "multistep_dpm_solver_third_order_update", ([X[0], X[2], X[3]],), {}),
    ("DPMSolverMultistep", SDE, "multistep_dpm_solver_second_order_update", ([X[0], X[2]],), {"noise": X[3]}),
    ("DPMSolverMultistep", SDE, "dpm_solver_first_order_update", (X[0],), {"noise": X[3]}),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver"} | NOISE, "dpm_solver_first_order_update", (X[0],), {}),
    ("DPMSolverMultistepInverse", {}, "dpm_solver_first_order_update", (X[0],), {}),
    ("DPMSolverSinglestep", {}, "dpm_solver_first_order_update", (X[0],), {}),
    ("DPMSolverSinglestep", {}, "singlestep_dpm_solver_second_order_update", ([X[0], X[2]],), {}),
    ("DPMSolverSinglestep", {"solver_order": 3}, "singlestep_dpm_solver_update", ([X[0], X[2], X[3]],), {"order": 3}),
    ("DEISMultistep", {}, "deis_first_order_update", (X[0],), {}),
    ("DEISMultistep", {}, "multistep_deis_second_order_update", ([X[0], X[2]],), {}),
    ("DEISMultistep", {"solver_order": 3}, "multistep_deis_third_order_update", ([X[0], X[2], X[3]],), {}),
    ("UniPCMultistep", {}, "multistep_uni_p_bh_update", (X[0],), {"order": 2}),
    ("UniPCMultistep", {"solver_order": 3}, "multistep_uni_p_bh_update", (X[0],), {"order": 3}),
    ("UniPCMultistep", {}, "multistep_uni_c_bh_update", (X[0],), {"order": 2, "this_sample": X[2]}),
    ("SASolver", {}, "stochastic_adams_bashforth_update", (X[0],), {"noise": X[3], "order": 2, "tau": 0.5}),
    ("SASolver", {}, "stochastic_adams_moulton_update", (X[0],),
     {"last_noise": X[3], "this_sample": X[2], "order": 2, "tau": 0.5}),
    ("EDMDPMSolverMultistep", {}, "dpm_solver_first_order_update", (X[0],), {}),
    ("EDMDPMSolverMultistep", {}, "multistep_dpm_solver_second_order_update", ([X[0], X[2]],), {}),
    ("EDMDPMSolverMultistep", {"solver_order": 3}, "multistep_dpm_solver_third_order_update", ([X[0], X[2], X[3]],), {}),
    ("CosineDPMSolverMultistep", {}, "dpm_solver_first_order_update", (X[0],), {"noise": X[3]}),
    ("CosineDPMSolverMultistep", {}, "multistep_dpm_solver_second_order_update", ([X[0], X[2]],), {"noise": X[3]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "method", "given", "named"), UPDATES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_updates(name: str, config: dict[str, Any], method: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, peers = at(3, name, **config)
    which = "last_sample" if method in ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update") else "sample"
    named = {**named, which: X[1]}
    theirs = {k: torch.tensor(v) if k == "tau" else v for k, v in named.items()}
    close(getattr(ours, method)(*given, **named), getattr(peers, method)(*given, **theirs), 1e-5)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver"]
)
def test_model_outputs_are_converted_by_name_and_by_place(name: str) -> None:
    ours, peers = at(3, name)
    expected = peers.convert_model_output(X[0], sample=X[1])
    close(ours.convert_model_output(X[0], sample=X[1]), expected, 1e-5)
    close(ours.convert_model_output(X[0], ours.timesteps[3], X[1]), expected, 1e-5)
    with pytest.raises(ValueError, match="`sample` is missing"):
        ours.convert_model_output(X[0])


def test_updates_that_cannot_be() -> None:
    ours = effusion.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    ours.set_timesteps(8)
    with pytest.raises(ValueError, match="no step is under way"):
        ours.dpm_solver_first_order_update(X[0], sample=X[1])
    ours._init_step_index(ours.timesteps[3])
    with pytest.raises(ValueError, match="`noise` is missing"):
        ours.dpm_solver_first_order_update(X[0], sample=X[1])
    with pytest.raises(ValueError, match="1 model outputs"):
        ours.multistep_dpm_solver_second_order_update([X[0]], sample=X[1], noise=X[2])
    unipc = effusion.UniPCMultistepScheduler()
    unipc.set_timesteps(8)
    unipc._init_step_index(unipc.timesteps[3])
    with pytest.raises(ValueError, match="`order` is missing"):
        unipc.multistep_uni_p_bh_update(X[0], sample=X[1])


def test_ddims_variance_is_a_tensor() -> None:
    ours, peers = effusion.DDIMScheduler(), diffusers.DDIMScheduler()
    a, b = ours._get_variance(500, 480), peers._get_variance(500, 480)
    assert isinstance(a, torch.Tensor) and a.dtype == b.dtype
    close(a, b, 1e-7)
    ours, peers, _ = both("DDIMParallel", {})
    for scheduler in (ours, peers):
        scheduler.set_timesteps(10)
    close(ours._get_variance(500), peers._get_variance(500), 1e-7)


@pytest.mark.parametrize("seed", [3, [1, 2]])
def test_brownian_noise(seed: Any) -> None:
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler as Peer
    from effusion.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    x = torch.zeros(2, 3)
    for transform in ({}, {"transform": lambda s: s.log()}):
        ours, peers = (c(x, 0.1, 10.0, seed, **transform) for c in (BrownianTreeNoiseSampler, Peer))
        for ends in ((8.0, 4.0), (4.0, 2.0), (2.0, 3.0)):
            close(ours(*ends), peers(*ends), 1e-6)
