"""Learning rates and the small helpers of training scripts, against the peer's."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers.optimization as peer
import diffusers.training_utils as peer_utils
import numpy as np
import pytest
import torch

from effusion import optimization as ours
from effusion import training_utils

CASES: list[dict[str, Any]] = [
    {"name": "constant"},
    {"name": "constant_with_warmup", "num_warmup_steps": 4},
    {"name": "linear", "num_warmup_steps": 3, "num_training_steps": 12},
    {"name": "cosine", "num_warmup_steps": 0, "num_training_steps": 12},
    {"name": "cosine", "num_warmup_steps": 5, "num_training_steps": 5},
    {"name": "cosine_with_restarts", "num_warmup_steps": 2, "num_training_steps": 12, "num_cycles": 3},
    {"name": "polynomial", "num_warmup_steps": 2, "num_training_steps": 10, "power": 2.0},
    {"name": "piecewise_constant", "step_rules": "1:3,0.1:6,0.01"},
]


def rates(library: Any, **case: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = library.get_scheduler(optimizer=optimizer, **case)
    found = []
    for _ in range(15):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_rates_equal_the_peers(case: dict[str, Any]) -> None:
    assert rates(ours, **case) == rates(peer, **case)


@pytest.mark.parametrize("name", [n for n in dir(peer) if n.startswith("get_")])
def test_signatures(name: str) -> None:
    a, b = (inspect.signature(getattr(library, name)).parameters for library in (ours, peer))
    assert [(p.name, p.default) for p in a.values()] == [(p.name, p.default) for p in b.values()]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"name": "nothing"}, "there are linear, cosine"),
        ({"name": "linear", "num_warmup_steps": 1}, "num_training_steps"),
        ({"name": "piecewise_constant", "step_rules": "1-3"}, "factor:step"),
        ({"name": "polynomial", "num_warmup_steps": 1, "num_training_steps": 9}, "lr_end"),
    ],
)
def test_errors(case: dict[str, Any], said: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-8)
    with pytest.raises(ValueError, match=said):
        ours.get_scheduler(optimizer=optimizer, **case)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none"])
def test_timesteps_and_weights(scheme: str) -> None:
    def drawn(library: Any) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        return library.compute_density_for_timestep_sampling(scheme, 5, 0.0, 1.0, 1.29, generator=g)

    assert torch.equal(drawn(training_utils), drawn(peer_utils))
    sigmas = torch.linspace(0.1, 0.9, 5)
    for kind in ("sigma_sqrt", "cosmap", "none"):
        a, b = (u.compute_loss_weighting_for_sd3(kind, sigmas) for u in (training_utils, peer_utils))
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="logit_mean"):
        training_utils.compute_density_for_timestep_sampling("logit_normal", 5)


def test_seeds_and_casts() -> None:
    from effusion import DDPMScheduler

    training_utils.set_seed(3)
    a = (torch.rand(1).item(), np.random.rand())  # noqa: NPY002
    peer_utils.set_seed(3)
    assert a == (torch.rand(1).item(), np.random.rand())  # noqa: NPY002
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).half()
    model[0].requires_grad_(False)
    training_utils.cast_training_params(model)
    assert (model[0].weight.dtype, model[1].weight.dtype) == (torch.float16, torch.float32)
    t = torch.tensor([[0, 10], [500, 999]])
    snr = training_utils.compute_snr(DDPMScheduler(), t)
    assert torch.allclose(snr, peer_utils.compute_snr(DDPMScheduler(), t), rtol=1e-4)
    with training_utils.offload_models(model, device="meta", offload=False):
        assert model[0].weight.device.type == "cpu"
    training_utils.free_memory()
