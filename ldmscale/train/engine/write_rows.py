"""Writes chosen rows of a trained parameter from outside the optimiser, in the shards of whoever owns them.

The value that training sees is the fp32 master; a gathered or half-precision copy that is written instead is
overwritten at the next update. The optimiser's moments of what is written belong to the old values and are cleared,
and averages take the new ones: averaging towards them over thousands of updates would help nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine

_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def overwrite_rows(
    engine: Engine, name: str, rows: Tensor, values: Tensor, averages: Sequence[ShardedEma] = ()
) -> None:
    """Set the rows `rows` (int64 [n]) of the parameter `name` [K, ...] to `values` [n, ...]. Collective under ZeRO.

    Every rank gives the same rows and values, between two accumulation windows.

    Raises:
        KeyError: the network has no such trained parameter.
        RuntimeError: gradients of a window are waiting, or averaged weights are in place.
    """
    engine.refuse_averaged("overwrite_rows")
    if not engine.at_boundary:
        raise RuntimeError(f"{name} of {engine.name} cannot be written inside an accumulation window")
    shape = next((p for n, p in engine.network.named_parameters() if n == name and p.requires_grad), None)
    if shape is None:
        raise KeyError(f"{engine.name} has no trained parameter {name}")
    whole = torch.Size(getattr(shape, "ds_shape", shape.shape))
    values = values.detach().to(engine.device, torch.float32)
    fresh = torch.zeros(whole, device=engine.device).index_copy_(0, rows.to(engine.device), values).view(-1)
    chosen = torch.zeros(whole, dtype=torch.bool, device=engine.device)
    chosen[rows.to(engine.device)] = True
    chosen = chosen.view(-1)
    states = engine.base_optimizer.state
    for fragment in engine.fragments():
        if fragment.name != name:
            continue
        part = slice(fragment.offset, fragment.offset + fragment.numel)
        here, new = chosen[part], fresh[part]
        master = engine.masters[fragment.flat]
        moments = states.get(master, {})
        for tensor in (master, *(average.averages[fragment.flat] for average in averages)):
            held = fragment.of(tensor)
            held.copy_(torch.where(here, new, held))
        for kind in _MOMENTS:
            if kind in moments:
                fragment.of(moments[kind]).masked_fill_(here, 0.0)
    engine.layout.publish()
