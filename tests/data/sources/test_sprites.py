"""What sprites tell by themselves, and scenes of several, by pixels."""

import io

import numpy as np
from PIL import Image

from ldmscale.data.sources.sprites import (
    PALETTE,
    SCENE_SIDE,
    Sprite,
    box_of,
    map_png,
    nearest_colours,
    scene_of,
)


def sprite(colour, width=20, height=10):
    image = Image.new("RGBA", (width + 4, height + 4), (0, 0, 0, 0))
    image.paste((*colour, 255), (2, 2, 2 + width, 2 + height))
    return image


def test_the_box_is_of_what_can_be_seen():
    assert box_of(sprite((1, 2, 3))) == (2, 2, 22, 12)
    assert box_of(Image.new("RGBA", (8, 8), (9, 9, 9, 40))) is None


def test_a_map_names_the_nearest_colour_and_white_where_nothing_is():
    with Image.open(io.BytesIO(map_png(sprite(PALETTE["green"])))) as opened:
        numbers, mode = np.asarray(opened), opened.mode
    assert mode == "P" and numbers.shape == (14, 24)
    assert (numbers[2:12, 2:22] == list(PALETTE).index("green")).all() and (numbers[0] == 0).all()
    pixels = np.array([list(PALETTE.values())], np.uint8)
    assert nearest_colours(pixels)[0].tolist() == list(range(len(PALETTE)))


def test_the_boxes_of_a_scene_hold_all_that_can_be_seen():
    sprites = [Sprite(sprite(PALETTE["red"]), "red"), Sprite(sprite(PALETTE["blue"], 10, 20), "blue")]
    counts = set()
    for number in range(40):
        scene = scene_of(sprites, 3, number)
        again = scene_of(sprites, 3, number)
        assert scene.boxes == again.boxes and scene.image.tobytes() == again.image.tobytes()
        covered = np.zeros((SCENE_SIDE, SCENE_SIDE), bool)
        for found in scene.boxes:
            left, top, right, bottom = (round(corner * SCENE_SIDE) for corner in found["box"])
            inside = np.asarray(scene.image)[top:bottom, left:right]
            assert inside[..., 3].mean() > 150
            colour = inside[..., :3][inside[..., 3] > 200].mean(0)
            assert (colour[0] > colour[2]) == (found["class"] == "red")
            covered[top:bottom, left:right] = True
        # The faint fringes of two sprites may add up where they overlap.
        assert (np.asarray(scene.image)[..., 3][~covered] < 128).all()
        counts.add(len(scene.boxes))
    assert counts == {1, 2, 3}
