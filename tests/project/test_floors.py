"""Imports go down only: the floors of the design, held over the syntax tree, function-level imports included."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "effusion"

GROUND = {"core"}
FIRST = {"nn", "schedulers", "weights", "quant"}
# room -> the other rooms that it may import
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "nn": GROUND,
    "schedulers": GROUND,
    "weights": GROUND | {"quant"},  # files name the codecs of what is packed in them
    "quant": GROUND,
    "placement": GROUND | {"weights", "quant"},
    "models": GROUND | {"nn"},  # the face of models is the exception below
    "adapters": GROUND | {"models", "weights", "placement", "nn"},
    "blocks": GROUND | {"schedulers"},
    "families": GROUND | FIRST | {"placement", "models", "adapters", "blocks"},
}
ALLOWED["pipelines"] = ALLOWED["training"] = ALLOWED["families"] | {"families"}
TOP = ALLOWED["families"] | {"families", "pipelines", "training", "cli", "serve", "demo"}
ALLOWED["cli"] = ALLOWED["serve"] = ALLOWED["demo"] = TOP | {"effusion"}
FACADES = {"utils"}  # re-exports for scripts: above everything, imported by nothing
# the one face of networks: reaches weights and placement, in two files
FACE = {"models.base", "models.foreign"}
# what a network file may import from its own room
SHARED = ("models.base", "models.modeling_outputs")
# networks that are made of another one's parts, or are its older name, and what finds out the class of any
MADE_OF = {
    "models.auto_model": ("models.foreign",),
    "models.controlnet": ("models.unet_2d_condition",),
    "models.controlnet_flux": ("models.transformer_flux",),
    "models.controlnet_sd3": ("models.transformer_sd3",),
    "models.transformer_2d": ("models.transformer_dit", "models.transformer_pixart"),
    "models.transformer_dit": ("models.transformer_2d",),
    "models.transformer_pixart": ("models.transformer_2d",),
}


def module_of(path: Path) -> tuple[str, bool]:
    """Dotted name below ``effusion`` and whether it is a package."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if package else parts), package


def imports_of(module: str, package: bool, tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name below ``effusion``; ``""`` is the package itself) of every import of the library."""
    full = f"effusion.{module}".rstrip(".")
    base = full if package else full.rpartition(".")[0]
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), base)
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                found.append((node.lineno, importlib.util.resolve_name(target.value, base)))
    return [(line, name.partition(".")[2]) for line, name in found if name.split(".")[0] == "effusion"]


def room_of(name: str) -> str:
    """The room that an imported name is in; ``effusion`` for names of the top package."""
    room = name.split(".")[0]
    return room if (SOURCE / room).is_dir() and room else "effusion"


def violations(path: Path, text: str) -> list[str]:
    module, package = module_of(path)
    room = room_of(module)
    if module == "__main__":
        return []
    if room == "effusion":  # the top package: only the ground floor, everything else lazily by the registry
        allowed = GROUND
    elif room in FACADES:
        return []
    else:
        allowed = ALLOWED[room] | {room} | ({"weights", "placement"} if module in FACE else set())
    answer = []
    for line, name in imports_of(module, package, ast.parse(text)):
        target = room_of(name)
        if name == "__version__":
            continue
        if target not in allowed:
            answer.append(f"{path.name}:{line} {room} imports {name or 'the top package'}")
        shared = (*SHARED, *MADE_OF.get(module, ()))
        if room == target == "models" and not package and module not in FACE and not name.startswith(shared):
            answer.append(f"{path.name}:{line} the network imports {name}; parts that are shared live in nn/")
    return answer


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_go_down(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


def test_every_room_has_a_floor() -> None:
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(ALLOWED) | FACADES


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/x.py", "from ..nn import norms"),
        ("core/x.py", "def f():\n    from effusion.weights import files"),
        ("nn/x.py", "import effusion.schedulers.base"),
        ("nn/x.py", "from effusion import StableDiffusionPipeline"),
        ("quant/x.py", "import importlib\nimportlib.import_module('effusion.weights.files')"),
        ("models/x.py", "from ..weights import files"),
        ("models/x.py", "from .unet import parts"),
        ("blocks/x.py", "from ..models.base import ModelMixin"),
        ("families/x.py", "from ..pipelines import base"),
        ("training/x.py", "from ..pipelines import base"),
        ("pipelines/x.py", "from ..utils import load_image"),
        ("__init__.py", "from .models import base"),
    ],
)
def test_a_step_up_is_found(file: str, text: str) -> None:
    assert violations(SOURCE / file, text)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("nn/x.py", "from ..core import log\nfrom .norms import RMSNorm\nfrom .. import __version__"),
        ("models/x.py", "from ..nn import norms\nfrom .base import ModelMixin"),
        ("models/base.py", "def f():\n    from ..weights import checkpoint"),
        ("cli/x.py", "from ..demo import data\nimport effusion"),
        ("utils/x.py", "from ..pipelines import base"),
    ],
)
def test_a_step_down_is_allowed(file: str, text: str) -> None:
    assert violations(SOURCE / file, text) == []
