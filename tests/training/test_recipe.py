"""The trainer: learns, logs, resumes bit for bit, and never leaves half a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from effusion.core.errors import CheckpointError
from effusion.training.muon import Muon, matrices, orthogonalise
from effusion.training.recipe import Settings, Trainer


class Fit(nn.Module):
    """Learn ``y = sum of x``; with dropout, so that the global random state matters as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(16, 4, generator=generator)
        error = (self.net(x)[:, 0] - x.sum(dim=1)).square().mean()
        return {"loss": error, "twice": 2 * error}


def settings(**changes: object) -> Settings:
    return Settings(**{"steps": 8, "lr": 1e-2, "log_every": 2, "save_every": 4, "warmup": 2, **changes})  # type: ignore[arg-type]


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.parameters] + [p.clone() for p in trainer.ema.shadow_params]


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02], ids=["adamw", "muon"])
def test_resuming_continues_bit_for_bit(tmp_path: Path, matrix_lr: float) -> None:
    how = settings(matrix_lr=matrix_lr, cooldown=3)
    whole = Trainer(Fit(), how, tmp_path / "whole")
    whole.run()

    class Stop(Exception):
        pass

    def interrupt(trainer: Trainer) -> None:
        raise Stop

    part = Trainer(Fit(), how, tmp_path / "part", on_save=interrupt)
    with pytest.raises(Stop):
        part.run()
    torch.manual_seed(1234)  # a new process would be in another random state
    again = Trainer(Fit(), how, tmp_path / "part")
    again.resume()
    assert again.step == 4
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_it_learns_and_logs(tmp_path: Path) -> None:
    trainer = Trainer(Fit(), settings(steps=300, lr=2e-2, log_every=50, save_every=300, ema_decay=0.9), tmp_path)
    untrained = float(trainer.objective(torch.Generator().manual_seed(9))["loss"].detach())
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150, 200, 250, 300]
    assert lines[-1]["loss"] < 0.1 * untrained
    assert lines[0]["twice"] == pytest.approx(2 * lines[0]["loss"], rel=1e-3)


def test_averaged_weights_are_lent_and_taken_back(tmp_path: Path) -> None:
    trainer = Trainer(Fit(), settings(), tmp_path)
    trainer.run()
    before = [p.detach().clone() for p in trainer.parameters]
    with trainer.averaged() as objective:
        assert not objective.training
        assert all(torch.equal(p, s) for p, s in zip(trainer.parameters, trainer.ema.shadow_params, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(trainer.parameters, before, strict=True))


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(Fit(), settings(steps=4), tmp_path)
    trainer.run()
    good = trainer.checkpoint.read_bytes()

    def broken(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        trainer.save()
    assert trainer.checkpoint.read_bytes() == good


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Trainer(Fit(), settings(), tmp_path).resume()
    Trainer(Fit(), settings(steps=4), tmp_path).run()
    with pytest.raises(CheckpointError, match="seed 0"):
        Trainer(Fit(), settings(seed=1), tmp_path).resume()

    class Other(Fit):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 1))

    with pytest.raises(CheckpointError, match="other networks"):
        Trainer(Other(), settings(), tmp_path).resume()


def test_a_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(Fit(), settings(steps=10**9, max_minutes=1e-9), tmp_path)
    trainer.run()
    assert trainer.step == 2 and trainer.checkpoint.is_file()


def test_learning_rates() -> None:
    how = settings(steps=100, warmup=10, cooldown=20)
    scale = [how.scale(i) for i in range(100)]
    assert scale[0] == pytest.approx(0.1) and scale[9] == scale[50] == scale[80] == 1.0
    assert scale[90] == pytest.approx(0.5) and 0 < scale[99] < 0.01


def test_muon_steps_are_orthogonal() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((8, 24), (24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=g)))
        assert values.min() > 0.6 and values.max() < 1.3
    net = nn.Sequential(nn.Embedding(3, 4), nn.Conv2d(2, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4))
    assert [p.shape for p in matrices(net)] == [(4, 2, 3, 3), (4, 4)]
    with pytest.raises(ValueError, match="two or more axes"):
        Muon([torch.zeros(3)])
