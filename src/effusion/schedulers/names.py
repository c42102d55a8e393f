"""Samplers by the names that people know: those of A1111 and ComfyUI, and our classes.

A name is a sampler, optionally followed by a schedule: ``"DPM++ 2M SDE Karras"``, ``"dpmpp_2m_sde karras"``,
``"Euler a"``, ``"UniPCMultistepScheduler"``. Case, spaces, ``_`` and ``-`` do not matter.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..core import registry
from .base import SchedulerMixin

MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC = "UniPCMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}


class Sampler(NamedTuple):
    """What a name of another program is here; without a class, ``nearest`` is offered instead."""

    a1111: str
    comfy: tuple[str, ...]
    scheduler: str | None
    options: Mapping[str, Any] = {}
    nearest: str = ""
    flow: str | None = None  # the class for flow-matching models


SAMPLERS = (
    Sampler("Euler", ("euler",), "EulerDiscreteScheduler", flow="FlowMatchEulerDiscreteScheduler"),
    Sampler("Euler a", ("euler_ancestral",), "EulerAncestralDiscreteScheduler"),
    Sampler("Heun", ("heun",), "HeunDiscreteScheduler", flow="FlowMatchHeunDiscreteScheduler"),
    Sampler("LMS", ("lms",), "LMSDiscreteScheduler"),
    Sampler("DPM2", ("dpm_2",), "KDPM2DiscreteScheduler"),
    Sampler("DPM2 a", ("dpm_2_ancestral",), "KDPM2AncestralDiscreteScheduler"),
    Sampler("DPM++ 2M", ("dpmpp_2m",), MULTISTEP, flow=MULTISTEP),
    Sampler("DPM++ 2M SDE", ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu"), MULTISTEP, SDE, flow=MULTISTEP),
    Sampler("DPM++ 2M SDE Heun", ("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"), MULTISTEP,
            {**SDE, "solver_type": "heun"}, flow=MULTISTEP),
    Sampler("DPM++ 3M SDE", ("dpmpp_3m_sde", "dpmpp_3m_sde_gpu"), MULTISTEP,
            {**SDE, "solver_order": 3}, flow=MULTISTEP),
    Sampler("DPM++ 3M", (), MULTISTEP, {"solver_order": 3}, flow=MULTISTEP),
    Sampler("DPM++ 2S", (), SINGLESTEP, {"lower_order_final": True}, flow=SINGLESTEP),
    Sampler("DPM++ SDE", ("dpmpp_sde", "dpmpp_sde_gpu"), "DPMSolverSDEScheduler"),
    Sampler("DDPM", ("ddpm",), "DDPMScheduler"),
    Sampler("DDIM", ("ddim",), "DDIMScheduler"),
    Sampler("PLMS", (), "PNDMScheduler", {"skip_prk_steps": True}),
    Sampler("UniPC", ("uni_pc",), UNIPC, {"solver_type": "bh1"}, flow=UNIPC),
    Sampler("UniPC bh2", ("uni_pc_bh2",), UNIPC, flow=UNIPC),
    Sampler("DEIS", ("deis",), "DEISMultistepScheduler", flow="DEISMultistepScheduler"),
    Sampler("SA-Solver", ("sa_solver",), "SASolverScheduler", flow="SASolverScheduler"),
    Sampler("LCM", ("lcm",), "LCMScheduler", flow="FlowMatchLCMScheduler"),
    Sampler("TCD", ("tcd",), "TCDScheduler"),
    Sampler("iPNDM", ("ipndm",), "IPNDMScheduler"),
    Sampler("DPM++ 2S a", ("dpmpp_2s_ancestral",), None, nearest="DPM++ SDE"),
    Sampler("DPM fast", ("dpm_fast",), None, nearest="DPM++ 2S"),
    Sampler("DPM adaptive", ("dpm_adaptive",), None, nearest="DPM++ 3M"),
    Sampler("Restart", (), None, nearest="Heun"),
    Sampler("HeunPP2", ("heunpp2",), None, nearest="Heun"),
    Sampler("iPNDM v", ("ipndm_v",), None, nearest="iPNDM"),
    Sampler("SA-Solver PECE", ("sa_solver_pece",), None, nearest="SA-Solver"),
    Sampler("Res multistep", ("res_multistep", "res_multistep_cfg_pp"), None, nearest="DPM++ 2M"),
    Sampler("Res multistep a", ("res_multistep_ancestral",), None, nearest="DPM++ 2M SDE"),
    Sampler("Gradient estimation", ("gradient_estimation",), None, nearest="DPM++ 2M"),
    Sampler("ER SDE", ("er_sde",), None, nearest="DPM++ 3M SDE"),
    Sampler("SEEDS 2", ("seeds_2",), None, nearest="DPM++ SDE"),
    Sampler("SEEDS 3", ("seeds_3",), None, nearest="DPM++ 3M SDE"),
    Sampler("Euler CFG++", ("euler_cfg_pp",), None, nearest="Euler"),
    Sampler("Euler a CFG++", ("euler_ancestral_cfg_pp",), None, nearest="Euler a"),
    Sampler("DPM++ 2M CFG++", ("dpmpp_2m_cfg_pp",), None, nearest="DPM++ 2M"),
)  # fmt: skip


class Spacing(NamedTuple):
    """What a schedule's name of another program is here."""

    a1111: str
    comfy: tuple[str, ...]
    options: Mapping[str, Any] | None
    nearest: str = ""


SPACINGS = (
    Spacing("Normal", ("normal",), {"timestep_spacing": "linspace"}),
    Spacing("Simple", ("simple",), {"timestep_spacing": "trailing"}),
    Spacing("SGM Uniform", ("sgm_uniform",), {"timestep_spacing": "trailing"}),
    Spacing("DDIM Uniform", ("ddim_uniform",), {"timestep_spacing": "leading", "steps_offset": 1}),
    Spacing("Karras", ("karras",), {"use_karras_sigmas": True}),
    Spacing("Exponential", ("exponential",), {"use_exponential_sigmas": True}),
    Spacing("Beta", ("beta",), {"use_beta_sigmas": True}),
    Spacing("Lu", (), {"use_lu_lambdas": True}),
    Spacing("Polyexponential", (), None, nearest="Exponential"),
    Spacing("KL Optimal", ("kl_optimal",), None, nearest="Karras"),
    Spacing("Linear quadratic", ("linear_quadratic",), None, nearest="Normal"),
    Spacing("Align Your Steps", (), None, nearest="Karras"),
)


def plain(name: str) -> str:
    """A name without what people write differently: case, spaces, punctuation; ``DPM++`` is ``dpmpp``."""
    return re.sub(r"[\s_\-./()]+", "", name.lower().replace("++", "pp"))


def _index(rows: Any) -> dict[str, Any]:
    return {plain(name): row for row in rows for name in (row.a1111, *row.comfy)}


_SAMPLERS, _SPACINGS = _index(SAMPLERS), _index(SPACINGS)


def known_names() -> list[str]:
    """The A1111 names that there is a class for, in the order of the table."""
    return [row.a1111 for row in SAMPLERS if row.scheduler]


def lookup(name: str) -> tuple[str, dict[str, Any]]:
    """The class and its options that a name means.

    Raises:
        ValueError: nothing has this name, or nothing here does what it means; the message offers the nearest.
    """
    wanted = plain(name)
    for size in range(len(wanted), 0, -1):
        sampler, rest = _SAMPLERS.get(wanted[:size]), wanted[size:]
        spacing = _SPACINGS.get(rest)
        if sampler is not None and (not rest or spacing is not None):
            return _settings(name, sampler, spacing)
    classes = {plain(c): c for c in registry.names_under("effusion.schedulers") if c.endswith("Scheduler")}
    for class_name in (
        classes.get(wanted),
        classes.get(wanted + "scheduler"),
        classes.get(wanted + "discretescheduler"),
    ):
        if class_name:
            return class_name, {}
    offered = {**{plain(n): n for n in known_names()}, **classes}
    close = difflib.get_close_matches(wanted, offered, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(offered[c]) for c in close)}? " if close else ""
    raise ValueError(f"no sampler is called {name!r}; {hint}`effusion samplers` lists them all")


def _settings(name: str, sampler: Sampler, spacing: Spacing | None) -> tuple[str, dict[str, Any]]:
    if sampler.scheduler is None:
        raise ValueError(f"{name!r}: Effusion has no {sampler.a1111} sampler; the nearest is {sampler.nearest!r}")
    if spacing is not None and spacing.options is None:
        raise ValueError(f"{name!r}: Effusion has no {spacing.a1111} schedule; the nearest is {spacing.nearest!r}")
    options = {} if spacing is None or spacing.options is None else dict(spacing.options)
    unknown = sorted(set(options) - _class(sampler.scheduler)._init_names())
    if spacing is not None and unknown:
        raise ValueError(
            f"{name!r}: {sampler.scheduler} has no option {', '.join(unknown)} for the {spacing.a1111} schedule; "
            f"take {sampler.a1111!r} alone, or a sampler such as 'DPM++ 2M {spacing.a1111}'"
        )
    return sampler.scheduler, {**sampler.options, **options}


def _class(name: str) -> type[SchedulerMixin]:
    found: type[SchedulerMixin] = registry.find_class("diffusers", name)
    return found


def by_name(name: str, config: Mapping[str, Any] | None = None, **options: Any) -> SchedulerMixin:
    """The scheduler that people call ``name``, for the model that ``config`` was made for.

    Args:
        name: a sampler of A1111 or ComfyUI, optionally with a schedule, or one of our classes.
        config: the configuration of the model's own scheduler (``pipe.scheduler.config``); its noise schedule
            and prediction type are kept. A flow-matching one selects the flow-matching form of the sampler.
        options: replace what the name and ``config`` say.

    Raises:
        ValueError: no such name, nothing equivalent, or nothing that the model can be sampled with.

    Example:
        >>> pipe.scheduler = effusion.schedulers.by_name("DPM++ 2M SDE Karras", pipe.scheduler.config)
    """
    class_name, settings = lookup(name)
    if config is None:
        return _class(class_name)(**{**settings, **options})
    if _is_flow(config):
        class_name, settings = _for_flow(name, class_name, settings, config)
        config = {k: v for k, v in config.items() if k in _class(class_name)._init_names()}
    # what the old scheduler's own sampling options were is no business of the new one
    reset = {
        k for k in _class(class_name)._init_names() if k.startswith("use_") and k.endswith(("_sigmas", "_lambdas"))
    }
    reset |= {"algorithm_type", "solver_type", "solver_order", "lower_order_final", "final_sigmas_type"}
    kept = {k: v for k, v in config.items() if k not in reset or k == "use_flow_sigmas"}
    made = _class(class_name).from_config(kept, **{**settings, **options})
    assert isinstance(made, SchedulerMixin)
    return made


def _is_flow(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_flow_sigmas")) or ("shift" in config and "beta_schedule" not in config)


def _for_flow(
    name: str, class_name: str, settings: dict[str, Any], config: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The flow-matching form of a sampler: its own class, or flow levels in an exponential integrator."""
    if class_name.startswith("FlowMatch"):
        return class_name, settings
    row = next((r for r in SAMPLERS if r.scheduler == class_name and dict(r.options).items() <= settings.items()), None)
    if row is None or row.flow is None:
        able = ", ".join(repr(r.a1111) for r in SAMPLERS if r.flow)
        raise ValueError(f"{name!r} can't sample a flow-matching model; these can: {able}")
    settings = {k: v for k, v in settings.items() if k in _class(row.flow)._init_names()}
    if not row.flow.startswith("FlowMatch"):
        clash = [k for k in settings if k.startswith("use_")]
        if clash and row.flow != UNIPC:
            raise ValueError(
                f"{name!r}: {', '.join(clash)} and flow-matching levels contradict each other in {row.flow}"
            )
        shift = config.get("flow_shift", config.get("shift", 1.0))
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return row.flow, settings
