"""Deltas under any policy: added, scaled, removed, and gone without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effusion.placement import policies
from effusion.placement.casting import apply_layerwise_casting
from effusion.placement.engine import engine_of
from effusion.placement.patches import LowRank, add_patch, patch_names, remove_patch, scale_patch

from . import toys
from .conftest import POLICIES, Policy


def low_rank() -> LowRank:
    return LowRank(torch.randn(32, 2), torch.randn(2, 16))


def test_a_patch_under_every_policy(policy: Policy, tmp_path: Path) -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    deltas = {"blocks.1.up.weight": low_rank(), "conv.weight": torch.randn(4, 2, 3, 3), "position": torch.randn(16)}
    with torch.no_grad():
        plain = module(x)[1]
        add_patch(module, "style", deltas, 0.5)
        half = module(x)[1]
        scale_patch(module, "style", 1.0)
        full = module(x)[1]
        assert not torch.equal(half, full) and not torch.equal(plain, half)
        policy(module, tmp_path)
        assert torch.equal(module(x)[1], full)
        scale_patch(module, "style", 0.5)
        assert torch.equal(module(x)[1], half)
        scale_patch(module, "style", 0.0)
        assert torch.equal(module(x)[1], plain)
        remove_patch(module, "style")
        assert torch.equal(module(x)[1], plain)
        add_patch(module, "style", deltas, 0.5)
        assert torch.equal(module(x)[1], half)
        policies.remove(module)
        assert torch.equal(module(x)[1], half)
        remove_patch(module, "style")
        assert torch.equal(module(x)[1], plain)
    assert engine_of(module) is None
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_patches_add_up_and_saving_leaves_them_out() -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    first, second = torch.randn(16, 16), torch.randn(16, 16)
    with torch.no_grad():
        add_patch(module, "a", {"enter.weight": first}, 2.0)
        add_patch(module, "b", {"enter.weight": second}, -1.0)
        patched = module(x)[0]
        assert patch_names(module) == {"a": 2.0, "b": -1.0}
        saved = toys.Net()
        saved.load_state_dict(module.state_dict()), saved.shift.copy_(module.shift)
        saved.enter.weight.add_(first, alpha=2.0).add_(second, alpha=-1.0)
        torch.testing.assert_close(saved(x)[0], patched, rtol=1e-5, atol=1e-5)


def test_patches_go_on_decoded_weights(tmp_path: Path) -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32)
    add_patch(module, "a", {"blocks.0.up.weight": low_rank()})
    with torch.no_grad():
        wanted = module(x)[0]
        for name in ("disk-leaf-stream", "block", "model"):
            POLICIES[name](module, tmp_path)
            assert torch.equal(module(x)[0], wanted)
        policies.remove(module)


def test_bad_patches() -> None:
    module = toys.Net()
    with pytest.raises(ValueError, match="has no parameters"):
        add_patch(module, "a", {"nowhere.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="the delta is"):
        add_patch(module, "a", {"enter.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="don't make"):
        add_patch(module, "a", {"enter.weight": low_rank()})
    add_patch(module, "a", {"enter.weight": torch.zeros(16, 16)})
    with pytest.raises(ValueError, match="there already"):
        add_patch(module, "a", {"enter.weight": torch.zeros(16, 16)})
    with pytest.raises(ValueError, match=r"no patch is called 'b'; there are \['a'\]"):
        scale_patch(module, "b", 1.0)
