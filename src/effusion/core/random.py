"""Random tensors that depend on the seed only, not on the device that computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn_tensor(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> torch.Tensor:
    """Normal noise of ``shape``; drawn on the generator's device, then moved to ``device``.

    A CPU generator therefore gives the same image on every machine. A list of generators gives
    each item of the batch its own stream: item ``i`` does not depend on the size of the batch.

    Raises:
        ValueError: a list of generators whose length is not the batch size, or a generator of an
            accelerator asked to fill a tensor of another device.
    """
    device = torch.device(device or "cpu")
    layout = layout or torch.strided
    shape = tuple(shape)
    if isinstance(generator, (list, tuple)):
        if len(generator) == 1:
            generator = generator[0]
        elif len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one, or one for each item")
        else:
            one = (1, *shape[1:])
            return torch.cat([randn_tensor(one, g, device, dtype, layout) for g in generator], dim=0)
    assert generator is None or isinstance(generator, torch.Generator)
    source = generator.device if generator is not None else device
    if source.type not in ("cpu", device.type):
        raise ValueError(f"a generator on {source} can't make noise for {device}; use a CPU generator or one there")
    if generator is None and device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype, layout=layout)
    return torch.randn(shape, generator=generator, device=source, dtype=dtype, layout=layout).to(device)
