"""One rank alone: devices, and collectives that are trivial."""

import pytest
import torch

from ldmscale.distributed import collectives
from ldmscale.distributed.devices import choose_device
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.process_group import choose_backend, close_world, open_world


def test_the_cpu_is_taken_when_asked_for():
    assert choose_device(Ranks(), {"DS_ACCELERATOR": "cpu"}) == torch.device("cpu")


def test_gpus_talk_by_nccl_and_cpus_by_gloo():
    assert choose_backend(torch.device("cuda", 0)) == "nccl"
    assert choose_backend(torch.device("cpu")) == "gloo"


def test_one_rank_needs_no_process_group():
    world = open_world(Ranks())
    try:
        assert not torch.distributed.is_initialized()
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
    finally:
        close_world()


def test_collectives_of_one_rank_give_back_what_they_get():
    collectives.barrier()
    assert collectives.any_true(True) and not collectives.any_true(False)
    assert collectives.sum_over_ranks(3) == 3.0
    assert collectives.max_over_ranks(-2.5) == -2.5
    assert collectives.mean_over_ranks({"a": 1.0}) == {"a": 1.0}
    assert collectives.gather_lists(["x", 1]) == ["x", 1]
    assert collectives.broadcast_object({"k": 1}) == {"k": 1}
    assert torch.equal(collectives.mean_tensor_over_ranks(torch.ones(2)), torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_ranks_than_gpus_are_refused():
    from ldmscale.errors import ConfigError

    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=cpu"):
        choose_device(Ranks(rank=count, size=count + 1, local_rank=count, local_size=count + 1), {})
