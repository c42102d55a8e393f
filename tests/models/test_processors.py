"""Attention processors by other people: written for the ecosystem's modules, they give the numbers of the default."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as peer_attention
from diffusers.models import embeddings as peer_embeddings
from diffusers.models.transformers import transformer_flux as peer_flux
from diffusers.models.transformers import transformer_qwenimage as peer_qwen
from diffusers.models.unets import unet_2d_blocks as peer_blocks
from effusion.models.attention import JointTransformerBlock
from effusion.models.attention_processor import Attention, SpatialNorm
from effusion.models.embeddings import FluxPosEmbed, apply_rotary_emb, get_1d_rotary_pos_embed
from effusion.models.normalization import AdaLayerNormZeroSingle
from effusion.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from effusion.models.unets import unet_2d_blocks
from torch import Tensor, nn

import effusion

from . import test_transformer_flux as flux
from . import test_transformer_qwenimage as qwen
from . import test_transformer_sd3 as sd3
from . import test_unet_2d_condition as unet
from . import transformer_checks as checks
from .parity import assert_close, assert_same_signature, pair


class MyUNetProcessor:
    """What a script has for the attention of UNets."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        temb: Any = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        residual, shape = hidden_states, hidden_states.shape
        assert attn.spatial_norm is None
        if len(shape) == 4:
            hidden_states = hidden_states.view(shape[0], shape[1], -1).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], shape[0])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k, v = (attn.head_to_batch_dim(p(context)) for p in (attn.to_k, attn.to_v))
        out = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k, attention_mask), v))
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class MyFluxProcessor:
    """What a script has for FLUX; its names are its own."""

    def __call__(self, attn: Any, x: Tensor, context: Any = None, mask: Any = None, rope: Any = None) -> Any:
        def heads(t: Tensor) -> Tensor:
            return t.view(t.shape[0], -1, attn.heads, attn.head_dim).transpose(1, 2)

        q, k, v = (heads(p(x)) for p in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if context is not None:
            qc, kc, vc = (heads(p(context)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            qc, kc = attn.norm_added_q(qc), attn.norm_added_k(kc)
            q, k, v = torch.cat([qc, q], dim=2), torch.cat([kc, k], dim=2), torch.cat([vc, v], dim=2)
        cos, sin = rope
        assert cos.shape == sin.shape == (q.shape[2], attn.head_dim)
        q, k = apply_rotary_emb(q, rope), apply_rotary_emb(k, (cos, sin))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        if context is None:
            return out
        out, context = out[:, context.shape[1] :], out[:, : context.shape[1]]
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(context)


class MyJointProcessor:
    """What a script has for Stable Diffusion 3; image tokens first."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        def heads(t: Tensor) -> Tensor:
            return t.view(t.shape[0], -1, attn.heads, attn.to_k.out_features // attn.heads).transpose(1, 2)

        q, k, v = (heads(p(hidden_states)) for p in (attn.to_q, attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            qc, kc, vc = (heads(p(encoder_hidden_states)) for p in added)
            qc = qc if attn.norm_added_q is None else attn.norm_added_q(qc)
            kc = kc if attn.norm_added_k is None else attn.norm_added_k(kc)
            q, k, v = torch.cat([q, qc], dim=2), torch.cat([k, kc], dim=2), torch.cat([v, vc], dim=2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        own = attn.to_out[1](attn.to_out[0](out[:, : hidden_states.shape[1]]))
        if encoder_hidden_states is None:
            return own
        rest = out[:, hidden_states.shape[1] :]
        return own, rest if attn.context_pre_only else attn.to_add_out(rest)


class MyQwenProcessor:
    """What a script has for Qwen-Image."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Any = None, attention_mask: Any = None, image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        assert attention_mask is None
        turns = dict(zip(("image", "text"), image_rotary_emb, strict=True))

        def heads(t: Tensor, norm: Any, of: str | None) -> Tensor:
            t = t.unflatten(-1, (attn.heads, -1))
            t = t if norm is None else norm(t)
            if of is None:
                return t
            pairs = torch.view_as_complex(t.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turns[of].unsqueeze(1)).flatten(3)

        length = encoder_hidden_states.shape[1]
        q = [heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q, "text")]
        k = [heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k, "text")]
        v = [heads(attn.add_v_proj(encoder_hidden_states), None, None)]
        q.append(heads(attn.to_q(hidden_states), attn.norm_q, "image"))
        k.append(heads(attn.to_k(hidden_states), attn.norm_k, "image"))
        v.append(heads(attn.to_v(hidden_states), None, None))
        mask = None
        if encoder_hidden_states_mask is not None:
            assert encoder_hidden_states_mask.shape == encoder_hidden_states.shape[:2]
            mask = F.pad(encoder_hidden_states_mask.bool(), (0, hidden_states.shape[1]), value=True)[:, None, None]
        q, k, v = (torch.cat(part, dim=1).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out[:, length:])), attn.to_add_out(out[:, :length])


class AsModule(nn.Module):
    """A processor that is a module with weights of its own, as adapters have."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(1))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return tuple(o * self.scale for o in out) if isinstance(out, tuple) else out * self.scale


class Subclass(FluxAttnProcessor):
    """Somebody's own step around ours."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rope = args[2] if len(args) > 2 else kwargs["image_rotary_emb"]
        assert isinstance(rope, tuple) and rope[0].shape[-1] == attn.head_dim
        return super().__call__(attn, hidden_states, *args, **kwargs)


MASKED = {**qwen.inputs(qwen.TINY, qwen.SHAPES["edit"]), "encoder_hidden_states_mask": qwen.MASK.bool()}
SD3 = {name: ("SD3Transformer2DModel", sd3.CONFIGS[name], sd3.inputs(sd3.CONFIGS[name])) for name in sd3.CONFIGS}
FLUX = ("FluxTransformer2DModel", flux.TINY, flux.inputs(flux.TINY))
QWEN = ("QwenImageTransformer2DModel", qwen.TINY, MASKED)
CASES = {
    "flux": (*FLUX, MyFluxProcessor()),
    "flux, as a module": (*FLUX, AsModule(MyFluxProcessor())),
    "flux, of the peer": (*FLUX, peer_flux.FluxAttnProcessor()),
    "flux, a subclass of ours": (*FLUX, Subclass()),
    **{f"sd3, {name}": (*case, MyJointProcessor()) for name, case in SD3.items()},
    "sd3, of the peer": (*SD3["3.5-medium"], peer_attention.JointAttnProcessor2_0()),
    "qwen": (*QWEN, MyQwenProcessor()),
    "qwen, without a mask": (*QWEN[:2], qwen.inputs(qwen.TINY, qwen.SHAPES["one"]), MyQwenProcessor()),
    "qwen, of the peer": (*QWEN, peer_qwen.QwenDoubleStreamAttnProcessor2_0()),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers(case: str) -> None:
    name, config, given, processor = CASES[case]
    _, ours = pair(name, **config)
    plain = checks.run(ours, given)
    ours.set_attn_processor(processor)
    assert all(p is processor for p in ours.attn_processors.values())
    assert_close(checks.run(ours, given), plain)
    ours.set_default_attn_processor()
    assert torch.equal(checks.run(ours, given), plain)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    "processor",
    [MyUNetProcessor(), peer_attention.AttnProcessor(), peer_attention.AttnProcessor2_0()],
    ids=lambda p: f"{type(p).__module__[:9]}-{type(p).__name__}",
)
@torch.no_grad()
def test_unets(name: str, processor: Any) -> None:
    _, ours = pair("UNet2DConditionModel", **unet.CONFIGS[name][0])
    given = unet.inputs(name)
    plain = ours(**given).sample
    ours.set_attn_processor(processor)
    assert_close(ours(**given).sample, plain)
    masked = {**given, "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4])}
    ours.set_default_attn_processor()
    plain = ours(**masked).sample
    ours.set_attn_processor(processor)
    assert_close(ours(**masked).sample, plain)


@torch.no_grad()
def test_unets_with_added_keys() -> None:
    _, ours = pair("UNet2DConditionModel", **unet.SIMPLE)
    given = unet.inputs("sd1")
    plain = ours(**given).sample
    for processor in (peer_attention.AttnAddedKVProcessor(), peer_attention.AttnAddedKVProcessor2_0()):
        ours.set_attn_processor(processor)
        assert_close(ours(**given).sample, plain)


def test_processors_of_a_new_network_are_named_as_the_peers() -> None:
    for name, config in ((FLUX[0], FLUX[1]), (QWEN[0], QWEN[1]), SD3["3.5-medium"][:2]):
        theirs, ours = pair(name, **config)
        kinds = {k: type(v).__name__ for k, v in theirs.attn_processors.items()}
        assert {k: type(v).__name__ for k, v in ours.attn_processors.items()} == kinds


def test_what_scripts_ask_modules_for() -> None:
    for name, config in ((FLUX[0], FLUX[1]), (QWEN[0], QWEN[1]), SD3["3.5-medium"][:2]):
        theirs, ours = pair(name, **config)
        for path, module in theirs.named_modules():
            if not hasattr(module, "set_processor"):
                continue
            own = ours.get_submodule(path)
            assert isinstance(own, Attention)
            for fact in ("heads", "inner_dim", "query_dim", "added_kv_proj_dim", "use_bias", "scale", "head_dim"):
                if hasattr(module, fact):
                    assert getattr(own, fact) == getattr(module, fact), fact
            assert bool(own.context_pre_only) == bool(module.context_pre_only)
            assert bool(own.pre_only) == bool(module.pre_only)


def test_a_processor_of_unets_is_refused_where_two_results_are_wanted() -> None:
    _, ours = pair(FLUX[0], **FLUX[1])
    ours.set_attn_processor(effusion.models.attention_processor.AttnProcessor2_0())
    with pytest.raises(ValueError, match="use FluxAttnProcessor"):
        checks.run(ours, FLUX[2])


def test_flux_attention_by_itself() -> None:
    assert_same_signature(FluxAttention.__init__, peer_flux.FluxAttention.__init__)
    for options in (
        {"added_kv_proj_dim": 12, "bias": True},
        {"pre_only": True},
        {"elementwise_affine": False, "pre_only": True},
    ):
        options = {"query_dim": 12, "heads": 3, "dim_head": 4, **options}
        torch.manual_seed(0)
        theirs, ours = peer_flux.FluxAttention(**options), FluxAttention(**options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x, y, ids = torch.randn(2, 5, 12), torch.randn(2, 3, 12), torch.rand(8, 1) * 9
        context = y if "added_kv_proj_dim" in options else None
        rope = FluxPosEmbed(10000, [4])(ids if context is not None else ids[:5])
        a, b = (m(x, context, image_rotary_emb=rope) for m in (ours, theirs))
        for one, two in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
            assert_close(one, two)
    with pytest.raises(ValueError, match="out_dim=7"):
        FluxAttention(12, out_dim=7)


# -- functions and parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("pos", [7, np.arange(3), torch.tensor([0.5, 4.0])], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_real": True}, {"use_real": True, "repeat_interleave_real": False}, {"freqs_dtype": torch.float64},
     {"linear_factor": 2.0, "ntk_factor": 1.5, "theta": 500.0}],
    ids=str,
)  # fmt: skip
def test_get_1d_rotary_pos_embed(pos: Any, options: dict[str, Any]) -> None:
    ours = get_1d_rotary_pos_embed(8, pos, **options)
    theirs = peer_embeddings.get_1d_rotary_pos_embed(8, pos, **options)
    for a, b in zip(
        ours if isinstance(ours, tuple) else (ours,), theirs if isinstance(theirs, tuple) else (theirs,), strict=True
    ):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-7)
    assert_same_signature(get_1d_rotary_pos_embed, peer_embeddings.get_1d_rotary_pos_embed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequence_dim", [1, 2])
@pytest.mark.parametrize("pairs", [-1, -2])
def test_apply_rotary_emb(dtype: torch.dtype, sequence_dim: int, pairs: int) -> None:
    x = torch.randn(2, 5, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rope = peer_embeddings.get_1d_rotary_pos_embed(8, 5, use_real=True, repeat_interleave_real=pairs == -1)
    options = {"use_real_unbind_dim": pairs, "sequence_dim": sequence_dim}
    assert torch.equal(apply_rotary_emb(x, rope, **options), peer_embeddings.apply_rotary_emb(x, rope, **options))
    turns = peer_embeddings.get_1d_rotary_pos_embed(8, 5)[None]
    theirs = peer_embeddings.apply_rotary_emb(x, turns, use_real=False)
    assert torch.equal(apply_rotary_emb(x, turns, use_real=False), theirs)
    with pytest.raises(ValueError, match="sequence_dim=3"):
        apply_rotary_emb(x, rope, sequence_dim=3)
    with pytest.raises(ValueError, match="use_real_unbind_dim=0"):
        apply_rotary_emb(x, rope, use_real_unbind_dim=0)


def test_positions_of_flux() -> None:
    ids = torch.randint(0, 9, (6, 3), generator=torch.Generator().manual_seed(0)).float()
    ours, theirs = FluxPosEmbed(10000, [4, 4, 8])(ids), peer_flux.FluxPosEmbed(10000, [4, 4, 8])(ids)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


def test_norms() -> None:
    from diffusers.models import normalization

    torch.manual_seed(0)
    theirs, ours = normalization.AdaLayerNormZeroSingle(8), AdaLayerNormZeroSingle(8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, emb = torch.randn(2, 5, 8), torch.randn(2, 8)
    for a, b in zip(ours(x, emb=emb), theirs(x, emb=emb), strict=True):
        assert_close(a, b)
    theirs, ours = peer_attention.SpatialNorm(32, 4), SpatialNorm(32, 4)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    f, zq = torch.randn(2, 32, 6, 6), torch.randn(2, 4, 3, 3)
    assert_close(ours(f, zq), theirs(f, zq))


def test_activations_and_the_joint_block() -> None:
    from diffusers.models.activations import get_activation as peer
    from effusion.models.activations import get_activation

    x = torch.linspace(-3, 3, 9)
    for name in ("swish", "silu", "mish", "gelu", "relu", "SiLU"):
        assert torch.equal(get_activation(name)(x), peer(name)(x))
    with pytest.raises(ValueError, match="unknown"):
        get_activation("nothing")
    assert JointTransformerBlock is type(effusion.SD3Transformer2DModel(**sd3.TINY).transformer_blocks[0])
    theirs = diffusers.models.attention.JointTransformerBlock(16, 2, 8)
    ours = JointTransformerBlock(16, 2, 8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given = (torch.randn(1, 4, 16), torch.randn(1, 3, 16), torch.randn(1, 16))
    for a, b in zip(ours(*given), theirs(*given), strict=True):
        assert_close(a, b)


COMMON: dict[str, Any] = {"temb_channels": 16, "resnet_eps": 1e-5, "resnet_act_fn": "silu", "resnet_groups": 4}
ATTENDS: dict[str, Any] = {"num_attention_heads": 2, "cross_attention_dim": 12, "attention_head_dim": 4}


def blocks(kind: str, function: str, options: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = getattr(peer_blocks, function)(kind, **COMMON, **options).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = getattr(unet_2d_blocks, function)(kind, **COMMON, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert type(ours).__name__ == kind
    assert_same_signature(getattr(unet_2d_blocks, function), getattr(peer_blocks, function))
    return ours, theirs


X, TEMB, TOKENS = torch.randn(2, 8, 8, 8), torch.randn(2, 16), torch.randn(2, 5, 12)


def context(kind: str) -> dict[str, Any]:
    return {"encoder_hidden_states": TOKENS} if "CrossAttn" in kind else {}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DownBlock2D", {}),
        ("DownBlock2D", {"downsample_padding": 0}),
        ("ResnetDownsampleBlock2D", {"resnet_skip_time_act": True, "resnet_out_scale_factor": 2.0}),
        ("AttnDownBlock2D", {"attention_head_dim": 4}),
        ("AttnDownBlock2D", {"attention_head_dim": 4, "downsample_type": "resnet"}),
        ("CrossAttnDownBlock2D", ATTENDS),
        ("CrossAttnDownBlock2D", {**ATTENDS, "transformer_layers_per_block": 2, "use_linear_projection": True}),
        ("SimpleCrossAttnDownBlock2D", {**ATTENDS, "resnet_time_scale_shift": "scale_shift"}),
    ],
)
@torch.no_grad()
def test_down_blocks(kind: str, options: dict[str, Any]) -> None:
    shape = {"num_layers": 2, "in_channels": 8, "out_channels": 16, "add_downsample": True, "downsample_padding": 1}
    ours, theirs = blocks(kind, "get_down_block", {**shape, **options})
    (a, kept), (b, peers_kept) = (m(X, TEMB, **context(kind)) for m in (ours, theirs))
    for one, two in zip((a, *kept), (b, *peers_kept), strict=True):
        assert_close(one, two)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("UNetMidBlock2D", {}),
        ("UNetMidBlock2DCrossAttn", ATTENDS),
        ("UNetMidBlock2DSimpleCrossAttn", {**ATTENDS, "output_scale_factor": 2.0}),
    ],
)
@torch.no_grad()
def test_mid_blocks(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = blocks(kind, "get_mid_block", {"in_channels": 8, **options})
    assert_close(ours(X, TEMB, **context(kind)), theirs(X, TEMB, **context(kind)))
    assert unet_2d_blocks.get_mid_block(None, in_channels=8, **COMMON) is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("UpBlock2D", {}),
        ("ResnetUpsampleBlock2D", {"resnet_out_scale_factor": 2.0}),
        ("AttnUpBlock2D", {"attention_head_dim": 4}),
        ("CrossAttnUpBlock2D", ATTENDS),
        ("SimpleCrossAttnUpBlock2D", ATTENDS),
    ],
)
@torch.no_grad()
def test_up_blocks(kind: str, options: dict[str, Any]) -> None:
    shape = {"num_layers": 2, "in_channels": 4, "out_channels": 16, "prev_output_channel": 8, "add_upsample": True}
    ours, theirs = blocks(kind, "get_up_block", {**shape, "resolution_idx": 1, **options})
    skips = (torch.randn(2, 4, 8, 8), torch.randn(2, 16, 8, 8))
    a, b = (m(X, skips, temb=TEMB, **context(kind)) for m in (ours, theirs))
    assert_close(a, b)


def test_blocks_that_cannot_be() -> None:
    shape = {"num_layers": 1, "in_channels": 8, "out_channels": 8, "add_downsample": False}
    with pytest.raises(ValueError, match="there are DownBlock2D"):
        unet_2d_blocks.get_down_block("KDownBlock2D", **shape, **COMMON)
    with pytest.raises(ValueError, match="give `cross_attention_dim`"):
        unet_2d_blocks.get_down_block("CrossAttnDownBlock2D", **shape, **COMMON)
    with pytest.raises(ValueError, match="attention_type"):
        unet_2d_blocks.get_down_block("DownBlock2D", **shape, **COMMON, attention_type="gated")
