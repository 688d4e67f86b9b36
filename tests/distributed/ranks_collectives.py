"""Two gloo ranks go through every collective; started by test_collectives.py, ends with 0 if all is as it
should be.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from ldmscale.distributed import collectives
from ldmscale.distributed.environment import read_ranks
from ldmscale.distributed.preemption import StopFlag
from ldmscale.distributed.process_group import close_world, open_world
from ldmscale.tracking.metrics import MetricSums

ranks = read_ranks()
with StopFlag().install() as stop:
    world = open_world(ranks)
    rank = world.rank
    assert world.size == 2 and world.device.type == "cpu" and world.backend == "gloo"

    assert collectives.any_true(rank == 1)
    assert not collectives.any_true(False)
    assert collectives.sum_over_ranks(2**40 + rank) == 2**41 + 1
    assert collectives.max_over_ranks(-float(rank)) == 0.0
    assert collectives.gather_lists([rank] * (rank + 1)) == [0, 1, 1]
    assert collectives.broadcast_object(f"from {rank}") == "from 0"
    # keys of one rank only are averaged over that rank
    means = collectives.mean_over_ranks({"both": float(rank), f"only {rank}": 7.0 + rank})
    assert means == {"both": 0.5, "only 0": 7.0, "only 1": 8.0}, means
    tensor = torch.full((2, 3), float(rank))
    assert torch.equal(collectives.mean_tensor_over_ranks(tensor), torch.full((2, 3), 0.5))
    assert torch.equal(tensor, torch.full((2, 3), float(rank)))

    # 1 micro-batch of 2 samples on rank 0 and 3 of 2 on rank 1: the mean is over samples, not over ranks
    sums = MetricSums()
    for _ in range(1 + 2 * rank):
        sums.add({"loss/total": torch.tensor(float(rank), dtype=torch.bfloat16)}, weight=2.0)
    assert sums.mean() == {"loss/total": 0.75}
    assert sums.mean() == {}

    assert not stop.agreed()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.agreed()
    assert stop.requested == (rank == 1)
    collectives.barrier()

    # the other rank hangs: with the short timeout it is noticed before the world's own half hour is over
    collectives.set_collective_timeout(1.0)
    noticed = Path(sys.argv[1])
    if rank == 1:
        end = time.monotonic() + 300
        while not noticed.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert noticed.exists()
    else:
        failed = False
        try:
            collectives.any_true(False)
        except RuntimeError:
            failed = True
        assert failed
        noticed.touch()
    close_world()
