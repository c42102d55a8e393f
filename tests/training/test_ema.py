"""EMAModel does what the peer's does, number for number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel as PeerEMA

from effusion.models.unet_2d import UNet2DModel
from effusion.training.ema import EMAModel

SETTINGS = [
    {},
    {"decay": 0.9},
    {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
    {"update_after_step": 3, "min_decay": 0.3},
    {"foreach": True, "decay": 0.95},
]


def run(cls: type, settings: dict, steps: int = 12) -> tuple[list[torch.Tensor], object]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    net[1].bias.requires_grad_(False)
    ema = cls(net.parameters(), **settings)
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in net.parameters():
            p.data.add_(torch.randn(p.shape, generator=g))
        ema.step(net.parameters())
    return ema.shadow_params, ema


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_average_as_the_peer(settings: dict) -> None:
    ours, ema = run(EMAModel, settings)
    theirs, peer = run(PeerEMA, settings)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert ema.cur_decay_value == peer.cur_decay_value
    assert [ema.get_decay(i) for i in range(50)] == [peer.get_decay(i) for i in range(50)]
    assert set(ema.state_dict()) == set(peer.state_dict())


def test_state_goes_to_the_peer_and_back() -> None:
    _, ema = run(EMAModel, {"decay": 0.9})
    _, peer = run(PeerEMA, {}, steps=1)
    peer.load_state_dict(ema.state_dict())
    _, again = run(EMAModel, {}, steps=1)
    again.load_state_dict(peer.state_dict())
    assert again.decay == 0.9 and again.optimization_step == 12
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, ema.shadow_params, strict=True))


def test_store_copy_restore() -> None:
    net = torch.nn.Linear(2, 2)
    ema = EMAModel(net.parameters(), decay=0.5)
    before = net.weight.detach().clone()
    ema.shadow_params[0].fill_(7.0)
    ema.store(net.parameters())
    ema.copy_to(net.parameters())
    assert (net.weight == 7).all()
    ema.restore(net.parameters())
    assert torch.equal(net.weight, before)
    with pytest.raises(RuntimeError, match="store"):
        ema.restore(net.parameters())


def test_saved_as_a_model_and_read_by_the_peer(tmp_path: Path) -> None:
    from diffusers import UNet2DModel as PeerUNet

    config = {
        "sample_size": 8,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
    }
    net = UNet2DModel(**config)
    ema = EMAModel(net.parameters(), decay=0.7, model_cls=UNet2DModel, model_config=dict(net.config))
    for p in net.parameters():
        p.data.add_(1)
    ema.step(net.parameters())
    ema.step(net.parameters())
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, UNet2DModel)
    peer = PeerEMA.from_pretrained(tmp_path, PeerUNet)
    assert again.optimization_step == peer.optimization_step == 2 and again.decay == peer.decay == 0.7
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, again.shadow_params, strict=True))
    theirs = PeerUNet.from_pretrained(tmp_path).state_dict()
    names = [name for name, _ in net.named_parameters()]  # the peer's are in another order
    assert all(torch.equal(p, theirs[name]) for name, p in zip(names, ema.shadow_params, strict=True))


def test_bad_states() -> None:
    ema = EMAModel([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="decay=2"):
        ema.load_state_dict({"decay": 2.0})
    with pytest.raises(ValueError, match="optimization_step"):
        ema.load_state_dict({"optimization_step": "1"})
    with pytest.raises(ValueError, match="0 shadow_params for 1"):
        ema.load_state_dict({"shadow_params": []})
    with pytest.raises(ValueError, match="model_cls"):
        ema.save_pretrained("nowhere")
