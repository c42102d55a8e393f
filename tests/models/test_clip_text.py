"""CLIP's text models and tokenizer against those of ``transformers``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pipelines import tiny

import effusion
from effusion.demo.model import byte_letters, merges
from effusion.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from effusion.models.clip_tokenizer import CLIPTokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = torch.tensor([[0, 5, 17, 9, 2, 2], [0, 3, 2, 2, 2, 2]])


def saved(folder: Path, projection: bool, **config: Any) -> Any:
    torch.manual_seed(0)
    config = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 2, "projection_dim": 16, **SIZES, **config}
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    model = cls(transformers.CLIPTextConfig(**config)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("config", [{}, {"eos_token_id": 17}, {"hidden_act": "gelu"}, {"max_position_embeddings": 6}])
@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1, 1]] * 2, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]])
def test_outputs_are_those_of_transformers(tmp_path: Path, projection: bool, config: dict[str, Any], mask: Any) -> None:
    theirs = saved(tmp_path, projection, **config)
    ours = (CLIPTextModelWithProjection if projection else CLIPTextModel).from_pretrained(tmp_path)
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        a = ours(IDS, attention_mask=mask, output_hidden_states=True)
        b = theirs(IDS, attention_mask=mask, output_hidden_states=True)
    assert list(a.keys()) == list(b.keys())
    assert len(a.hidden_states) == len(b.hidden_states)
    for x, y in zip((*a.hidden_states, a[0], a[1]), (*b.hidden_states, b[0], b[1]), strict=True):
        assert torch.equal(x, y) if mask is None else torch.allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_layouts_of_names_and_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = saved(tmp_path / "new", False).to(dtype)
    ours = CLIPTextModel.from_pretrained(tmp_path / "new", torch_dtype=dtype)
    ours.save_pretrained(tmp_path / "old")  # with the prefix that every version reads
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / "old", dtype=dtype)
    back = CLIPTextModel.from_pretrained(tmp_path / "old", torch_dtype=dtype)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(back.state_dict()[name], tensor)
    assert {k: getattr(again.config, k) for k in SIZES} == SIZES
    assert again.config.eos_token_id == 2


def test_resizing_embeddings(tmp_path: Path) -> None:
    saved(tmp_path, True)
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    before = model.get_input_embeddings().weight.clone()
    table = model.resize_token_embeddings(101)
    assert table is model.get_input_embeddings()
    assert torch.equal(table.weight[:99], before)
    assert model(torch.tensor([[0, 100, 2]])).text_embeds.shape == (1, 16)
    with pytest.raises(ValueError, match="more than the 77"):
        model(torch.zeros(1, 78, dtype=torch.long))


# -- tokenizer -----------------------------------------------------------------------------------

WORDS = [
    "the",
    "cat's",
    "small",
    "red",
    "circle",
    "above",
    "large",
    "blue",
    "square",
    "don't",
    "we'll",
    "painting",
    "of",
    "naïve",
    "東京",
    "☃",
    "über",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPTokenizer, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    table = dict(zip(range(256), byte_letters(), strict=True))
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {b: table[i] for i, b in enumerate([*order, *(b for b in range(256) if b not in order)])}
    learned = merges(sorted({"".join(letter[b] for b in w.encode()) for w in WORDS}))
    letters = byte_letters()
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(p) for p in learned)]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(p) for p in learned)]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 20, "pad_token": "!"}))
    return CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)


FIXED = [
    "", " ", "The cat's  small\tRED circle", "don't We'LL '''s !'s 's", "12 3.5 ½ Ⅷ ² 100%", "naïve NAI\u0308VE ÜBER",
    "東京 ☃☃ 🐈‍⬛ e\u0301", "<|endoftext|> a <|startoftext|>b", "a\u00a0b\u3000c\u200bd\x1ce", "x" * 200, "İI ΣΑΣ ß",
]  # fmt: skip


@pytest.mark.parametrize("text", FIXED)
def test_ids_are_those_of_transformers(both: tuple[CLIPTokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.tokenize(text) == theirs.tokenize(text)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    a, b = ours([text, "cat"], **options), theirs([text, "cat"], **options)
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.attention_mask, b.attention_mask)


# letters that only newer tables of Unicode know are other signs to an older Python
KNOWN = st.characters(exclude_categories=("Cn", "Cs", "Co"))


@settings(max_examples=200, deadline=None)
@given(st.text(KNOWN, max_size=40))
def test_any_text(both: tuple[CLIPTokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours(text).input_ids == theirs(text).input_ids


def test_added_tokens(both: tuple[CLIPTokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = both
    ours.save_pretrained(tmp_path / "base")
    ours, theirs = (
        CLIPTokenizer.from_pretrained(tmp_path / "base"),
        transformers.CLIPTokenizer.from_pretrained(tmp_path / "base"),
    )
    assert ours.add_tokens(["<Cat-Toy>", "cat", "<a>"]) == theirs.add_tokens(["<Cat-Toy>", "cat", "<a>"])
    assert ours.add_tokens("<a>") == 0
    assert len(ours) == len(theirs)
    for text in ("a <cat-toy> and <CAT-TOY>s <a>", "<Cat-Toy><a>red"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.convert_tokens_to_ids(["<a>", "☃", "nothing"]) == theirs.convert_tokens_to_ids(["<a>", "☃", "nothing"])
    ours.save_pretrained(tmp_path)
    for again in (CLIPTokenizer.from_pretrained(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)):
        assert again("<cat-toy> red <a>").input_ids == ours("<cat-toy> red <a>").input_ids
        assert again.model_max_length == 20
        assert again.pad_token_id == ours.pad_token_id


def test_saved_files_of_both_kinds_are_read(both: tuple[CLIPTokenizer, Any], tmp_path: Path) -> None:
    _, theirs = both
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert CLIPTokenizer.supports(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path)("The cat's 12").input_ids == theirs("The cat's 12").input_ids


def test_decoding(both: tuple[CLIPTokenizer, Any]) -> None:
    ours, theirs = both
    ids = theirs("The small red circle, 12 naïve 東京").input_ids
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.batch_decode([ids[1:-1]]) == theirs.batch_decode([ids[1:-1]])
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)


def test_a_pipeline_starts_without_transformers(tmp_path: Path) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(tmp_path / "t"), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "sd")
    options = {"num_inference_steps": 2, "width": 32, "height": 32, "output_type": "latent"}
    script = (
        "import sys, torch, effusion\n"
        f"pipe = effusion.DiffusionPipeline.from_pretrained({str(tmp_path / 'sd')!r})\n"
        f"x = pipe('a red cat', generator=torch.manual_seed(0), **{options!r}).images\n"
        f"torch.save(x, {str(tmp_path / 'x')!r})\n"
        "print(*[m for m in ('transformers', 'tokenizers', 'torch._dynamo', 'accelerate') if m in sys.modules])\n"
        f"pipe.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a red cat", generator=torch.manual_seed(0), **options).images
    assert torch.allclose(torch.load(tmp_path / "x"), theirs, atol=1e-4)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", safety_checker=None)
    assert type(again.text_encoder).__name__ == "CLIPTextModel"
    assert again.tokenizer("a red cat").input_ids == pipe.tokenizer("a red cat").input_ids


def test_who_imported_transformers_gets_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(tmp_path / "t"), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "sd")
    theirs = effusion.DiffusionPipeline.from_pretrained(tmp_path / "sd")
    assert isinstance(theirs.text_encoder, transformers.CLIPTextModel)
    monkeypatch.setenv("EFFUSION_NATIVE_TEXT", "1")
    ours = effusion.DiffusionPipeline.from_pretrained(tmp_path / "sd")
    assert isinstance(ours.text_encoder, CLIPTextModel)
    assert ours.config["text_encoder"] == ("transformers", "CLIPTextModel")


# -- what scripts ask of the model -----------------------------------------------------------------


def test_the_inner_model_and_clip_skip(tmp_path: Path) -> None:
    theirs = saved(tmp_path, False)
    ours = CLIPTextModel.from_pretrained(tmp_path)
    inner = getattr(theirs, "text_model", theirs)
    assert ours.text_model.final_layer_norm is ours.final_layer_norm
    assert set(dict(ours.named_modules())) <= set(dict(inner.named_modules()))
    with torch.no_grad():
        a = ours.text_model.final_layer_norm(ours(IDS, output_hidden_states=True)[-1][-2])
        b = inner.final_layer_norm(theirs(IDS, output_hidden_states=True)[-1][-2])
        embeds = ours.text_model.embeddings(input_ids=IDS)
        assert torch.equal(embeds, inner.embeddings(input_ids=IDS))
        tokens = ours.get_input_embeddings()(IDS)
        assert torch.equal(ours.text_model.embeddings(inputs_embeds=tokens), embeds)
        through = ours.text_model.encoder(inputs_embeds=embeds)
        assert torch.equal(ours.final_layer_norm(through[0]), ours(IDS).last_hidden_state)
        causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)[None, None]
        masked = ours.text_model.encoder(inputs_embeds=embeds, causal_attention_mask=causal)
    assert torch.equal(a, b)
    assert torch.allclose(masked[0], through[0], atol=1e-6)
    without = ours(inputs_embeds=tokens)
    assert torch.equal(without.last_hidden_state, ours(IDS).last_hidden_state)
    assert without.pooler_output is None
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        ours()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]])
def test_attention_weights(tmp_path: Path, projection: bool, mask: Any) -> None:
    theirs = saved(tmp_path, projection)
    theirs.set_attn_implementation("eager")
    ours = (CLIPTextModelWithProjection if projection else CLIPTextModel).from_pretrained(tmp_path)
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        a = ours(IDS, attention_mask=mask, output_attentions=True)
        b = theirs(IDS, attention_mask=mask, output_attentions=True)
    assert list(a.keys()) == list(b.keys())
    assert len(a.attentions) == len(b.attentions) == 3
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.attentions, b.attentions, strict=True))


@pytest.mark.parametrize("projection", [False, True])
def test_gradient_checkpointing(tmp_path: Path, projection: bool) -> None:
    saved(tmp_path, projection)
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel).from_pretrained(tmp_path)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(IDS)[0].square().sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    plain = gradient()
    calls = []
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    assert model.is_gradient_checkpointing
    model.text_model.encoder.layers[0].register_forward_pre_hook(lambda *args: calls.append(1))
    assert torch.allclose(gradient(), plain, atol=1e-5)
    assert len(calls) == 2  # forwards, and again backwards
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
