"""The random numbers that come with a batch are those of seed, position and purpose, in whatever process they are drawn."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldmscale.data.loading.draws import BatchDraws, Draws
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.setup.node_checks import bytes_of_sample

ITEM = ImageItem(8, seed=5)
DRAWS = BatchDraws(
    7, channels=4, factor=4, normal=("noise", "posterior"), per_channel=("offset",), uniform=("timestep",)
)


def philox(position: int, purpose: str) -> np.random.Generator:
    """As the documentation of the draws states it: key (seed, crc32 of the purpose), the position in the third word."""
    key = np.array([7, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_brings_the_draws_of_its_positions(
    tmp_path: Path, write_shards: Callable[..., list[str]], workers: int
) -> None:
    index = ShardIndex.open(write_shards(tmp_path / "set", [4, 4]), build_missing=True)
    loader = Loader(
        index, ITEM, seed=7, rank=1, world=2, global_batch=8, rank_micro_batch=2, workers=workers, draws=DRAWS
    )  # fmt: skip
    try:
        batches = [next(loader) for _ in range(3)]
    finally:
        loader.close()
    assert batches[0]["position"].tolist() == [4, 5] and batches[2]["position"].tolist() == [12, 13]
    for batch in batches:
        for row, position in enumerate(batch["position"].tolist()):
            for purpose, shape in (("noise", (4, 2, 2)), ("posterior", (4, 2, 2)), ("offset", (4, 1, 1))):
                expected = philox(position, purpose).standard_normal(shape, dtype=np.float32)
                np.testing.assert_array_equal(batch[f"draw/{purpose}"][row].numpy(), expected)
            assert float(batch["draw/timestep"][row]) == philox(position, "timestep").random()


def test_draws_of_a_batch_are_taken_and_missing_ones_drawn() -> None:
    given = torch.full((2, 4, 2, 2), 3.0)
    drawn = Draws.of({"position": torch.tensor([4, 9]), "draw/noise": given}, seed=7)
    assert torch.equal(drawn.normal("noise", (4, 2, 2)), given)
    missing = drawn.normal("posterior", (3,))[1].numpy()
    np.testing.assert_array_equal(missing, philox(9, "posterior").standard_normal(3, dtype=np.float32))
    assert float(drawn.uniform("drop")[0]) == philox(4, "drop").random()
    with pytest.raises(ValueError, match=r"'noise' of shape \(4, 2, 2\), and \(4, 4, 4\) is needed"):
        drawn.normal("noise", (4, 4, 4))


def test_shapes_follow_latents_where_there_are_some() -> None:
    made = DRAWS.of({"position": torch.tensor([3]), "latent": torch.zeros(1, 8, 5, 6)})
    assert made["draw/noise"].shape == (1, 4, 5, 6) and made["draw/offset"].shape == (1, 4, 1, 1)


def test_shared_memory_counts_the_draws() -> None:
    # Two maps of 4 channels at 2x2 positions in fp32, and 3 x 8 x 8 bytes of the image.
    assert bytes_of_sample(ITEM, DRAWS) == 3 * 8 * 8 + 2 * 4 * 2 * 2 * 4
