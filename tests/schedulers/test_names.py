"""Samplers by the names of other programs, their page, and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import effusion
from effusion.cli import samplers
from effusion.schedulers import by_name
from effusion.schedulers.names import SAMPLERS, SPACINGS

from .gaussian import MU, Exact, spread

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("name", "cls", "options"), [
    ("DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("dpmpp_2m_sde karras", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("dpm++ 2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}),
    ("DPM++ 3M SDE Exponential", "DPMSolverMultistepScheduler", {"solver_order": 3, "use_exponential_sigmas": True}),
    ("Euler a", "EulerAncestralDiscreteScheduler", {}),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
    ("Euler", "EulerDiscreteScheduler", {}),
    ("euler sgm_uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPM++ SDE Karras", "DPMSolverSDEScheduler", {"use_karras_sigmas": True}),
    ("uni_pc_bh2", "UniPCMultistepScheduler", {"solver_type": "bh2"}),
    ("UniPC", "UniPCMultistepScheduler", {"solver_type": "bh1"}),
    ("DDIMScheduler", "DDIMScheduler", {}),
    ("HeunDiscrete", "HeunDiscreteScheduler", {}),
])  # fmt: skip
def test_names_people_know(name: str, cls: str, options: dict[str, Any]) -> None:
    made = by_name(name)
    assert type(made).__name__ == cls
    assert {k: made.config[k] for k in options} == options


@pytest.mark.parametrize("row", SAMPLERS, ids=lambda r: r.a1111)
def test_every_row_means_something(row: Any) -> None:
    for name in (row.a1111, *row.comfy):
        if row.scheduler:
            assert type(by_name(name)).__name__ == row.scheduler
        else:
            with pytest.raises(ValueError, match="nearest is"):
                by_name(name)
    if row.nearest:
        by_name(row.nearest)


@pytest.mark.parametrize("spacing", SPACINGS, ids=lambda s: s.a1111)
def test_every_schedule_means_something(spacing: Any) -> None:
    if spacing.options is None:
        with pytest.raises(ValueError, match="nearest is"):
            by_name(f"DPM++ 2M {spacing.a1111}")
    else:
        made = by_name(f"DPM++ 2M {spacing.a1111}")
        assert {k: made.config[k] for k in spacing.options} == dict(spacing.options)


def test_the_model_keeps_its_noise_schedule() -> None:
    own = effusion.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                 prediction_type="v_prediction", steps_offset=1)  # fmt: skip
    made: Any = by_name("DPM++ 2M Karras", own.config)
    assert torch.equal(made.betas, own.betas)
    assert made.config.prediction_type == "v_prediction"
    again: Any = by_name("DPM++ 2M SDE", made.config)
    assert again.config.use_karras_sigmas is False
    assert by_name("Euler", own.config, timestep_spacing="trailing").config.timestep_spacing == "trailing"


def test_flow_matching_models() -> None:
    own = effusion.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    assert isinstance(by_name("Heun", own), effusion.FlowMatchHeunDiscreteScheduler)
    assert by_name("Euler Karras", own).config.use_karras_sigmas
    multistep = by_name("DPM++ 2M", own)
    assert {k: multistep.config[k] for k in ("use_flow_sigmas", "prediction_type", "flow_shift")} == {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": 3.0,
    }
    with pytest.raises(ValueError, match="flow-matching model; these can: 'Euler'"):
        by_name("DDIM", own)
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        by_name("DPM++ 2M Karras", own)


@pytest.mark.parametrize(("name", "said"), [("Eulr", "did you mean 'Euler'"), ("", "no sampler"), ("zzz", "effusion samplers"),
                                            ("LCM Karras", "LCMScheduler has no option use_karras_sigmas")])  # fmt: skip
def test_names_that_mean_nothing(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        by_name(name)


def test_the_page_is_current() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "samplers.md"
    assert page.read_text() == samplers.markdown() + "\n", "run `effusion samplers --markdown > docs/samplers.md`"


def test_the_listing_has_every_name() -> None:
    text = "\n".join(samplers.listing())
    assert all(row.a1111 in text for row in SAMPLERS if row.scheduler)
    assert all(row.a1111 in text for row in SPACINGS if row.options is not None)


def test_the_picture(tmp_path: Path) -> None:
    """With the exact network of a Gaussian: errors fall with the calls, and a file is drawn."""
    pytest.importorskip("matplotlib")
    config = dict(effusion.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                         clip_sample=False).config)  # fmt: skip

    def sample(scheduler: Any, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        exact = Exact(scheduler)
        x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)
        start = exact.level(scheduler.timesteps[0], 0)
        x = start[0] * MU + spread(*start) * x
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(exact(x, t, i), t, x).prev_sample
        return x

    curves = samplers.errors(sample, config, budgets=(5, 20, 80))
    assert set(curves) == set(samplers.DETERMINISTIC)
    for name, points in curves.items():
        assert points[-1][1] < points[0][1], f"{name} comes no nearer: {points}"
        assert points[-1][1] < 0.05, f"{name} stays away: {points}"
    samplers.plot(tmp_path / "samplers.png", curves, config)
    assert (tmp_path / "samplers.png").read_bytes().startswith(b"\x89PNG")
