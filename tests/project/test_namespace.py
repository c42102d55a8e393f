"""Every public name resolves, under our paths and the ecosystem's; files are as the habits want them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import effusion
from effusion.core import aliases, registry
from effusion.core.optional import EXTRAS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "effusion"
FILES = sorted(SOURCE.rglob("*.py"))
LONG, TOO_LONG = 300, 600  # lines


OWN = sorted(name for name, home in registry.public_names().items() if home.startswith("effusion."))


@pytest.mark.parametrize("name", OWN)  # examples that were imported before have put theirs in the registry too
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(effusion, name)
    assert getattr(value, "__name__", name) == name
    module = getattr(value, "__module__", None)
    assert module is None or module.startswith("effusion.")
    assert name in dir(effusion)


def test_a_public_name_has_one_home() -> None:
    names = [name for names in registry.MODULES.values() for name in names]
    assert len(names) == len(set(names))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchPipeline"):
        effusion.NoSuchPipeline  # noqa: B018


@pytest.mark.parametrize("name", registry.SUBMODULES)
def test_submodules_resolve(name: str) -> None:
    assert getattr(effusion, name).__name__ == f"effusion.{name}"


def test_classes_have_the_same_paths_as_in_the_peer() -> None:
    """``from diffusers.some.path import Class`` works with the library's name replaced."""
    peer = pytest.importorskip("diffusers")
    missing = []
    for name in registry.public_names():
        if not hasattr(peer, name) or not isinstance(getattr(peer, name), type):
            continue
        path = getattr(peer, name).__module__.replace("diffusers", "effusion", 1)
        try:
            if getattr(importlib.import_module(path), name) is not getattr(effusion, name):
                missing.append(f"{path}.{name} is another object")
        except (ImportError, AttributeError) as error:
            missing.append(f"{path}.{name}: {error}")
    assert missing == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("configuration_utils", "register_to_config"),
        ("image_processor", "PipelineImageInput"),
        ("utils.loading_utils", "load_image"),
        ("utils.export_utils", "export_to_gif"),
        ("utils.logging", "get_logger"),
        ("utils.outputs", "BaseOutput"),
        ("utils.pil_utils", "make_image_grid"),
        ("utils.torch_utils", "randn_tensor"),
        ("models.modeling_utils", "ModelMixin"),
        ("models.attention_processor", "Attention"),
        ("models.embeddings", "Timesteps"),
        ("models.normalization", "RMSNorm"),
        ("models.resnet", "ResnetBlock2D"),
        ("models.autoencoders.vae", "DiagonalGaussianDistribution"),
        ("models.unets", "UNet2DConditionModel"),
        ("models.unets.unet_2d_condition", "UNet2DConditionOutput"),
        ("models.unet_2d_condition", "UNet2DConditionModel"),
        ("pipelines.stable_diffusion", "StableDiffusionPipelineOutput"),
        ("pipelines.stable_diffusion.safety_checker", "StableDiffusionSafetyChecker"),
        ("pipelines.pipeline_utils", "ImagePipelineOutput"),
        ("schedulers.scheduling_utils", "SchedulerMixin"),
        ("schedulers.scheduling_ddim", "DDIMSchedulerOutput"),
        ("callbacks", "PipelineCallback"),
        ("modular_pipelines", "ModularPipeline"),
    ],
)
def test_the_ecosystems_paths_resolve(path: str, name: str) -> None:
    module = importlib.import_module(f"effusion.{path}")
    assert getattr(module, name) is not None
    assert dir(module)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("path", ["nothing", "models.nothing", "pipelines.nothing", "schedulers.nothing"])
def test_other_paths_do_not_exist(path: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"effusion.{path}")


def test_every_rule_leads_somewhere() -> None:
    for _, homes in aliases.RULES:
        for home in homes:
            importlib.import_module(f"effusion.{home}")


def test_names_of_utils_equal_the_peers() -> None:
    peer = pytest.importorskip("diffusers.utils")
    ours = importlib.import_module("effusion.utils")
    for name in ours.__all__:
        value = getattr(ours, name)
        if isinstance(value, ModuleType):
            assert importlib.util.find_spec(f"diffusers.utils.{name}") is not None
        elif not hasattr(peer, name):
            assert name in ("is_imageio_available",), f"{name} is not a name of the peer"
        elif isinstance(value, str):
            assert value == getattr(peer, name)
        elif name.startswith("is_") and name.endswith("_available"):
            assert value() == getattr(peer, name)(), name


def test_version_questions() -> None:
    from effusion.utils import check_min_version, is_peft_version, is_torch_version

    assert is_torch_version(">=", "2.9")
    assert not is_torch_version("<", "2.0")
    assert not is_peft_version("==", "0.0.1")
    check_min_version("0.30.0.dev0")
    with pytest.raises(ImportError, match=r"99\.0"):
        check_min_version("99.0")
    with pytest.raises(ValueError, match="allowed are"):
        is_torch_version("~", "2.0")


def test_deprecate_and_docstrings() -> None:
    from effusion.utils import deprecate, replace_example_docstring

    kwargs = {"old": 3, "other": 4}
    with pytest.warns(FutureWarning, match="`old` is deprecated.*use new"):
        assert deprecate("old", "1.0", "use new", take_from=kwargs) == 3
    assert kwargs == {"other": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert deprecate("absent", "1.0", "use new", take_from=kwargs) is None

    @replace_example_docstring("an example")
    def function() -> None:
        """What it does.

        Examples:
        """

    assert "an example" in (function.__doc__ or "")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_files_are_as_the_habits_want(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says in its first line what it is"
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert "diffusers" not in imported, "the peer is an oracle for tests, never a dependency"
    assert text.count("\n") <= TOO_LONG, f"more than {TOO_LONG} lines: two rooms in one file"


def test_extras_are_declared() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


def test_a_wildcard_import_and_reload_leave_the_finder_alone() -> None:
    code = "import importlib, sys, effusion; n = len(sys.meta_path); importlib.reload(effusion); "
    code += "assert len(sys.meta_path) == n; import effusion.image_processor as i; assert i.VaeImageProcessor"
    subprocess.run([sys.executable, "-c", code], check=True)
