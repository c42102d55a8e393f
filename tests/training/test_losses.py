"""Training targets and weights, against the schedulers' own arithmetic and the peer's."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler as PeerDDPM
from diffusers.training_utils import compute_snr

from effusion.schedulers.ddpm import DDPMScheduler
from effusion.training.losses import diffusion_loss, flow_loss, levels, min_snr_weight, snr


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(6, 2, 4, 4, generator=g),
        torch.randn(6, 2, 4, 4, generator=g),
        torch.tensor([0, 1, 99, 500, 998, 999]),
    )


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_answer_costs_nothing_and_a_wrong_one_its_squared_error(kind: str, batch: tuple) -> None:
    clean, noise, t = batch
    peer = PeerDDPM(prediction_type=kind)
    answer = {"epsilon": noise, "sample": clean, "v_prediction": peer.get_velocity(clean, noise, t)}[kind]
    ours = DDPMScheduler(prediction_type=kind)
    assert diffusion_loss(answer, clean, noise, ours, t, kind) < 1e-12
    assert diffusion_loss(answer + 0.5, clean, noise, ours, t, kind).item() == pytest.approx(0.25, rel=1e-5)


def test_levels_make_the_noisy_sample_of_the_scheduler(batch: tuple) -> None:
    clean, noise, t = batch
    scheduler = DDPMScheduler()
    alpha, sigma = levels(scheduler, t, clean.dim())
    torch.testing.assert_close(alpha * clean + sigma * noise, PeerDDPM().add_noise(clean, noise, t))


def test_snr_and_its_weights(batch: tuple) -> None:
    t = batch[2]
    ratio = snr(DDPMScheduler(), t)
    torch.testing.assert_close(ratio, compute_snr(PeerDDPM(), t))
    capped = ratio.clamp(max=5.0)
    assert torch.equal(min_snr_weight("sample", ratio), capped)
    torch.testing.assert_close(min_snr_weight("epsilon", ratio), capped / ratio)
    torch.testing.assert_close(min_snr_weight("v_prediction", ratio), capped / (ratio + 1))


def test_weighted_losses_are_the_same_error_of_the_clean_sample(batch: tuple) -> None:
    """Predictions that mean the same estimate cost the same under min-SNR weights, whatever their kind."""
    clean, noise, t = batch
    t = t[1:]
    clean, noise = clean[1:], noise[1:]
    scheduler = DDPMScheduler()
    alpha, sigma = levels(scheduler, t, 4)
    noisy, guess = alpha * clean + sigma * noise, clean + 0.1
    guessed_noise = (noisy - alpha * guess) / sigma
    answers = {"sample": guess, "epsilon": guessed_noise, "v_prediction": alpha * guessed_noise - sigma * guess}
    costs = [diffusion_loss(a, clean, noise, scheduler, t, kind, "min_snr").item() for kind, a in answers.items()]
    assert costs == pytest.approx([costs[0]] * 3, rel=1e-3)


def test_flow_loss(batch: tuple) -> None:
    clean, noise, _ = batch
    assert flow_loss(noise - clean, clean, noise) == 0
    assert flow_loss(noise - clean + 2, clean, noise).item() == pytest.approx(4, rel=1e-5)


def test_unknown_names(batch: tuple) -> None:
    clean, noise, t = batch
    with pytest.raises(ValueError, match="weighting='snr'"):
        diffusion_loss(clean, clean, noise, DDPMScheduler(), t, weighting="snr")
    with pytest.raises(ValueError, match="prediction"):
        diffusion_loss(clean, clean, noise, DDPMScheduler(), t, "noise")
    with pytest.raises(ValueError, match="flow_prediction"):
        min_snr_weight("flow_prediction", torch.ones(1))
