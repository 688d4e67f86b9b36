"""The codebook of a vq autoencoder: usage counts, k-means initialisation, and revival of dead rows.

All ranks hold the same counts, choose the same rows and write the same values, whatever the number of ranks: candidates
are numbered by the samples' positions in the data, and the rank that holds one sends it to the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ldmscale.distributed.collectives import gather_lists, sum_tensor_over_ranks
from ldmscale.distributed.rng import shuffled
from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine

log = logging.getLogger(__name__)

PARAMETER = "quantize.embedding"
_BLOCK = 8192  # latents compared with the table at a time
_MOMENTS = ("exp_avg", "exp_avg_sq")


class CodebookOptions(Protocol):
    """The `codebook` section of the configuration."""

    @property
    def start(self) -> Literal["uniform", "kmeans"]: ...
    @property
    def kmeans_rounds(self) -> int: ...
    @property
    def revive_after_steps(self) -> int: ...
    @property
    def usage_window_steps(self) -> int: ...
    @property
    def alarm_usage(self) -> float: ...


class CodebookMonitor:
    """Counts the choices of every step over all ranks, and rewrites the table where the options ask for it."""

    def __init__(
        self,
        engine: Engine,
        *,
        averages: Sequence[ShardedEma],
        size: int,
        options: CodebookOptions,
        seed: int,
    ) -> None:
        """`size`: rows of the table."""
        self.engine, self.size, self.options, self.seed = engine, size, options, seed
        self.averages = averages
        # Steps since each row was chosen; on the device, as all that follows from it: a step does not wait for it.
        self.idle = torch.zeros(size, dtype=torch.int64, device=engine.device)
        self._counts = torch.zeros(size, dtype=torch.int64, device=engine.device)
        self._passes = 0

    def prepare(self, step: int, positions: Sequence[int], latents: Callable[[], Tensor]) -> None:
        """Before the first pass of a step: start or revive rows on the present latents. Collective.

        `latents` gives this rank's latents [B,C,h,w] of the samples at `positions`; it is called on all ranks or none.
        """
        every = self.options.revive_after_steps
        if step == 0 and self.options.start == "kmeans":
            pool = _Pool(positions, latents())
            rows = torch.arange(self.size)
            centres = kmeans(pool, self.size, self.options.kmeans_rounds, self.seed)
            overwrite_rows(self.engine, PARAMETER, rows, centres, self.averages)
            log.info("the codebook starts at %d centres of %d latents", len(rows), pool.total)
        elif every and step and step % every == 0:
            dead = torch.nonzero(self.idle >= every).flatten()  # equal on all ranks, as the counts are
            if not len(dead):
                return
            pool = _Pool(positions, latents())
            dead = dead[: pool.total]
            chosen = torch.from_numpy(shuffled(pool.total, self.seed, step, "codebook/revive"))[: len(dead)]
            overwrite_rows(self.engine, PARAMETER, dead, pool.pick(chosen), self.averages)
            self.idle[dead] = 0
            log.info("step %d: %d dead rows of the codebook were put on present latents", step, len(dead))

    def count(self, indices: Tensor, step: int) -> dict[str, Tensor]:
        """Take in the choices [B,h,w] of one pass; at the end of a step its metrics over all ranks. Collective then."""
        chosen = indices.flatten()
        self._counts.scatter_add_(0, chosen, torch.ones_like(chosen))  # bincount would wait for the largest
        self._passes += 1
        if self._passes < self.engine.options.accumulation_steps:
            return {}
        counts = sum_tensor_over_ranks(self._counts)
        self._counts.zero_()
        self._passes = 0
        self.idle = torch.where(counts > 0, 0, self.idle + 1)
        shares = counts.double() / counts.sum()
        perplexity = torch.exp(-torch.special.xlogy(shares, shares).sum())
        usage = (self.idle < self.options.usage_window_steps).double().mean()
        window = self.options.usage_window_steps
        alarm = (usage < self.options.alarm_usage) & (step + 1 >= window)
        if (step + 1) % window == 0 and bool(alarm):  # waits, once per window
            log.warning(
                "the codebook collapses: %.1f%% of its rows were chosen in the last %d steps, perplexity %.1f; "
                "see docs/autoencoder.md (codebook.start=kmeans, codebook.revive_after_steps)",
                100 * float(usage), window, float(perplexity),
            )  # fmt: skip
        return {
            "codebook/perplexity": perplexity,
            "codebook/usage": usage,
            "codebook/chosen": (counts > 0).double().mean(),
            "codebook/alarm": alarm.float(),
        }

    def state(self) -> dict[str, Any]:
        return {"idle": self.idle.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.idle = torch.tensor(state["idle"], dtype=torch.int64, device=self.engine.device)


class _Pool:
    """The latents of all ranks, numbered by sample and place; each rank holds its own. Construction is collective."""

    def __init__(self, positions: Sequence[int], latents: Tensor) -> None:
        self.places = latents.shape[2] * latents.shape[3]
        self.values = latents.detach().float().movedim(1, -1).reshape(len(positions), self.places, -1)
        order = {position: number for number, position in enumerate(sorted(gather_lists(positions)))}
        self.numbers = {order[position]: row for row, position in enumerate(positions)}
        self.total = len(order) * self.places

    def pick(self, chosen: Tensor) -> Tensor:
        """The latents [n,C] with the numbers `chosen` [n], on every rank. Collective; exact, since all but one add zero."""
        found = torch.zeros(len(chosen), self.values.shape[-1], device=self.values.device)
        for at, number in enumerate(chosen.tolist()):
            row = self.numbers.get(number // self.places)
            if row is not None:
                found[at] = self.values[row, number % self.places]
        return sum_tensor_over_ranks(found)

    def flat(self) -> Tensor:
        return self.values.reshape(-1, self.values.shape[-1])  # [n,C]


def kmeans(pool: _Pool, size: int, rounds: int, seed: int) -> Tensor:
    """Centres [size,C] of all ranks' latents by Lloyd's rounds from randomly chosen ones. Collective.

    With fewer latents than centres some are chosen twice: the later one is never the nearest and stays free to be revived.
    """
    order = torch.from_numpy(shuffled(pool.total, seed, 0, "codebook/kmeans"))
    centres = pool.pick(order[torch.arange(size) % pool.total])
    latents = pool.flat()
    for _ in range(rounds):
        sums, counts = torch.zeros_like(centres), torch.zeros(size, device=centres.device)
        for block in torch.split(latents, _BLOCK):
            nearest = torch.addmm(centres.square().sum(1), block, centres.t(), alpha=-2.0).argmin(1)
            sums.index_add_(0, nearest, block)
            counts.index_add_(0, nearest, torch.ones(len(nearest), device=counts.device))
        sums, counts = sum_tensor_over_ranks(sums), sum_tensor_over_ranks(counts)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


@torch.no_grad()
def overwrite_rows(
    engine: Engine, name: str, rows: Tensor, values: Tensor, averages: Sequence[ShardedEma] = ()
) -> None:
    """Set the rows `rows` (int64 [n]) of the parameter `name` [K, ...] to `values` [n, ...]. Collective under ZeRO.

    The value that training uses is the fp32 master in the shards of its owner; a gathered or half-precision copy would be
    overwritten at the next update. The optimiser's moments of the rows belong to the old values and are cleared. Averages
    take the new values, since averaging towards them would take thousands of updates.

    Every rank gives the same rows and values, between two accumulation windows.

    Raises:
        KeyError: the network has no such trained parameter.
        RuntimeError: gradients of a window are waiting, or averaged weights are in place.
    """
    engine.refuse_averaged("overwrite_rows")
    if not engine.at_boundary:
        raise RuntimeError(f"{name} of {engine.name} cannot be written inside an accumulation window")
    parameter = dict(engine.network.named_parameters()).get(name)
    if parameter is None or not parameter.requires_grad:
        raise KeyError(f"{engine.name} has no trained parameter {name}")
    whole = engine.shapes()[name]
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
    engine.layout.sync_params_from_master()
