"""Normal noise that a seed repeats on every machine."""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit normal noise. One generator draws the batch at once; a list draws one sample of it each.

    A CPU generator draws on the CPU whatever `device` is, so that a seed means one image on every machine.
    Raises ValueError when the list is not as long as the batch, or a generator is of another accelerator.
    """
    device = torch.device(device)
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"generator is a list of {len(generator)}, but there are {shape[0]} images (one each)"
            )
        return torch.cat([draw_noise((1, *shape[1:]), one, device, dtype) for one in generator])
    source = device if generator is None else generator.device
    if source.type not in ("cpu", device.type):
        raise ValueError(f"a generator on {source} cannot draw for {device}: use one on the CPU")
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
