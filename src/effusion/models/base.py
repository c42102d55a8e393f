"""The one face that networks have to loading and placement: ModelMixin."""

from __future__ import annotations

import torch
from torch import nn

from ..core.config import ConfigMixin
from ..nn.checkpointing import GradientCheckpointingMixin
from ..nn.dispatch import AttentionBackendMixin


class ModelMixin(AttentionBackendMixin, GradientCheckpointingMixin, nn.Module, ConfigMixin):
    """Base class of all networks: an ``nn.Module`` with a configuration that can be loaded and saved."""

    config_name = "config.json"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))
