"""What adds to a model and is none by itself: LoRAs, textual inversions, IP-Adapters; told by names."""

from __future__ import annotations

import re

from .layouts.infer import Shapes
from .verdict import Verdict

# the halves of a product of two small matrices, as peft, kohya, the ecosystem's older versions and XLabs name them
_LORA = re.compile(r"(^|[._])(lora(_linear_layer|\d)?[._](A|B|up|down)|hada_w\d|lokr_w\d)([._]|$)")
_WIDTHS = {768, 1024, 1280, 4096}  # of text encoders
_NOT_YET = "adapters can't be loaded yet"


def recognise_adapter(shapes: Shapes) -> Verdict | None:
    """An adapter; ``None`` if there is none."""
    if any(_LORA.search(name) for name in shapes):
        return Verdict("lora", f"a LoRA for {_lora_target(shapes)}; {_NOT_YET}")
    if any(n.startswith("ip_adapter.") for n in shapes) and any(n.startswith("image_proj.") for n in shapes):
        return Verdict("ip_adapter", f"an IP-Adapter; {_NOT_YET}")
    if shapes and _is_embedding(shapes):
        width = next(iter(shapes.values()))[-1]
        return Verdict("embedding", f"a textual inversion of width {width}; {_NOT_YET}")
    return None


def _is_embedding(shapes: Shapes) -> bool:
    """A few vectors under names of their format, or under the token that they stand for (with or without brackets)."""
    if len(shapes) > 3 or any(len(s) not in (1, 2) for s in shapes.values()):
        return False
    if set(shapes) & {"emb_params", "clip_l", "clip_g"} or all(n.startswith("<") for n in shapes):
        return True
    fits = all(s[-1] in _WIDTHS and (len(s) == 1 or s[0] <= 77) for s in shapes.values())
    return fits and not any("." in name for name in shapes)


def _lora_target(shapes: Shapes) -> str:
    text = " ".join(shapes)
    if "double_blocks" in text or "single_transformer_blocks" in text or "single_blocks" in text:
        return "FLUX.1"
    if "joint_blocks" in text:
        return "Stable Diffusion 3"
    if "img_mod" in text or "transformer_blocks.0.img_mlp" in text:
        return "Qwen-Image"
    widths = {s[-1] for n, s in shapes.items() if "attn2" in n and "to_k" in n and ("down" in n or "lora_A" in n)}
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    return next((families[w] for w in widths if w in families), "an unknown family")
