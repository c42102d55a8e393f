"""``effusion samplers``: the samplers by the names people know; as a page, or as a picture to choose by."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import registry
from ..core.optional import require
from .usage import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    Run = Callable[[Any, int], Tensor]  # (scheduler, steps) -> the sample it ends with

BUDGETS = (5, 8, 12, 20, 40)  # calls of the network
REFERENCE = ("DPM++ 2M", 1000)
# what follows the probability-flow ODE; a stochastic sampler has no single end to be compared with
DETERMINISTIC = ("Euler", "Heun", "DPM2", "LMS", "DDIM", "PLMS", "DPM++ 2M", "DPM++ 3M", "DPM++ 2S", "UniPC", "DEIS")
SHOWN = ("Normal", "Karras", "Exponential", "Beta")  # Simple is close to Normal, Lu the same as Exponential here
PROMPT = "a large red circle above a small blue square on a white background"
INTRODUCTION = """# Samplers by name

*Made by `effusion samplers --markdown`; edit `src/effusion/schedulers/names.py` and make it again.*

`effusion.schedulers.by_name(name, pipe.scheduler.config)` and `--scheduler name` on the command line understand the
names below: a sampler, optionally followed by a schedule, as in `DPM++ 2M SDE Karras` or `dpmpp_2m_sde karras`. Case,
spaces, `_` and `-` do not matter. The model's noise schedule and prediction type are kept; a model trained by flow
matching gets the class of the last column. `effusion samplers --plot samplers.png` draws how the schedules place their
noise levels, and how fast the deterministic samplers come near their limit.
"""


def add_parser(subparsers: Any) -> None:
    """The verb's arguments."""
    parser = subparsers.add_parser("samplers", help="the samplers that --scheduler knows, and a picture of them")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw noise levels, and errors against calls")
    parser.add_argument("--model", default="demo", help="with --plot: the model whose errors are drawn (default demo)")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/samplers.md")


def run(args: argparse.Namespace) -> None:
    """Print the table, or draw the picture."""
    if args.plot is None:
        print(markdown() if args.markdown else "\n".join(listing()))
        return
    if not args.plot.parent.is_dir():
        raise UsageError(f"--plot {args.plot}: there is no folder {args.plot.parent}; make it first")
    require("matplotlib", "effusion samplers --plot")
    sample, config = _model(args.model)
    plot(args.plot, errors(sample, config), config)
    print(args.plot)


def listing() -> list[str]:
    """The samplers and schedules as lines of text."""
    from ..schedulers.names import SAMPLERS, SPACINGS

    rows = [(r.a1111, ", ".join(r.comfy), r.scheduler, _settings(r.options)) for r in SAMPLERS if r.scheduler]
    rows = [("SAMPLER", "COMFYUI", "CLASS", "SETTINGS"), *rows]
    rows += [("", "", "", ""), ("SCHEDULE", "COMFYUI", "", "SETTINGS")]
    rows += [(s.a1111, ", ".join(s.comfy), "", _settings(s.options)) for s in SPACINGS if s.options is not None]
    widths = [max(len(row[i] or "") for row in rows) for i in range(3)]
    return ["  ".join([*((row[i] or "").ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]


def _settings(options: Any, mark: str = "") -> str:
    return ", ".join(f"{mark}{key}={value!r}{mark}" for key, value in (options or {}).items())


def markdown() -> str:
    """The page of all names: which class and settings each is."""
    from ..schedulers.names import SAMPLERS, SPACINGS

    def code(names: Iterable[str]) -> str:
        return ", ".join(f"`{name}`" for name in names) or "–"

    known = [r for r in SAMPLERS if r.scheduler]
    samplers = [(r.a1111, code(r.comfy), f"`{r.scheduler}`", _settings(r.options, "`") or "–",
                 f"`{r.flow}`" if r.flow else "–") for r in known]  # fmt: skip
    spacings = [(s.a1111, code(s.comfy), _settings(s.options, "`")) for s in SPACINGS if s.options is not None]
    missing = [(m.a1111, code(m.comfy), m.nearest) for m in SAMPLERS if not m.scheduler]
    missing += [(m.a1111, code(m.comfy), m.nearest) for m in SPACINGS if m.options is None]
    named = {r.scheduler for r in known} | {r.flow for r in known}
    others = [n for n in registry.names_under("effusion.schedulers") if n.endswith("Scheduler") and n not in named]
    return "\n\n".join([
        INTRODUCTION.rstrip(),
        "## Samplers\n\n" + _table(("A1111", "ComfyUI", "class", "settings", "flow matching"), samplers),
        "## Schedules\n\n" + _table(("A1111", "ComfyUI", "settings"), spacings),
        "## Without an equivalent\n\n" + _table(("A1111", "ComfyUI", "nearest"), missing),
        f"## Classes without a popular name\n\n{code(sorted(others))}",
    ])  # fmt: skip


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- the picture -----------------------------------------------------------------------------------


def _model(name: str) -> tuple[Run, dict[str, Any]]:
    """How to sample a model from always the same noise, and its scheduler's configuration."""
    import torch

    from .. import DiffusionPipeline
    from .generate import model_path

    pipe: Any = DiffusionPipeline.from_pretrained(model_path(name))
    pipe.set_progress_bar_config(disable=True)
    config = dict(pipe.scheduler.config)

    def sample(scheduler: Any, steps: int) -> Tensor:
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        made = pipe(PROMPT, num_inference_steps=steps, generator=generator, output_type="latent")
        latents: Tensor = made.images
        return latents

    return sample, config


def errors(sample: Run, config: Any, budgets: Iterable[int] = BUDGETS) -> dict[str, list[tuple[int, float]]]:
    """Sampler -> (calls of the network, distance to the end of the reference relative to its size)."""
    from ..schedulers import by_name

    name, steps = REFERENCE
    reference = sample(by_name(name, config), steps)
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in DETERMINISTIC:
        curves[name] = []
        for budget in budgets:
            scheduler = by_name(name, config)
            end = sample(scheduler, (budget + scheduler.order - 1) // scheduler.order)
            distance = float((end - reference).norm() / reference.norm())
            curves[name].append((len(scheduler.timesteps), distance))
    return curves


def plot(file: Path, curves: dict[str, list[tuple[int, float]]], config: Any, steps: int = 20) -> None:
    """Draw both panels to ``file``; its ending says the format."""
    figure_class = require("matplotlib.figure", "effusion samplers --plot").Figure
    figure = figure_class(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, levels in noise_levels(config, steps).items():
        left.semilogy(range(len(levels)), levels, marker=".", label=name)
    left.set(title=f"Noise levels of {steps} steps", xlabel="step", ylabel="noise to signal, σ")
    colours = require("matplotlib", "effusion samplers --plot").colormaps["tab20"].colors
    for (name, points), colour in zip(curves.items(), colours, strict=False):
        calls, distances = zip(*points, strict=True)
        right.loglog(calls, distances, marker=".", color=colour, label=name)
    ticks = [calls for calls, _ in next(iter(curves.values()))]
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.set(title=f"Distance to {REFERENCE[1]} steps of {REFERENCE[0]}", xlabel="calls of the network",
              ylabel="relative to the sample")  # fmt: skip
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise UsageError(f"--plot {file}: {error}") from error


def noise_levels(config: Any, steps: int) -> dict[str, list[float]]:
    """Schedule -> its noise levels, without the zero at the end."""
    from ..schedulers import by_name

    found = {}
    for name in SHOWN:
        scheduler: Any = by_name(f"DPM++ 2M {name}", {k: v for k, v in config.items() if k != "steps_offset"})
        scheduler.set_timesteps(steps)
        found[name] = [s for s in scheduler.sigmas.tolist() if s > 0]
    return found
