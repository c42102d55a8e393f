"""The attention dispatch: exact by default, every backend agrees, refusals are clear."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effusion import AttentionBackendName
from effusion.core.errors import MissingExtra
from effusion.nn import dispatch
from effusion.nn.dispatch import AttentionBackendMixin, attend, attention_backend, backend_names, register_backend


def qkv(heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 5, heads, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8))
    return tuple(torch.randn(*s, generator=g) for s in shapes)  # type: ignore[return-value]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **more).transpose(1, 2)


def key_mask() -> Tensor:
    return torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)[:, None, None]


MASKS = {"none": None, "keys": key_mask(), "added": torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("mask", MASKS)
def test_default_is_sdpa_to_the_bit(mask: str) -> None:
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v, MASKS[mask], scale=0.3), reference(q, k, v, MASKS[mask], scale=0.3))


@pytest.mark.parametrize("backend", ["math", "_native_math", "_native_flash", "sliced", "sliced:3"])
@pytest.mark.parametrize("mask", MASKS)
def test_own_backends_agree(backend: str, mask: str) -> None:
    q, k, v = qkv()
    want = reference(q, k, v, MASKS[mask])
    torch.testing.assert_close(attend(q, k, v, MASKS[mask], backend=backend), want)
    with torch.no_grad(), attention_backend(backend):
        torch.testing.assert_close(attend(q, k, v, MASKS[mask]), want)


@pytest.mark.parametrize("backend", ["native", "math", "sliced:3"])
def test_causal_and_grouped(backend: str) -> None:
    q, k, v = qkv(kv_heads=2)
    want = reference(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, is_causal=True, enable_gqa=True, backend=backend), want)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any, causal: bool, dropout_p: float = 0.0
) -> Tensor:
    return reference(q, k, v, scale=softmax_scale, is_causal=causal)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    """What the real one computes, item by item."""
    out = []
    starts = zip(more["cu_seqlens_q"].tolist(), more["cu_seqlens_k"].tolist(), strict=True)
    (q0, k0), *rest = starts
    for q1, k1 in rest:
        out.append(reference(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], scale=more["softmax_scale"])[0])
        q0, k0 = q1, k1
    return torch.cat(out)


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, bias: Any, p: float, scale: Any) -> Tensor:
    causal = bias == "triangle"
    return reference(q, k, v, None if causal else bias, is_causal=causal, scale=scale)


def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool, sm_scale: Any) -> Tensor:
    assert tensor_layout == "NHD"
    return reference(q, k, v, is_causal=is_causal, scale=sm_scale)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' calling conventions."""
    fakes: dict[str, dict[str, Any]] = {
        "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
        "flash_attn_interface": {"flash_attn_func": lambda *a, **kw: (flash_attn_func(*a, **kw), None)},
        "xformers": {},
        "xformers.ops": {
            "memory_efficient_attention": memory_efficient_attention,
            "LowerTriangularMask": lambda: "triangle",
        },
        "sageattention": {"sageattn": sageattn},
    }
    for name, content in fakes.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dispatch, "_ready", dict(dispatch._ready))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", ["flash", "_flash_3", "flash_varlen", "xformers", "sage"])
def test_foreign_backends_agree(backend: str) -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, scale=0.2, backend=backend), reference(q, k, v, scale=0.2))
    if backend != "flash_varlen":
        got = attend(q, k, v, is_causal=True, backend=backend)
        torch.testing.assert_close(got, reference(q, k, v, is_causal=True))
    if backend == "flash_varlen":
        torch.testing.assert_close(attend(q, k, v, key_mask(), backend=backend), reference(q, k, v, key_mask()))
    if backend == "xformers":
        for mask in (key_mask(), MASKS["added"]):
            torch.testing.assert_close(attend(q, k, v, mask, backend=backend), reference(q, k, v, mask))
    else:
        with pytest.raises(ValueError, match=backend):
            attend(q, k, v, MASKS["added"], backend=backend)


def test_refusals() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="no attention backend 'nonsense'; there are .*native"):
        attend(q, k, v, backend="nonsense")
    with pytest.raises(ValueError, match="positive number"), attention_backend("sliced:0"):
        pass
    if "sageattention" not in sys.modules:
        with pytest.raises(MissingExtra, match="sageattention"):
            attend(q, k, v, backend="sage")
    assert {"native", "flash", "xformers", "sage", "sliced"} <= set(backend_names())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_backend: str | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, backend=self.attention_backend)


class Model(AttentionBackendMixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](q, k, v), k, v)  # type: ignore[no-any-return]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Any:
    state = SimpleNamespace(calls=0)

    def make(name: str, argument: str) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            state.calls += 1
            return reference(q, k, v)

        return run

    monkeypatch.setattr(dispatch, "_ready", dict(dispatch._ready))
    monkeypatch.setattr(dispatch, "_FACTORIES", dict(dispatch._FACTORIES))
    register_backend("spy", make)
    return state


def test_a_models_choice_goes_before_the_one_in_force(spy: Any) -> None:
    model, other, q = Model(), Model(), qkv()
    with attention_backend("spy"):
        model(*q)
    assert spy.calls == 2
    model.set_attention_backend("spy")
    other(*q)
    assert spy.calls == 2
    with attention_backend("math"):
        model(*q)
    assert spy.calls == 4
    model.reset_attention_backend()
    model(*q)
    assert spy.calls == 4
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attention_backend("nonsense")
    assert model.layers[0].attention_backend is None


def test_compiles_as_one_graph() -> None:
    q = qkv()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    want = model(*q)
    for backend in ("native", "math", "sliced:2"):
        model.set_attention_backend(backend)
        torch.testing.assert_close(compiled(*q), want)
    model.reset_attention_backend()
    with attention_backend("math"):
        torch.testing.assert_close(compiled(*q), want)


def test_environment_variable() -> None:
    code = "from effusion.nn import dispatch; print(dispatch._in_force)"
    for variable in ("EFFUSION_ATTN_BACKEND", "DIFFUSERS_ATTN_BACKEND"):
        run = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": "src", variable: "math"}, capture_output=True, text=True
        )
        assert run.stdout.strip() == "math", run.stderr


# -- the ecosystem's names -----------------------------------------------------------------------------


def test_names_of_backends_are_the_peers() -> None:
    from diffusers import AttentionBackendName as Theirs

    assert {name: member.value for name, member in AttentionBackendName.__members__.items()} == {
        name: member.value for name, member in Theirs.__members__.items()
    }


def test_a_backend_can_be_chosen_by_its_name_as_a_member() -> None:
    q, k, v = qkv()
    want = reference(q, k, v)
    with attention_backend(AttentionBackendName._NATIVE_MATH):
        torch.testing.assert_close(attend(q, k, v), want)
    model = Model()
    model.set_attention_backend(AttentionBackendName._NATIVE_MATH)
    assert model.layers[0].attention_backend == "_native_math"
    model.reset_attention_backend()
    with pytest.raises(ValueError, match="no attention backend 'flash_hub'; there are"):
        model.set_attention_backend(AttentionBackendName.FLASH_HUB)
    assert model.layers[0].attention_backend is None


@pytest.mark.parametrize("mask", MASKS)
def test_dispatch_for_processors_is_the_peers(mask: str) -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn as theirs
    from effusion.models.attention_dispatch import dispatch_attention_fn as ours

    q, k, v = qkv()
    assert torch.equal(ours(q, k, v, MASKS[mask], scale=0.3), theirs(q, k, v, MASKS[mask], scale=0.3))
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    with pytest.raises(ValueError, match="attention_kwargs"):
        ours(q, k, v, attention_kwargs={"window": 3})
