"""Text encoders in files of their own or beside a network: T5 (Raffel et al., 2019) as transformers and as llama.cpp."""

from __future__ import annotations

from typing import Any

from .infer import Shapes, count
from .table import Row, Table

_LAYERS = "encoder.block.{}."
T5 = (Row("shared.", "shared."), Row("encoder.embed_tokens.", "", ()), Row("encoder.", "encoder."))
T5_LLAMA = Table((
    Row("token_embd.", "shared."),
    Row("enc.output_norm.", "encoder.final_layer_norm."),
    Row(
        "enc.blk.{}.",
        _LAYERS,
        (
            Row("attn_q.", "layer.0.SelfAttention.q."),
            Row("attn_k.", "layer.0.SelfAttention.k."),
            Row("attn_v.", "layer.0.SelfAttention.v."),
            Row("attn_o.", "layer.0.SelfAttention.o."),
            Row("attn_norm.", "layer.0.layer_norm."),
            Row("attn_rel_b.", "layer.0.SelfAttention.relative_attention_bias."),
            Row("ffn_gate.", "layer.1.DenseReluDense.wi_0."),
            Row("ffn_up.", "layer.1.DenseReluDense.wi_1."),
            Row("ffn_down.", "layer.1.DenseReluDense.wo."),
            Row("ffn_norm.", "layer.1.layer_norm."),
        ),
    ),
))  # fmt: skip


def t5(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``T5EncoderModel``, names as transformers has them."""
    attention = _LAYERS.format(0) + "layer.0.SelfAttention."
    feed = _LAYERS.format(0) + "layer.1.DenseReluDense."
    gated = f"{feed}wi_0.weight" in shapes
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes[f"{attention}relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{attention}q.weight"][0] // heads,
        "d_ff": shapes[f"{feed}{'wi_0' if gated else 'wi'}.weight"][0],
        "num_layers": count(shapes, _LAYERS),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
