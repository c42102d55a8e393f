"""Gu et al. (2022), "Vector Quantized Diffusion Model for Text-to-Image Synthesis": discrete diffusion with a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from .base import Device, SchedulerMixin
from .noise import Array

TINY = 1e-30  # stands for zero under a logarithm


@dataclass
class VQDiffusionSchedulerOutput(BaseOutput):
    """``prev_sample``: the class of each latent pixel, ``(B, L)`` integers."""

    prev_sample: Tensor


def _from_cumulative(products: Array) -> Array:
    """The factors of cumulative products that begin with 1: ``(T + 1,) -> (T,)``."""
    return np.asarray(products[1:] / products[:-1])


class VQDiffusionScheduler(SchedulerMixin):
    """Each step a class stays (α), becomes any other class (β) or the mask (γ); eq. 7 to 11 run backwards."""

    log_cumprod_at: Tensor
    log_cumprod_bt: Tensor
    log_cumprod_ct: Tensor
    log_at: Tensor
    log_bt: Tensor
    log_ct: Tensor

    @register_to_config
    def __init__(
        self, num_vec_classes: int, num_train_timesteps: int = 100, alpha_cum_start: float = 0.99999,
        alpha_cum_end: float = 0.000009, gamma_cum_start: float = 0.000009, gamma_cum_end: float = 0.99999,
    ) -> None:  # fmt: skip
        self.num_embed = num_vec_classes
        self.mask_class = num_vec_classes - 1
        ramp = np.arange(num_train_timesteps) / (num_train_timesteps - 1)
        att = np.append(1.0, ramp * (alpha_cum_end - alpha_cum_start) + alpha_cum_start)
        ctt = np.append(0.0, ramp * (gamma_cum_end - gamma_cum_start) + gamma_cum_start)
        at, ct = _from_cumulative(att), 1 - _from_cumulative(1 - ctt)
        att, ctt = np.append(att[1:], 1.0), np.append(ctt[1:], 0.0)
        bt, btt = (1 - at - ct) / self.mask_class, (1 - att - ctt) / self.mask_class
        with np.errstate(divide="ignore"):
            tables = {"at": at, "bt": bt, "ct": ct, "cumprod_at": att, "cumprod_bt": btt, "cumprod_ct": ctt}
            for name, table in tables.items():
                setattr(self, f"log_{name}", torch.from_numpy(table).log().float())
        self.num_inference_steps = None
        self._begin(np.arange(num_train_timesteps)[::-1], None, None, torch.int64)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run over the last ``num_inference_steps`` timesteps."""
        if not 1 <= num_inference_steps <= len(self):
            raise ValueError(f"num_inference_steps={num_inference_steps}: choose 1 to {len(self)}")
        self.num_inference_steps = num_inference_steps
        self._begin(np.arange(num_inference_steps)[::-1], None, device, torch.int64)
        for name in ("at", "bt", "ct", "cumprod_at", "cumprod_bt", "cumprod_ct"):
            setattr(self, f"log_{name}", getattr(self, f"log_{name}").to(device))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> VQDiffusionSchedulerOutput | tuple[Tensor]:  # fmt: skip
        """Draw the classes of the step before.

        Args:
            model_output: log-probabilities of the unmasked classes, ``(B, K - 1, L)``.
            sample: the classes now, ``(B, L)``.
        """
        expected = (sample.shape[0], self.num_embed - 1, sample.shape[-1])
        if tuple(model_output.shape) != expected:
            raise ValueError(f"`model_output` has shape {tuple(model_output.shape)}; it must be {expected}")
        t = int(self._time(timestep))
        logits = model_output if t == 0 else self.q_posterior(model_output, sample, t)
        uniform = torch.rand(logits.shape, device=logits.device, generator=generator)
        gumbel = -torch.log(-torch.log(uniform + TINY) + TINY)
        prev_sample = (gumbel + logits).argmax(dim=1)
        return VQDiffusionSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def q_posterior(self, log_p_x_0: Tensor, x_t: Tensor, t: int) -> Tensor:
        """Eq. 11: ``log p(x_{t-1} | x_t)``, summed over ``x_0``. ``(B, K - 1, L) -> (B, K, L)``."""
        now = torch.nn.functional.one_hot(x_t, self.num_embed).permute(0, 2, 1).float().clamp(min=TINY).log()
        q = log_p_x_0 - self._transition(now, x_t, t, cumulative=True)
        total = torch.logsumexp(q, dim=1, keepdim=True)
        before = self._diffused(q - total, t - 1)
        return before + self._transition(now, x_t, t, cumulative=False) + total

    def _transition(self, now: Tensor, x_t: Tensor, t: int, cumulative: bool) -> Tensor:
        """``log q(x_t | x)`` for each class ``x``: at the start (``cumulative``), or one step before."""
        kind = "cumprod_" if cumulative else ""
        a, b, c = (getattr(self, f"log_{kind}{name}")[t] for name in ("at", "bt", "ct"))
        known = torch.where((x_t == self.mask_class).unsqueeze(1), c, (now[:, :-1] + a).logaddexp(b))
        return known if cumulative else torch.cat([known, now[:, -1:]], dim=1)

    def _diffused(self, q: Tensor, t: int) -> Tensor:
        """Probabilities of ``x_0`` diffused to ``t``: ``(B, K - 1, L) -> (B, K, L)``."""
        masked = self.log_cumprod_ct[t].expand(q.shape[0], 1, q.shape[2])
        return torch.cat([(q + self.log_cumprod_at[t]).logaddexp(self.log_cumprod_bt[t]), masked], dim=1)
