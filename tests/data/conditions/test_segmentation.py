"""Maps of classes: the view of their image, and maps that cannot be used."""

import io

import numpy as np
import pytest
from PIL import Image

from ldmscale.data.conditions.segmentation import ClassMaps, nearest
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.reader import Sample
from ldmscale.errors import DataError


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def told(image: np.ndarray, numbers: np.ndarray) -> Sample:
    return Sample("a", "a.tar", {"png": png(image), "map.png": png(numbers)})


def test_a_map_is_cropped_and_mirrored_as_its_image():
    blocks = np.random.default_rng(0).integers(0, 5, (4, 6)).astype(np.uint8)
    numbers = np.kron(blocks, np.ones((8, 8), np.uint8))
    given = told(np.repeat((50 * numbers)[:, :, None], 3, axis=2), numbers)
    item = ImageItem(32, 3, crop="random", flip=True, maps=ClassMaps("map.png", 5, 1.0))
    seen = set()
    for position in range(20):
        made = item(given, position)
        assert np.array_equal(made["image"][0], 50 * made["spatial"])
        seen.add(made["spatial"].tobytes())
    assert len(seen) > 10


def test_a_map_has_the_size_that_the_rescaler_wants():
    numbers = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(nearest(numbers, 8, 8), numbers)
    assert np.array_equal(nearest(numbers, 16, 16), np.kron(numbers, np.ones((2, 2), np.uint8)))
    item = ImageItem(8, 0, maps=ClassMaps("map.png", 64, 0.5))
    made = item(told(np.zeros((8, 8, 3), np.uint8), numbers), 0)
    assert made["spatial"].shape == (4, 4) and made["spatial"].dtype == np.int64


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "has no map.png member"),
        ({"map.png": png(np.full((8, 8), 5, np.uint8))}, "has the number 5: there are 5 classes"),
        ({"map.png": png(np.zeros((8, 9), np.uint8))}, "has 9x8 pixels, its image 8x8"),
        ({"map.png": png(np.zeros((8, 8, 3), np.uint8))}, "is a RGB picture"),
        ({"map.png": b"GIF89a"}, "is no PNG"),
    ],
)
def test_a_bad_map_is_a_bad_sample(members, reason):
    item = ImageItem(8, 0, maps=ClassMaps("map.png", 5, 1.0))
    with pytest.raises(DataError, match=reason):
        item(Sample("a", "a.tar", {"png": png(np.zeros((8, 8, 3), np.uint8)), **members}), 0)


def test_a_deep_map_gives_its_numbers():
    numbers = np.array([[0, 1], [2, 300]], np.uint16)
    item = ImageItem(2, 0, maps=ClassMaps("map.png", 301, 1.0))
    assert np.array_equal(item(told(np.zeros((2, 2, 3), np.uint8), numbers), 0)["spatial"], numbers)
