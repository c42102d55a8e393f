"""Blocks of UNets one at a time, with the arguments that the ecosystem's functions for it take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .unet_blocks import DOWN, MID, UP, Settings, find_block

# argument of the functions below -> field of the settings
_FIELDS = {
    "temb_channels": "temb_channels",
    "dropout": "dropout",
    "resnet_eps": "eps",
    "resnet_act_fn": "act_fn",
    "resnet_time_scale_shift": "time_scale_shift",
    "resnet_skip_time_act": "skip_time_act",
    "resnet_out_scale_factor": "output_scale_factor",
    "output_scale_factor": "output_scale_factor",
    "transformer_layers_per_block": "depth",
    "cross_attention_dim": "cross_attention_dim",
    "cross_attention_norm": "cross_attention_norm",
    "dual_cross_attention": "dual_cross_attention",
    "use_linear_projection": "use_linear_projection",
    "only_cross_attention": "only_cross_attention",
    "mid_block_only_cross_attention": "only_cross_attention",
    "upcast_attention": "upcast_attention",
    "downsample_padding": "downsample_padding",
    "downsample_type": "sampler",
    "upsample_type": "sampler",
    "resnet_groups": "groups",
    "num_attention_heads": "heads",
}


def _settings(kind: str, given: dict[str, Any]) -> Settings:
    """The settings that ``given`` arguments mean; ``None`` leaves the default."""
    if given.pop("attention_type", "default") != "default":
        raise ValueError("attention_type: there is 'default' only, gated attention is not built")
    if "CrossAttn" in kind and given.get("cross_attention_dim") is None:
        raise ValueError(f"a {kind} attends to a context: give `cross_attention_dim`")
    heads = given.get("num_attention_heads")
    head_dim = given.pop("attention_head_dim", None)
    fields = {_FIELDS[name]: value for name, value in given.items() if value is not None}
    if "groups" in fields:
        fields["attn_groups"] = fields["groups"]
    return Settings(**fields, head_dim=head_dim if head_dim is not None else heads)


def _make(
    table: dict[str, type[Any]], option: str, kind: str, place: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    block: Callable[..., nn.Module] = find_block(table, kind, option)
    return block(**place, settings=_settings(kind, given))


def get_down_block(
    down_block_type: str,
    num_layers: int,
    in_channels: int,
    out_channels: int,
    temb_channels: int,
    add_downsample: bool,
    resnet_eps: float,
    resnet_act_fn: str,
    transformer_layers_per_block: int = 1,
    num_attention_heads: int | None = None,
    resnet_groups: int | None = None,
    cross_attention_dim: int | None = None,
    downsample_padding: int | None = None,
    dual_cross_attention: bool = False,
    use_linear_projection: bool = False,
    only_cross_attention: bool = False,
    upcast_attention: bool = False,
    resnet_time_scale_shift: str = "default",
    attention_type: str = "default",
    resnet_skip_time_act: bool = False,
    resnet_out_scale_factor: float = 1.0,
    cross_attention_norm: str | None = None,
    attention_head_dim: int | None = None,
    downsample_type: str | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """A block of the encoder's side.

    Raises:
        ValueError: an unknown ``down_block_type``, or one that needs an argument that was not given.
    """
    given = dict(locals())
    place = {k: given.pop(k) for k in ("num_layers", "in_channels", "out_channels", "add_downsample")}
    return _make(DOWN, "down_block_type", given.pop("down_block_type"), place, given)


def get_mid_block(
    mid_block_type: str,
    temb_channels: int,
    in_channels: int,
    resnet_eps: float,
    resnet_act_fn: str,
    resnet_groups: int,
    output_scale_factor: float = 1.0,
    transformer_layers_per_block: int = 1,
    num_attention_heads: int | None = None,
    cross_attention_dim: int | None = None,
    dual_cross_attention: bool = False,
    use_linear_projection: bool = False,
    mid_block_only_cross_attention: bool = False,
    upcast_attention: bool = False,
    resnet_time_scale_shift: str = "default",
    attention_type: str = "default",
    resnet_skip_time_act: bool = False,
    cross_attention_norm: str | None = None,
    attention_head_dim: int | None = 1,
    dropout: float = 0.0,
) -> nn.Module | None:
    """The block in the middle; ``None`` for the type ``None``.

    Raises:
        ValueError: an unknown ``mid_block_type``, or one that needs an argument that was not given.
    """
    given = dict(locals())
    kind = given.pop("mid_block_type")
    if kind is None:
        return None
    place: dict[str, Any] = {"channels": given.pop("in_channels")}
    if kind == "UNetMidBlock2D":  # here it is one residual block
        place |= {"num_layers": 0, "add_attention": False}
    return _make(MID, "mid_block_type", kind, place, given)


def get_up_block(
    up_block_type: str,
    num_layers: int,
    in_channels: int,
    out_channels: int,
    prev_output_channel: int,
    temb_channels: int,
    add_upsample: bool,
    resnet_eps: float,
    resnet_act_fn: str,
    resolution_idx: int | None = None,
    transformer_layers_per_block: int = 1,
    num_attention_heads: int | None = None,
    resnet_groups: int | None = None,
    cross_attention_dim: int | None = None,
    dual_cross_attention: bool = False,
    use_linear_projection: bool = False,
    only_cross_attention: bool = False,
    upcast_attention: bool = False,
    resnet_time_scale_shift: str = "default",
    attention_type: str = "default",
    resnet_skip_time_act: bool = False,
    resnet_out_scale_factor: float = 1.0,
    cross_attention_norm: str | None = None,
    attention_head_dim: int | None = None,
    upsample_type: str | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """A block of the decoder's side.

    Raises:
        ValueError: an unknown ``up_block_type``, or one that needs an argument that was not given.
    """
    given = dict(locals())
    names = ("num_layers", "in_channels", "out_channels", "prev_output_channel", "add_upsample", "resolution_idx")
    place = {k: given.pop(k) for k in names}
    return _make(UP, "up_block_type", given.pop("up_block_type"), place, given)
