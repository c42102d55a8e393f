"""Makes docs/images/demo.png: pictures of the demo model with their prompts, as they come, none chosen."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from effusion import AutoPipelineForText2Image, demo

PROMPTS = (
    "a small red circle above a large blue square on a white background",
    "a large green star left of a small yellow triangle on a black background",
    "a large purple cross on a gray background",
    "a small orange circle below a small cyan star on a brown background",
    "a large pink square right of a large green triangle on a white background",
    "a small yellow star above a large purple circle on a black background",
    "a large red cross on a white background",  # a pair of colour and shape that training never showed
    "a small blue triangle left of a large orange circle on a gray background",  # such a pair, too
)
SIDE, TEXT, GAP, COLUMNS = 160, 46, 12, 4
SEED = 7


def main() -> None:
    """Paint all prompts at once and lay them out, four to a row, four times as large, over their prompts."""
    pipe = AutoPipelineForText2Image.from_pretrained(demo.path())
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(PROMPTS))]
    images = pipe(list(PROMPTS), num_inference_steps=30, guidance_scale=3.0, generator=generators).images
    rows = -(-len(images) // COLUMNS)
    size = (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT + GAP) + GAP)
    sheet = Image.new("RGB", size, "#f6f6f4")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        x, y = GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (SIDE + TEXT + GAP)
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + SIDE + 4), "\n".join(textwrap.wrap(prompt, 28)), fill="#333333", font=font)
    path = Path(__file__).parent / "images" / "demo.png"
    sheet.save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
