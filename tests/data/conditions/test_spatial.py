"""Conditions made of images: degradations and masks, functions of seed and position."""

import io

import numpy as np
import pytest
from PIL import Image

from ldmscale.data.conditions.spatial import MOST, STRENGTHS, Holes, SmallImages, degrade, draw_mask
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.reader import Sample
from ldmscale.distributed.rng import generator


def picture(size: int = 64) -> np.ndarray:
    """uint8 [3, size, size]: a smooth gradient with a sharp square in it."""
    ramp = np.linspace(0, 255, size)
    image = np.stack(
        [np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), np.full((size, size), 90.0)]
    )
    image[:, size // 4 : size // 2, size // 4 : size // 2] = 255
    return image.astype(np.uint8)


def test_bicubic_is_pillows_and_draws_nothing():
    image = picture()
    wanted = Image.fromarray(image.transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BICUBIC)
    for position in (0, 7):
        found = degrade(image, 4, "bicubic", generator(0, position, "degradation"))
        assert np.array_equal(found, np.asarray(wanted).transpose(2, 0, 1))


def test_blind_degradation_belongs_to_the_position_and_stays_near_the_small_image():
    image, plain = picture(), degrade(picture(), 4, "bicubic", generator(0, 0, "degradation")).astype(float)
    found = [degrade(image, 4, "blind", generator(3, position, "degradation")) for position in (0, 0, 1)]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    many = [degrade(image, 4, "blind", generator(3, p, "degradation")).astype(float) for p in range(40)]
    errors = [float(np.abs(one - plain).mean()) for one in many]
    assert min(errors) > 1 and max(errors) < 25
    assert np.abs(np.mean(many, axis=0) - plain).mean() < 8  # noise and blur, no shift of place or colour


@pytest.mark.parametrize("name", STRENGTHS)
def test_masks_have_a_hole_and_something_around_it(name):
    shares = [draw_mask(48, 64, (name,), generator(1, p, "mask")).mean() for p in range(60)]
    assert min(shares) > 0 and max(shares) <= MOST
    tiny = draw_mask(16, 16, (name,), generator(1, 0, "mask"))
    assert tiny.shape == (1, 16, 16) and set(np.unique(tiny)) == {0, 1}


def test_thick_masks_hide_more_than_thin_ones():
    def mean(name: str) -> float:
        return float(np.mean([draw_mask(64, 64, (name,), generator(1, p, "mask")).mean() for p in range(80)]))

    assert mean("thin") < 0.8 * mean("medium") < 0.8 * 0.9 * mean("thick")


def test_a_sample_is_told_the_same_at_its_position_whenever_it_is_read():
    buffer = io.BytesIO()
    Image.fromarray(picture().transpose(1, 2, 0)).save(buffer, "PNG")
    sample = Sample("a", "a.tar", {"png": buffer.getvalue()})
    holes = ImageItem(32, 5, crop="random", flip=True, spatial=Holes())
    small = ImageItem(32, 5, flip=True, spatial=SmallImages(4, "blind", noise=0.2))
    for item, name in ((holes, "mask"), (small, "spatial")):
        first, again, other = (item(sample, position)[name] for position in (11, 11, 12))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert holes(sample, 11)["mask"].shape == (1, 32, 32)
    told = small(sample, 11)["spatial"]
    assert told.shape == (3, 8, 8) and told.dtype == np.float32
    # The small image is made of the picture as it is trained on: flipped where that is.
    plain = ImageItem(32, 5, flip=True, spatial=SmallImages(4))
    for position in range(6):
        made = plain(sample, position)
        wanted = degrade(made["image"], 4, "bicubic", generator(0, 0, "none")).astype(np.float32) / 127.5 - 1
        assert np.allclose(made["spatial"], wanted)
