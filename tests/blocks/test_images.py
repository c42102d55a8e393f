"""Image processing gives the peer's numbers for every input kind and resize mode."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effusion.blocks import images as ours
from effusion.blocks import pictures

peer = pytest.importorskip("diffusers.image_processor")
peer_utils = pytest.importorskip("diffusers.utils")


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return rgb.convert(mode)


def inputs(kind: str) -> object:
    rng = np.random.default_rng(1)
    array = rng.random((2, 40, 52, 3), dtype=np.float32)
    return {
        "pil": picture(41, 53),
        "pil gray": picture(41, 53, "L"),
        "pil alpha": picture(41, 53, "RGBA"),
        "pils": [picture(41, 53, seed=i) for i in range(2)],
        "numpy": array[0],
        "numpy batch": array,
        "numpys": list(array),
        "numpy batches": [array, array[:1]],
        "torch": torch.from_numpy(array[0]).permute(2, 0, 1),
        "torch batch": torch.from_numpy(array).permute(0, 3, 1, 2),
        "torch list": list(torch.from_numpy(array).permute(0, 3, 1, 2)),
        "torch signed": torch.from_numpy(array).permute(0, 3, 1, 2) * 2 - 1,
        "latent": torch.from_numpy(rng.random((2, 4, 8, 8), dtype=np.float32)),
    }[kind]


KINDS = (
    "pil",
    "pil gray",
    "pil alpha",
    "pils",
    "numpy",
    "numpy batch",
    "numpys",
    "numpy batches",
    "torch",
    "torch batch",
    "torch list",
    "torch signed",
    "latent",
)
CONFIGS = (
    {},
    {"do_normalize": False, "do_binarize": True},
    {"do_resize": False},
    {"vae_scale_factor": 16, "resample": "bicubic"},
    {"resample": "nearest", "reducing_gap": 2},
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(None, None), (24, 36)])
def test_preprocess_equals_the_peer(kind: str, config: dict, size: tuple) -> None:
    got = ours.VaeImageProcessor(**config).preprocess(inputs(kind), *size)
    want = peer.VaeImageProcessor(**config).preprocess(inputs(kind), *size)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


MASKS = {
    "pil": picture(41, 53, "L"),
    "rgb": picture(41, 53),
    "numpy": np.random.default_rng(2).random((40, 48), dtype=np.float32)[None],
    "numpy channel": np.random.default_rng(2).random((40, 48, 1), dtype=np.float32),
    "torch": torch.rand(1, 40, 48, generator=torch.Generator().manual_seed(0)),
    "torch batch": torch.rand(2, 1, 40, 48, generator=torch.Generator().manual_seed(0)),
    "pils": [picture(41, 53, "L", seed=i) for i in range(2)],
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_equal_the_peer(kind: str) -> None:
    config = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    mask = MASKS[kind]
    kept = mask.clone() if isinstance(mask, torch.Tensor) else mask
    want = peer.VaeImageProcessor(**config).preprocess(
        mask.clone() if isinstance(mask, torch.Tensor) else mask, height=32, width=40
    )
    assert torch.equal(ours.VaeImageProcessor(**config).preprocess(mask, height=32, width=40), want)
    if isinstance(mask, torch.Tensor):
        assert torch.equal(mask, kept), "the caller's tensor was changed"


@pytest.mark.parametrize("mode", ours.RESIZE_MODES)
@pytest.mark.parametrize("source", [(41, 53), (90, 20), (20, 90), (32, 32)])
@pytest.mark.parametrize("target", [(32, 48), (48, 32), (64, 64)])
def test_resize_modes_equal_the_peer(mode: str, source: tuple, target: tuple) -> None:
    image = picture(*source)
    got = ours.VaeImageProcessor().resize(image, *target, resize_mode=mode)
    want = peer.VaeImageProcessor().resize(image, *target, resize_mode=mode)
    assert np.array_equal(np.array(got), np.array(want))


@given(
    box=st.tuples(st.integers(0, 38), st.integers(0, 28), st.integers(1, 39), st.integers(1, 29)),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    pad=st.integers(0, 40),
)
@settings(max_examples=150, deadline=None)
def test_crop_region_equals_the_peer(box: tuple, size: tuple, pad: int) -> None:
    mask = Image.new("L", (40, 30))
    left, top, right, bottom = box
    mask.paste(255, (left, top, max(right, left + 1), max(bottom, top + 1)))
    assert ours.VaeImageProcessor.get_crop_region(mask, *size, pad=pad) == peer.VaeImageProcessor.get_crop_region(
        mask, *size, pad=pad
    )


def test_a_black_mask_has_no_crop_region() -> None:
    with pytest.raises(ValueError, match="black everywhere"):
        ours.VaeImageProcessor.get_crop_region(Image.new("L", (8, 8)), 8, 8)


@pytest.mark.parametrize("box", [None, (5, 4, 30, 28)])
def test_overlay_equals_the_peer(box: tuple | None) -> None:
    image, below, mask = picture(24, 25), picture(41, 53, seed=3), picture(41, 53, "L", seed=4)
    if box is None:
        image = picture(41, 53, seed=5)
    got = ours.VaeImageProcessor().apply_overlay(mask, below, image, box)
    want = peer.VaeImageProcessor().apply_overlay(mask, below, image, box)
    assert np.array_equal(np.array(got), np.array(want))


@pytest.mark.parametrize("which", [None, [True, False]])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_postprocess_equals_the_peer(which: list | None, normalized: bool, channels: int) -> None:
    decoded = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    got, want = (m.VaeImageProcessor(do_normalize=normalized) for m in (ours, peer))
    for kind in ("pt", "np", "latent", "pil"):
        a, b = (p.postprocess(decoded, kind, do_denormalize=which) for p in (got, want))
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(np.asarray(x), np.asarray(y))
            assert kind != "pil" or x.mode == y.mode


def test_small_helpers_equal_the_peer() -> None:
    tensor = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tiles = [picture(8, 8, seed=i) for i in range(6)]
    mask = picture(20, 20, "L")
    same = lambda a, b: np.array_equal(np.array(a), np.array(b))  # noqa: E731
    assert all(map(same, pictures.pt_to_pil(tensor), peer_utils.pt_to_pil(tensor)))
    assert same(pictures.make_image_grid(tiles, 2, 3), peer_utils.make_image_grid(tiles, 2, 3))
    assert same(pictures.make_image_grid(tiles, 3, 2, 16), peer_utils.make_image_grid(tiles, 3, 2, 16))
    assert same(ours.VaeImageProcessor.blur(mask, 3), peer.VaeImageProcessor.blur(mask, 3))


def test_load_image_turns_upright_and_converts(tmp_path) -> None:
    source = picture(10, 20, "RGBA").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    source.save(tmp_path / "turned.png", exif=exif)
    got = pictures.load_image(tmp_path / "turned.png")
    assert got.size == (10, 20)
    assert np.array_equal(np.array(got), np.array(peer_utils.load_image(str(tmp_path / "turned.png"))))
    assert pictures.load_image(source, convert_method=lambda i: i.convert("L")).mode == "L"


@pytest.fixture
def server(tmp_path):
    """The address of an HTTP server on this machine that serves the test's folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_load_image_from_a_url(server: str, tmp_path) -> None:
    picture(10, 20).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(pictures.load_image(f"{server}/a.png")), np.asarray(picture(10, 20)))
    with pytest.raises(ValueError, match="could not be read: HTTP Error 404"):
        pictures.load_image(f"{server}/b.png")
    (tmp_path / "c.png").write_text("<html>")
    with pytest.raises(ValueError, match="is not a picture"):
        pictures.load_image(f"{server}/c.png")


@pytest.mark.parametrize("bad", ["/no/such/file.png", 7, None])
def test_load_image_refuses_what_is_no_image(bad: object) -> None:
    with pytest.raises(ValueError, match="PIL image|neither a file"):
        pictures.load_image(bad)


def test_load_image_names_a_file_that_is_no_picture(tmp_path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png is not a picture"):
        pictures.load_image(str(tmp_path / "a.png"))


@pytest.mark.parametrize("bad", [[], [1], "text", None, [picture(8, 8), picture(16, 8)], np.zeros((1, 2, 3, 4, 5))])
def test_preprocess_refuses_what_is_no_picture(bad: object) -> None:
    with pytest.raises(ValueError, match="expected a PIL image|must have one size"):
        ours.VaeImageProcessor(do_resize=False).preprocess(bad)


@pytest.mark.parametrize("bad", [{"resample": "best"}, {"do_convert_rgb": True, "do_convert_grayscale": True}])
def test_bad_configurations_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="allowed are|exclude each other"):
        ours.VaeImageProcessor(**bad)


def test_unknown_modes_are_refused() -> None:
    processor = ours.VaeImageProcessor()
    with pytest.raises(ValueError, match="allowed are default, fill, crop"):
        processor.resize(picture(8, 8), 8, 8, resize_mode="stretch")
    with pytest.raises(ValueError, match="for PIL images"):
        processor.resize(torch.zeros(1, 3, 8, 8), 8, 8, resize_mode="fill")
    with pytest.raises(ValueError, match="allowed are latent, pt, np, pil"):
        processor.postprocess(torch.zeros(1, 3, 8, 8), "jpg")


def test_the_configuration_round_trips(tmp_path) -> None:
    ours.VaeImageProcessor(vae_scale_factor=16).save_config(tmp_path)
    assert (
        ours.VaeImageProcessor.from_config(ours.VaeImageProcessor.load_config(tmp_path)).config.vae_scale_factor == 16
    )


# -- processors for one purpose ------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 900), (1000, 333)])
def test_training_sizes_of_pixart_equal_the_peer(height: int, width: int) -> None:
    from diffusers.image_processor import PixArtImageProcessor as Peer
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN as bins
    from effusion.image_processor import PixArtImageProcessor

    processor = PixArtImageProcessor(vae_scale_factor=8)
    assert isinstance(processor, ours.VaeImageProcessor)
    assert {k: v for k, v in processor.config.items() if k[0] != "_"} == {
        k: v for k, v in Peer(vae_scale_factor=8).config.items() if k[0] != "_"
    }
    assert processor.classify_height_width_bin(height, width, bins) == Peer.classify_height_width_bin(
        height, width, bins
    )
    samples = torch.rand(1, 3, 64, 48)
    for size in ((48, 64), (32, 32), (20, 70)):
        a, b = (p.resize_and_crop_tensor(samples, *size) for p in (processor, Peer))
        assert torch.equal(a, b)


@pytest.mark.parametrize("crop", [None, 8])
def test_inpainting_with_its_mask_equals_the_peer(crop: int | None) -> None:
    from diffusers.image_processor import InpaintProcessor as Peer
    from effusion.image_processor import InpaintProcessor

    image, mask = picture(64, 96), Image.new("L", (96, 64))
    mask.paste(255, (20, 10, 60, 40))
    processors = (InpaintProcessor(vae_scale_factor=8), Peer(vae_scale_factor=8))
    (a, a_mask, after), (b, b_mask, peers_after) = (p.preprocess(image, mask, 64, 96, crop) for p in processors)
    assert torch.equal(a, b) and torch.equal(a_mask, b_mask)
    assert after == peers_after
    shown, expected = (p.postprocess(a, **after) for p in processors)
    assert np.abs(np.asarray(shown[0], dtype=int) - np.asarray(expected[0], dtype=int)).max() <= 1
    assert processors[0].preprocess(image)[1] is None
    with pytest.raises(ValueError, match="crops to a mask"):
        processors[0].preprocess(image, padding_mask_crop=4)
    if crop:
        with pytest.raises(ValueError, match="'pil'"):
            processors[0].postprocess(a, output_type="np", **after)
        with pytest.raises(ValueError, match="original_mask"):
            processors[0].postprocess(a, crops_coords=after["crops_coords"])
