"""An edited model's changed entries alone: a few megabytes beside the unedited weights, exact to the bit."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

INT32 = 2**31


def changed_entries(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of parameters of equal names: NAME.indices (m,) into the flat parameter, ascending, NAME.values (m,).

    Values are those after, in its dtype, not differences: put in place they give the same bits. A parameter
    without a change is left out.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in after.items():
        flat = value.detach().flatten()
        start = before[name].detach().to(value.dtype).flatten()
        as_bits = torch.uint8  # so that 0 and -0 differ, and NaN is itself
        differ = (flat.view(as_bits) != start.view(as_bits)).reshape(len(flat), -1).any(dim=1)
        indices = differ.nonzero().flatten()
        if len(indices):
            small = torch.int32 if len(flat) < INT32 else torch.int64
            tensors[f"{name}.indices"], tensors[f"{name}.values"] = indices.to(small), flat[indices]
    return tensors


def with_entries(before: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The changed parameters after, one by one; ValueError if the entries are of another model."""
    for key in entries:
        name = key.removesuffix(".indices")
        if key == name:
            continue
        if name not in before:
            raise ValueError(f"parameter {name!r} is not in the model; the entries are of another one")
        values, indices = entries[f"{name}.values"], entries[key].long()
        after = before[name].detach().to(values.dtype, copy=True)
        if int(indices.max()) >= after.numel():
            raise ValueError(
                f"parameter {name!r} has {after.numel()} entries; the changed ones are of another"
            )
        after.view(-1)[indices.to(after.device)] = values.to(after.device)
        yield name, after
