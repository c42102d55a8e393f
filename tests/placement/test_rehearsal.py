"""Rehearsing leaves nothing behind, goes on where the pipeline computes, and knows what rests in another form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import effusion
from effusion.placement import allocator, asides, rehearsal
from effusion.placement.alive import reach
from effusion.placement.engine import engine_of
from effusion.placement.forecast import part_of
from effusion.placement.packing import unpack_in_calls
from effusion.placement.patches import LowRank, add_patch
from effusion.placement.pipeline_choices import Choices
from effusion.placement.rehearsal import Rehearsed, rehearse
from effusion.placement.sizes import Sizes
from effusion.placement.sources import Mappings
from effusion.placement.units import by_leaf
from effusion.quant.codec import ScaledFloat
from effusion.weights import single_file

from . import tiny_pipelines as tiny

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")


def rehearsed(module: nn.Module, *inputs: Tensor, device: torch.device = CPU) -> tuple[Any, Rehearsed]:
    out: list[Any] = []
    found = rehearse({"net": module}, lambda: out.append(module(*inputs)), device)
    return out[0], found["net"]


# -- where it goes on ------------------------------------------------------------------------------------------


def test_results_are_where_the_arguments_are() -> None:
    net = nn.Linear(4, 3)
    out, found = rehearsed(net, torch.zeros(2, 4, device="meta"))
    assert (out.device, tuple(out.shape)) == (META, (2, 3)) and not found.failure
    assert rehearsed(net, torch.zeros(2, 4))[0].device == CPU


def test_results_of_calls_without_tensors_are_where_the_network_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(3)

    monkeypatch.setattr(rehearsal, "execution_device", lambda module: META)
    assert rehearsed(Constant())[0].device == META


def test_generators_of_the_devices_in_use_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[int]]] = []

    @contextlib.contextmanager
    def fork_rng(devices: Any = None, device_type: str = "cuda") -> Iterator[None]:
        asked.append((device_type, list(devices)))
        yield

    places = {0: torch.device("cuda:1"), 1: CPU, 2: CUDA, 3: torch.device("xpu:0")}
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(asides, "execution_device", lambda index: places[index])
    with asides.undrawn(places):  # type: ignore[arg-type]
        pass
    assert asked[0] == ("cuda", []), "that of the CPU always"
    assert sorted(asked[1:]) == [("cuda", [0, 1]), ("xpu", [0])]


def test_every_way_into_a_network_is_rehearsed() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.ran = 0

        def get_image_features(self, x: Tensor) -> Tensor:
            self.ran += 1
            return self.inner(x)  # type: ignore[no-any-return]

    net = Clip()
    found = rehearse({"net": net}, lambda: net.get_image_features(torch.zeros(1, 4)), CPU)
    assert found["net"].work(1).flops > 0 and net.ran == 0


# -- weights in other forms ------------------------------------------------------------------------------------


class Reads(nn.Module):
    """Looks at values, so that it has to be run for real."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if float(y.sum()) > 0 else -y


def packed_linear(layer: nn.Linear) -> ScaledFloat:
    """``layer`` with its weight as scaled float8; what unpacks it."""
    codec = ScaledFloat(torch.float8_e4m3fn, tuple(layer.weight.shape), lambda: torch.tensor(0.5))
    raw = (layer.weight.detach() / 0.5).to(torch.float8_e4m3fn).view(torch.uint8)
    layer.weight = nn.Parameter(raw, requires_grad=False)
    return codec


def test_a_packed_network_that_looks_at_values_is_unpacked_for_it() -> None:
    net, x = Reads(), torch.randn(2, 8)
    unpack_in_calls(net, {"layer.weight": (packed_linear(net.layer), torch.float32)})
    with torch.no_grad():
        wanted = net(x)
        out, found = rehearsed(net, x)
    assert found.failure and torch.equal(out, wanted)
    with torch.no_grad():
        assert torch.equal(net(x), wanted), "it is served as before"


def test_what_decoding_and_patching_takes_is_counted() -> None:
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)).half()
    count = 64 * 64
    assert Sizes(net, Rehearsed(), CPU, {}).decoded(by_leaf(net)[0]) == 0
    add_patch(net, "a", {"0.weight": LowRank(torch.zeros(64, 2), torch.zeros(2, 64))})
    sizes = Sizes(net, Rehearsed(), CPU, {})
    assert sizes.decoded(by_leaf(net)[0]) == count * 2 + 2 * count * 4, "the weight, and two tensors of float32"
    assert (sizes.deltas, Sizes(net, Rehearsed(), CUDA, {}).deltas) == (0, 4 * 4 * 64)
    assert part_of("net", net, Rehearsed(), 1, CPU).decoded == count * 10
    packed = nn.Sequential(nn.Linear(64, 64, bias=False))
    unpack_in_calls(packed, {"0.weight": (packed_linear(packed[0]), torch.float16)})  # type: ignore[arg-type]
    found = Sizes(packed, Rehearsed(), CPU, {})
    assert found.of(by_leaf(packed)[0].slots[0]) == count
    assert found.decoded(by_leaf(packed)[0]) == count * 2 + count * 4


def test_deltas_leave_other_devices_when_nothing_runs() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    delta = LowRank(torch.zeros(4, 1), torch.zeros(1, 4))
    add_patch(net, "a", {"0.weight": delta})
    delta._on(META)
    delta._on(CPU)
    assert list(delta._there) == [META], "a copy where there is the original"
    engine = engine_of(net)
    assert engine is not None
    engine.settle()
    assert not delta._there


@pytest.fixture(scope="module")
def packed_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small transformer, packed in two ways."""
    from tests.loading.test_packed import scaled

    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    net = effusion.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
        pos_embed_max_size=16, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    net.save_single_file(folder / "Q8_0.gguf", packing="Q8_0")
    safetensors.torch.save_file(
        scaled(single_file.original_state(net), "weight_scale", False), folder / "f8.safetensors"
    )
    return {"Q8_0": folder / "Q8_0.gguf", "float8": folder / "f8.safetensors"}


@pytest.mark.parametrize("packing", ["Q8_0", "float8"])
def test_a_packed_pipeline_is_planned_and_keeps_its_budget(packing: str, packed_files: dict[str, Path]) -> None:
    config = effusion.GGUFQuantizationConfig(torch.float32)
    net = effusion.SD3Transformer2DModel.from_single_file(packed_files[packing], quantization_config=config)
    pipe = effusion.StableDiffusion3Pipeline(
        transformer=net, scheduler=effusion.FlowMatchEulerDiscreteScheduler(), vae=tiny._vae(), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {
        "guidance_scale": 1.0,
        "prompt_embeds": torch.randn(1, 5, 64, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 64, generator=g),
    }
    size = {"height": 32, "width": 32, "num_inference_steps": 2}

    def run() -> Tensor:
        call = {**size, **given, "output_type": "pt"}
        return pipe(**call, generator=torch.Generator().manual_seed(2)).images  # type: ignore[no-any-return]

    wanted = run()
    plan = pipe.plan("1GB", device="cpu", **size, **given)
    assert not plan.notes and plan.exact, "the transformer could not be rehearsed"
    weight = net.transformer_blocks[0].ff.net[2].weight
    assert weight.dtype == torch.uint8 and Mappings().span(weight) is not None
    stage = next(s for s in plan.stages if s.name == "transformer")
    at_rest = net.get_memory_footprint()
    decoded = 4 * net.config.num_attention_heads * 32 * 4 * 128  # the largest layer, in float32
    assert sum(r.nbytes for r in plan.of("transformer")) == at_rest and stage.activations > decoded
    choices = Choices(pipe, pipe.modules, {**size, **given, "batch_size": 1, "num_frames": None}, CPU)
    for budget in (plan.peak, choices.least("exact")):
        made = pipe.fit(budget, device="cpu", **size, **given)
        assert made.peak <= budget and torch.equal(run(), wanted)
    rows = (replace(r, home="disk", ahead=1) if r.component == "transformer" else r for r in plan.rows)
    pipe.apply(plan.replace(rows=tuple(rows)))
    assert torch.equal(run(), wanted)
    pipe.remove_all_hooks()
    assert torch.equal(run(), wanted)


# -- a VAE that computes in float32 ------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path: Path) -> Any:
    tiny.save("sdxl", tmp_path)
    pipe = tiny.load("sdxl", tmp_path, torch_dtype="auto")
    pipe.vae.half().save_pretrained(tmp_path / "sdxl" / "vae")
    pipe = tiny.load("sdxl", tmp_path, torch_dtype="auto")
    assert pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
    return pipe


def mapped(module: nn.Module) -> bool:
    mappings = Mappings()
    return all(mappings.span(p) is not None for p in module.parameters())


def test_weights_of_half_precision_stay_in_their_file_while_it_computes_in_single(half: Any, tmp_path: Path) -> None:
    vae, x = half.vae, torch.randn(1, 3, 16, 16)
    whole = effusion.AutoencoderKL.from_pretrained(tmp_path / "sdxl" / "vae", torch_dtype=torch.float16).float()
    with torch.no_grad():
        wanted = whole.decode(whole.encode(x).latent_dist.mode()).sample
        with vae.computing_in(torch.float32):
            assert vae.dtype == torch.float32
            got = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert got.dtype == torch.float32 and torch.equal(got, wanted)
    assert vae.dtype == torch.float16 and mapped(vae) and engine_of(vae) is None


def test_a_plan_knows_that_the_vae_computes_in_single_and_leaves_it_alone(half: Any, tmp_path: Path) -> None:
    wanted = tiny.run("sdxl", half)
    assert mapped(half.vae)
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "batch_size": 2, "num_inference_steps": 2, "device": "cpu"}
    plan = half.plan("1GB", **size)
    assert mapped(half.vae) and engine_of(half.vae) is None, "planning has converted weights"
    assert plan.exact and not plan.notes
    convolution = max(p.numel() for n, p in half.vae.named_parameters() if n.startswith("decoder"))
    single = tiny.load("sdxl", tmp_path).plan("1GB", **size)
    activations = {s.name: s.activations for s in single.stages}["vae"]
    stage = next(s for s in plan.stages if s.name == "vae")
    assert activations + 4 * convolution <= stage.activations <= activations + 16 * convolution
    stage_of = {s.name: s for s in plan.stages}
    least = max(s.activations + s.workspaces for s in plan.stages)
    made = half.fit(least + stage_of["unet"].weights // 2, **size)
    assert any(row.home == "disk" for row in made.rows)
    assert torch.equal(tiny.run("sdxl", half), wanted)
    half.vae.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=tmp_path / "off")
    assert torch.equal(tiny.run("sdxl", half), wanted) and mapped(half.vae)
    half.remove_all_hooks()


# -- accelerators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "fresh", "again"),
    [
        (1, 512, 512),
        (1 << 20, 1 << 20, 1 << 20),
        (18 << 20, 18 << 20, 19 << 20),  # nine segments of two
        ((19 << 20) + 100, 20 << 20, (20 << 20) + 512),  # the rest of its last one stays with it
        ((18 << 20) + 100, (18 << 20) + 512, (19 << 20) + 512),
    ],
)
def test_what_the_allocator_takes(nbytes: int, fresh: int, again: int) -> None:
    assert (allocator.fresh(nbytes), allocator.used_again(nbytes)) == (fresh, again)


def test_what_cublas_takes_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator.libraries(CUDA) >= 2 * (8 << 20)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert allocator.libraries(CUDA) == 2 * (128 << 10) + (2 << 20)


def test_workspaces_of_an_accelerator_are_forecast() -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    _, found = rehearsed(net, torch.zeros(1, 64, 128, 128), device=CUDA)
    assert not found.failure
    picture = 64 * 128 * 128 * 4
    assert found.workspaces >= 2 * picture, "cuDNN turns what goes in and what comes out"
    assert found.activations >= 2 * picture + (1 << 20), "what the allocator leaves with a tensor"
    assert not found.kernels
    part = part_of("net", net, found, 1, CUDA)
    assert part.workspaces >= found.workspaces + allocator.libraries(CUDA)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_blocks_alike_are_rehearsed_once(device: torch.device) -> None:
    ran: list[Tensor] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(601, 601)

        def forward(self, x: Tensor) -> Tensor:
            ran.append(x)
            return self.layer(x)  # type: ignore[no-any-return]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    _, found = rehearsed(Chain(), torch.zeros(1000, 601), device=device)
    assert len(ran) == 1 and len(found.touched) == 12
    assert found.activations >= 3 * 1000 * 601 * 4 + (3 << 20) * (device == CUDA)


def test_weights_that_are_never_fetched_count_only_where_they_rest_for_good() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(256, 256), nn.Linear(256, 256)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    net = Half()
    part = part_of("net", net, rehearsed(net, torch.zeros(1, 256), device=CUDA)[1], 1, CUDA)
    costs = {p.name: p.cost for p in part.blocks}
    assert costs["unused"] == 0 < costs["used"]
    assert part.cost >= part.nbytes


def test_reading_a_part_of_a_table_brings_in_that_part() -> None:
    """Pieces of rows that lie apart, each with what the system maps around it; never less than is read."""
    table = torch.empty(1, 100, 100, 1280)
    whole = reach(table)
    crop = table[:, 40:50, 40:50]
    assert crop.nbytes < reach(crop) < whole // 4
    assert reach(table) >= table.nbytes and reach(table.transpose(1, 3)) == whole
    assert reach(table[..., :1]) >= 100 * 100 * 4
    assert reach(torch.zeros(7, 1).expand(7, 50)) >= 28  # strides of nothing
    assert reach(torch.tensor(1.0)) >= 4


def test_parts_of_a_weight_that_are_read_one_by_one_add_up() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4096, 1024))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(x @ part.T for part in self.weight.chunk(8))  # type: ignore[return-value]

    net = Fused()
    found = rehearse({"net": net}, lambda: net(torch.zeros(1, 1024)), torch.device("cpu"))["net"]
    assert found.touched["weight"] == net.weight.nbytes and not found.failure
