"""UNet2DConditionModel against the peer: every configuration family, conditions, residuals, processors, gradients."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from effusion import UNet2DConditionModel, attention_backend
from effusion.nn.attention import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

from .parity import assert_close, assert_same_signature, pair, public_config

SD1: dict[str, Any] = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=4,
    layers_per_block=2,
    cross_attention_dim=12,
    attention_head_dim=2,
)
SD2 = {**SD1, "attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
SDXL = {
    **SD2,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 + 6 * 4,
}
SIMPLE = {
    **SD1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 4,
}
DUAL = {**SD1, "dual_cross_attention": True}
XL_COND = {"text_embeds": (2, 6), "time_ids": (2, 6)}

# name -> (configuration, shapes of what the forward is given besides, tokens of the context)
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "sd1": (SD1, {}, 7),
    "sd1-inpaint": ({**SD1, "in_channels": 9}, {}, 7),
    "sd1-pix2pix": ({**SD1, "in_channels": 8, "conv_in_kernel": 1, "conv_out_kernel": 1}, {}, 7),
    "sd2": (SD2, {}, 7),
    "sdxl": (SDXL, {"added_cond_kwargs": XL_COND}, 7),
    "sdxl-refiner": (
        {**SDXL, "projection_class_embeddings_input_dim": 6 + 5 * 4, "transformer_layers_per_block": 2},
        {"added_cond_kwargs": {"text_embeds": (2, 6), "time_ids": (2, 5)}},
        7,
    ),
    "lcm": ({**SD1, "time_cond_proj_dim": 10}, {"timestep_cond": (2, 10)}, 7),
    "ssd-1b-like": (
        {
            **SDXL,
            "transformer_layers_per_block": ((1, 1), (2, 1), (1, 2)),
            "reverse_transformer_layers_per_block": ((1, 2, 1), (2, 1, 1), (1, 1, 1)),
        },
        {"added_cond_kwargs": XL_COND},
        7,
    ),
    "only-cross": ({**SD1, "only_cross_attention": (True, False), "center_input_sample": True}, {}, 7),
    "layers-by-block": ({**SD1, "layers_per_block": (1, 2), "cross_attention_dim": (12, 12)}, {}, 7),
    "no-middle": ({**SD1, "mid_block_type": None, "act_fn": "gelu"}, {}, 7),
    "plain-middle": ({**SD1, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1.4}, {}, 7),
    "dual": (DUAL, {}, 77 + 257),
    "attention-blocks": (
        {
            **SD1,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        },
        {},
        7,
    ),
    "floyd": (
        {
            **SIMPLE,
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.4,
            "time_embedding_act_fn": "gelu",
            "encoder_hid_dim": 64,
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "cross_attention_norm": "group_norm",
            "cross_attention_dim": 32,
        },
        {"encoder_hidden_states": (2, 7, 64)},
        7,
    ),
    "simple-only-cross": (
        {
            **SIMPLE,
            "only_cross_attention": True,
            "cross_attention_norm": "layer_norm",
            "cross_attention_dim": 16,
            "timestep_post_act": "silu",
        },
        {},
        7,
    ),
    "classes": ({**SD1, "num_class_embeds": 5}, {"class_labels": "index"}, 7),
    "class-timestep": ({**SD1, "class_embed_type": "timestep"}, {"class_labels": "index"}, 7),
    "class-identity": ({**SD1, "class_embed_type": "identity"}, {"class_labels": (2, 32)}, 7),
    "class-projection": (
        {
            **SD1,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 6,
            "class_embeddings_concat": True,
        },
        {"class_labels": (2, 6)},
        7,
    ),
    "class-simple": (
        {**SD1, "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6},
        {"class_labels": (2, 6)},
        7,
    ),
    "fourier": ({**SD1, "time_embedding_type": "fourier", "flip_sin_to_cos": False}, {}, 7),
    "kandinsky-2.1": (
        {
            **SIMPLE,
            "addition_embed_type": "text_image",
            "encoder_hid_dim_type": "text_image_proj",
            "encoder_hid_dim": 10,
        },
        {
            "encoder_hidden_states": (2, 7, 10),
            "added_cond_kwargs": {"image_embeds": (2, 12), "text_embeds": (2, 12)},
        },
        7,
    ),
    "kandinsky-2.2": (
        {**SIMPLE, "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 10},
        {"added_cond_kwargs": {"image_embeds": (2, 10)}},
        7,
    ),
    "kandinsky-2.2-hint": (
        {
            **SIMPLE,
            "addition_embed_type": "image_hint",
            "in_channels": 8,
            "encoder_hid_dim": 10,
            "encoder_hid_dim_type": "image_proj",
        },
        {"sample": (2, 4, 8, 8), "added_cond_kwargs": {"image_embeds": (2, 10), "hint": (2, 3, 64, 64)}},
        7,
    ),
}


def inputs(name: str, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    config, extra, tokens = CONFIGS[name]
    generator = torch.Generator().manual_seed(3)

    def draw(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {k: draw(v) for k, v in shape.items()}
        if shape == "index":
            return torch.tensor([1, 3])
        return torch.randn(*shape, generator=generator)

    dim = config["cross_attention_dim"]
    shapes: dict[str, Any] = {
        "sample": (2, config.get("in_channels", 4), *size),
        "encoder_hidden_states": (2, tokens, dim if isinstance(dim, int) else dim[0]),
        **extra,
    }
    return {"timestep": 37, **draw(shapes)}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_numbers(name: str) -> None:
    theirs, ours = pair("UNet2DConditionModel", **CONFIGS[name][0])
    for module in theirs.modules():
        if type(module).__name__ == "DualTransformer2DModel":  # its caller passes a mask that it does not take
            dual = type(module).forward
            module.forward = lambda *a, m=module, dual=dual, encoder_attention_mask=None, **kw: dual(m, *a, **kw)
    assert public_config(ours) == public_config(theirs)
    given = inputs(name)
    assert_close(ours(**given).sample, theirs(**given).sample)


@pytest.mark.parametrize("size", [(7, 8), (9, 13)])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_odd_sizes(name: str, size: tuple[int, int]) -> None:
    theirs, ours = pair("UNet2DConditionModel", **CONFIGS[name][0])
    given = inputs(name, size)
    assert_close(ours(**given).sample, theirs(**given).sample)


@pytest.mark.parametrize("timestep", [5, 5.5, torch.tensor(5), torch.tensor([5]), torch.tensor([5.0, 800.0])])
@torch.no_grad()
def test_ways_to_say_the_time(timestep: Any) -> None:
    theirs, ours = pair("UNet2DConditionModel", **SD1)
    given = {**inputs("sd1"), "timestep": timestep}
    assert_close(ours(**given, return_dict=False)[0], theirs(**given, return_dict=False)[0])


@torch.no_grad()
def test_masks() -> None:
    theirs, ours = pair("UNet2DConditionModel", **SD1)
    given = inputs("sd1")
    given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7])
    masked = ours(**given).sample
    assert_close(masked, theirs(**given).sample)
    given["encoder_hidden_states"][0, 3:] = 5.0
    assert_close(ours(**given).sample, masked)


@torch.no_grad()
def test_control_and_adapter_residuals() -> None:
    theirs, ours = pair("UNet2DConditionModel", **SD1)
    given = inputs("sd1")
    skips = [(8, 8), (8, 8), (8, 8), (8, 4), (16, 4), (16, 4)]
    residuals = [torch.randn(2, c, s, s) for c, s in skips]
    middle = torch.randn(2, 16, 4, 4)
    control = dict(down_block_additional_residuals=residuals, mid_block_additional_residual=middle)
    inner = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)]
    for more in (control, dict(down_intrablock_additional_residuals=inner)):
        copies = {k: list(v) if isinstance(v, list) else v for k, v in more.items()}
        want = theirs(**given, **copies).sample
        assert_close(ours(**given, **more).sample, want)
    assert len(inner) == 3, "the caller's list must stay as it was"
    assert_close(ours(**given, down_block_additional_residuals=inner).sample, want)


@torch.no_grad()
def test_freeu() -> None:
    theirs, ours = pair("UNet2DConditionModel", **SD1)
    given = inputs("sd1")
    before = ours(**given).sample
    for model in (theirs, ours):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert_close(ours(**given).sample, theirs(**given).sample)
    ours.disable_freeu()
    assert torch.equal(ours(**given).sample, before)


class Doubling:
    """A processor as users write them, in the peer's calling convention and with its helper methods."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        factor: float = 2.0,
    ) -> Tensor:
        mask = attn.prepare_attention_mask(attention_mask, hidden_states.shape[1], hidden_states.shape[0])
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(layer(context)) for layer in (attn.to_k, attn.to_v))
        probabilities = attn.get_attention_scores(query, key, mask)
        out = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return factor * attn.to_out[1](attn.to_out[0](out))


@torch.no_grad()
def test_users_processor() -> None:
    theirs, ours = pair("UNet2DConditionModel", **SD1)
    given = inputs("sd1")
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    for model in (theirs, ours):
        model.set_attn_processor(Doubling())
    plain = ours(**given).sample
    assert_close(plain, theirs(**given).sample)
    given["cross_attention_kwargs"] = {"factor": 0.5, "scale": 1.0}
    want = theirs(**given).sample
    assert_close(ours(**given).sample, want)
    assert not torch.allclose(want, plain)
    ours.set_attn_processor({k: AttnProcessor() for k in ours.attn_processors})

    def function(attn: Any, hidden_states: Tensor, factor: float = 1.0, **kwargs: Any) -> Tensor:
        return hidden_states * factor

    class Trained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def __call__(self, attn: Any, hidden_states: Tensor, factor: float = 1.0, **kwargs: Any) -> Tensor:
            return hidden_states * factor * self.weight

    results = []
    for processor in (function, Trained()):
        ours.set_attn_processor(processor)
        results.append(ours(**given).sample)
    assert torch.equal(*results)
    assert any(name.endswith("attn1.processor.weight") for name in ours.state_dict())
    given["cross_attention_kwargs"] = {"factor": 3.0}
    assert not torch.equal(ours(**given).sample, results[0])
    ours.set_attn_processor(AttnProcessor2_0())
    assert not any("processor" in name for name in ours.state_dict())
    with pytest.raises(ValueError, match="missing"):
        ours.set_attn_processor({"nowhere.processor": AttnProcessor()})


@pytest.mark.parametrize("name", ["sd1", "sd2", "floyd"])
@torch.no_grad()
def test_backends_agree(name: str) -> None:
    _, ours = pair("UNet2DConditionModel", **CONFIGS[name][0])
    given = inputs(name)
    want = ours(**given).sample
    for backend in ("math", "sliced", "sliced:3", "_native_math"):
        with attention_backend(backend):
            assert_close(ours(**given).sample, want)
        ours.set_attention_backend(backend)
        assert_close(ours(**given).sample, want)
        ours.reset_attention_backend()
    if name != "floyd":
        for processor in (AttnProcessor(), SlicedAttnProcessor(1), AttnProcessor2_0()):
            ours.set_attn_processor(processor)
            assert_close(ours(**given).sample, want)
    for size in ("auto", "max", 1, None):
        ours.set_attention_slice(size)
        assert_close(ours(**given).sample, want)
    ours.fuse_qkv_projections()
    assert_close(ours(**given).sample, want)
    ours.unfuse_qkv_projections()
    ours.set_default_attn_processor()
    assert torch.equal(ours(**given).sample, want)


def test_backend_is_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from effusion.nn import dispatch

    calls = []
    monkeypatch.setitem(dispatch._FACTORIES, "spy", lambda name, argument: lambda q, *rest: calls.append(1) or q)
    _, ours = pair("UNet2DConditionModel", **SD1)
    ours.set_attention_backend("spy")
    ours(**inputs("sd1"))
    assert len(calls) == sum(isinstance(m, Attention) for m in ours.modules())
    dispatch._ready.pop("spy")


def test_gradient_checkpointing() -> None:
    _, ours = pair("UNet2DConditionModel", **SD1)
    given, gradients, counted = inputs("sd1"), [], []
    for enable in (False, True):
        ours.zero_grad()
        if enable:
            ours.enable_gradient_checkpointing()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = ours(**given).sample.square().mean()
        counted.append(sum(kept))
        loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert counted[1] < counted[0]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
    ours.disable_gradient_checkpointing()
    assert not ours.is_gradient_checkpointing


def test_training_gradients_equal_the_peers() -> None:
    theirs, ours = pair("UNet2DConditionModel", **SD1)
    for model in (theirs, ours):
        model.train()(**inputs("sd1")).sample.square().mean().backward()
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_traces_compiles_and_fakes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    small = {
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    _, ours = pair("UNet2DConditionModel", **{**SDXL, **small})
    given = inputs("sdxl")
    given["timestep"] = torch.tensor(37)
    want = ours(**given).sample

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = ours

        def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor, text: Tensor, ids: Tensor) -> Any:
            cond = {"text_embeds": text, "time_ids": ids}
            return self.unet(sample, timestep, tokens, added_cond_kwargs=cond, return_dict=False)[0]

    call = Flat().eval()
    cond = given["added_cond_kwargs"]
    flat = (given["sample"], given["timestep"], given["encoder_hidden_states"], cond["text_embeds"], cond["time_ids"])
    assert_close(torch.jit.trace(call, flat, check_trace=False)(*flat), want)
    assert_close(torch.compile(call, fullgraph=True, backend="eager")(*flat), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(*(mode.from_tensor(t) for t in flat)).shape == want.shape
    ours.to("meta")
    assert call(*(t.to("meta") for t in flat)).shape == want.shape


def test_signatures_and_facts() -> None:
    peer = diffusers.UNet2DConditionModel
    names = ("__init__", "forward", "enable_freeu", "disable_freeu", "set_attention_slice", "fuse_qkv_projections")
    for name in (*names, "enable_gradient_checkpointing", "set_attention_backend", "reset_attention_backend"):
        assert_same_signature(getattr(UNet2DConditionModel, name), getattr(peer, name))
    for fact in ("_no_split_modules", "_repeated_blocks", "_skip_layerwise_casting_patterns"):
        assert getattr(UNet2DConditionModel, fact) == getattr(peer, fact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ("CrossAttnDownBlock2D", "KDownBlock2D")}, "down_block_types 'KDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D",)}, "equally long"),
        ({"mid_block_type": "Other"}, "mid_block_type 'Other'"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"attention_type": "gated"}, "attention_type 'gated'"),
        ({"class_embed_type": "other"}, "class_embed_type 'other'"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        ({"addition_embed_type": "other"}, "addition_embed_type 'other'"),
        ({"encoder_hid_dim_type": "text_proj"}, "needs encoder_hid_dim"),
        ({"time_embedding_type": "other"}, "time_embedding_type 'other'"),
        ({"resnet_time_scale_shift": "other"}, "time_embedding_norm 'other'"),
        ({"act_fn": "other"}, "activation 'other'"),
        ({"layers_per_block": (1, 2, 3)}, "layers_per_block has 3 values for 2"),
        (
            {"cross_attention_norm": "other", **{k: SIMPLE[k] for k in ("mid_block_type",)}},
            "cross_attention_norm 'other'",
        ),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UNet2DConditionModel(**{**SD1, **change})


@torch.no_grad()
def test_missing_conditions_are_named() -> None:
    _, ours = pair("UNet2DConditionModel", **SDXL)
    given = inputs("sdxl")
    with pytest.raises(ValueError, match="text_embeds, time_ids in added_cond_kwargs"):
        ours(**{**given, "added_cond_kwargs": None})
    _, ours = pair("UNet2DConditionModel", **CONFIGS["classes"][0])
    with pytest.raises(ValueError, match="class_labels"):
        ours(**inputs("sd1"))
