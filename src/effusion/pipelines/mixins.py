"""What pipelines with a UNet and a VAE can switch in both."""

from __future__ import annotations

from typing import Any

from ..core import log

logger = log.get_logger(__name__)


class StableDiffusionMixin:
    """FreeU and fused projections for pipelines with the components ``unet`` and ``vae``.

    Attributes:
        fusing_unet: whether the UNet's projections are fused.
        fusing_vae: whether the VAE's are.
    """

    fusing_unet: bool = False
    fusing_vae: bool = False

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al. 2023): weaken skip features by ``s``, strengthen backbone features by ``b``, in two stages.

        Raises:
            ValueError: the pipeline has no UNet, or one that can't.
        """
        self._with_method("unet", "enable_freeu").enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        """Undo :meth:`enable_freeu`."""
        self._with_method("unet", "disable_freeu").disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Compute query, key and value with one product each, in the UNet and in the VAE.

        Raises:
            ValueError: a network that can't; nothing is fused then.
        """
        chosen = [name for name, wanted in (("unet", unet), ("vae", vae)) if wanted]
        networks = {name: self._with_method(name, "fuse_qkv_projections") for name in chosen}
        for name, network in networks.items():
            network.fuse_qkv_projections()
            setattr(self, f"fusing_{name}", True)

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Undo :meth:`fuse_qkv_projections`; networks that are not fused stay as they are, with a warning."""
        for name, wanted in (("unet", unet), ("vae", vae)):
            if not wanted:
                continue
            if not getattr(self, f"fusing_{name}"):
                logger.warning("the projections of `%s` are not fused; nothing to undo", name)
                continue
            self._with_method(name, "unfuse_qkv_projections").unfuse_qkv_projections()
            setattr(self, f"fusing_{name}", False)

    def _with_method(self, name: str, method: str) -> Any:
        network = getattr(self, name, None)
        if not hasattr(network, method):
            kind = "no such component" if network is None else f"a {type(network).__name__}"
            raise ValueError(f"`{method}` needs a `{name}` that has it; {type(self).__name__} has {kind}")
        return network
