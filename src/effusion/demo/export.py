"""Write a trained demo model as an ordinary pipeline folder, in half precision."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from . import model


def assemble(run: Path, last: bool = False) -> Any:
    """The ``StableDiffusionPipeline`` trained in ``run``, float32: averaged weights, or the ``last`` themselves."""
    from ..pipelines.stable_diffusion import StableDiffusionPipeline

    tokenizer = model.build_tokenizer(run / "tokenizer")
    text_encoder, unet, vae = model.build_text_encoder(tokenizer), model.build_unet(), model.build_vae()
    if last:
        state = torch.load(run / "diffusion" / "checkpoint.pt", weights_only=True)["objective"]
    else:
        state = torch.load(run / "averaged.pt", weights_only=True)
    for network, prefix in ((unet, "unet."), (text_encoder, "text_encoder.")):
        network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    vae.load_state_dict(torch.load(run / "vae-standard.pt", weights_only=True))
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=model.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(run: Path, folder: Path, last: bool = False) -> None:
    """Save the model trained in ``run`` to ``folder``: written beside it, then renamed.

    The tokenizer is written in both of its formats, for old and new readers.
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    assemble(run, last).to(torch.float16).save_pretrained(beside)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(run / "tokenizer" / name, beside / "tokenizer" / name)
    for file in beside.glob("*/*"):
        file.chmod(0o644)  # some writers keep weights to their owner; a package is for all to read
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
