"""The parts of the demo model: a latent diffusion model in the ordinary format, small enough to ship.

Tokenizer, text encoder, autoencoder, UNet and scheduler as Rombach et al. (2022) arrange them; sizes are in
:data:`VAE`, :data:`UNET` and :data:`TEXT`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..core.optional import require
from .data import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

TOKENS = 32  # of a prompt, with start and end
LATENT_CHANNELS = 8
LATENT_SIZE = 8  # 64 pixels / 8
START, END = "<|startoftext|>", "<|endoftext|>"

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 1.0,  # the latents themselves are standardised, see `train.standardise`
    "force_upcast": False,
    "mid_block_add_attention": False,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 128,
    "max_position_embeddings": TOKENS,
    "hidden_act": "gelu",
}
UNET: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (128, 128),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT["hidden_size"],
    "attention_head_dim": 4,  # heads, in the manner of the oldest checkpoints of this class
    "norm_num_groups": 16,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    # The last step is noise alone, and sampling begins there (Lin et al., 2023): a small picture's background
    # could otherwise still be read from the noisiest samples, and would be believed more than the caption.
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def words() -> list[str]:
    """Every word of the grammar, sorted."""
    phrases = [*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *RELATIONS, "a an the to on background and picture of"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def byte_letters() -> list[str]:
    """The 256 letters that byte-level BPE (Radford et al., 2019) writes bytes as, printable ones as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al., 2016) learned until each word of ``vocabulary`` is one token."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    learned: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in split):
        counts = Counter(pair for parts in split for pair in pairwise(parts))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        learned.append(best)
        split = [_merged(parts, best) for parts in split]
    return learned


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def build_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Write ``vocab.json`` and ``merges.txt`` to ``folder``; the ``CLIPTokenizer`` that reads them.

    Each word of the grammar is one token; any other text falls back to pieces and bytes.
    """
    transformers = require("transformers", "the demo's tokenizer")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = merges(words())
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs), START, END]
    tokens = list(dict.fromkeys(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(
        folder, model_max_length=TOKENS, bos_token=START, eos_token=END, unk_token=END, pad_token=END
    )


def build_text_encoder(tokenizer: Any) -> Any:
    """A new ``CLIPTextModel`` for ``tokenizer``."""
    transformers = require("transformers", "the demo's text encoder")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **TEXT)
    return transformers.CLIPTextModel(config)


def build_vae(**changes: Any) -> Any:
    """A new ``AutoencoderKL`` of the demo's size, with ``changes``."""
    from ..models.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(**{**VAE, **changes})
    assert vae.quant_conv is not None
    assert vae.quant_conv.bias is not None
    with torch.no_grad():  # begin with hardly any noise on the latents: it would drown what there is to learn
        vae.quant_conv.bias[vae.config.latent_channels :] = -6.0
    return vae


def build_unet(**changes: Any) -> Any:
    """A new ``UNet2DConditionModel`` of the demo's size, with ``changes``."""
    from ..models.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**{**UNET, **changes})


def build_scheduler() -> Any:
    """The ``DDIMScheduler`` (Song et al., 2020) that the demo is trained for and sampled with."""
    from ..schedulers.ddim import DDIMScheduler

    return DDIMScheduler(**SCHEDULER)
