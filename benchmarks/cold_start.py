"""From a fresh process to the first picture: the demo model, 20 steps, files in the page cache."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from effusion import demo

from . import harness

CODE = """
import importlib, time
library = importlib.import_module(name)
import torch
pipe = library.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
loaded = time.perf_counter()
prompt = "a small red circle above a large blue square on a white background"
image = pipe(prompt, num_inference_steps=20, generator=torch.Generator().manual_seed(7)).images[0]
image.save(out)
report(painted=time.perf_counter() - loaded)
"""


def measure(repeat: int) -> str:
    """Wall time from starting Python to the picture on disk, and how far the pictures differ."""
    model = str(demo.path())
    with tempfile.TemporaryDirectory() as folder:
        out = {name: str(Path(folder) / f"{name}.png") for name in (harness.OURS, harness.PEER)}
        runs = {n: lambda n=n: harness.child(CODE, name=n, model=model, out=out[n]) for n in out}
        found = harness.alternate(repeat, **runs)
        pictures = [np.asarray(Image.open(path)).astype(int) for path in out.values()]
    different = int(np.abs(pictures[0] - pictures[1]).max())
    rows = []
    for label, key in (("start to picture", "wall"), ("of this, the 20 steps and decoding", "painted")):
        ours, peers = ([run[key] for run in found[name]] for name in (harness.OURS, harness.PEER))
        rows.append([label, harness.median(ours), harness.median(peers), harness.ratio(ours, peers)])
    text = harness.table(["", "Effusion", "peer", "ratio"], rows)
    return f"{text}\n\nThe two pictures differ by at most {different} of 255 in any channel of any pixel."


if __name__ == "__main__":
    harness.main("cold_start", "Cold start to the first picture", measure, repeat=7)
