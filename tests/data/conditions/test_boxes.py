"""Layouts: the published tokens, the view of their image, and boxes that cannot be used."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.conditions.boxes import Box, LayoutTokens, size_told
from ldmscale.data.images.decode import View
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.shards.reader import Sample
from ldmscale.errors import DataError

NAMES = ClassLabels("json:boxes", 3, ("cat", "dog", "owl"))
PUBLISHED = LayoutTokens(ClassLabels("json:boxes", 600), 92, 8192)
SMALL = LayoutTokens(NAMES, 11, 82)


def members(boxes, **more):
    return {"json": json.dumps({"boxes": boxes, **more}).encode()}


def picture(width, height):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_layout_is_92_tokens_of_the_published_vocabulary():
    assert (PUBLISHED.objects, PUBLISHED.grid, PUBLISHED.nothing) == (30, 90, 8191)
    tokens = PUBLISHED.encode([Box(17, 0.0, 0.5, 1.0, 1.0)])
    # Rows of 90 positions: (0, 0.5) is row round(44.5), column 0; (1, 1) the last of all.
    assert tokens[:3].tolist() == [17, 44 * 90, 90 * 90 - 1]
    assert set(tokens[3:90].tolist()) == {8191}
    assert tokens[90:].tolist() == [0, 8099] and tokens.shape == (92,)
    assert PUBLISHED.encode([Box(599, 0.0, 0.0, 1.0, 1.0)] * 40).tolist()[-5:] == [599, 0, 8099, 0, 8099]


def test_the_empty_layout_says_nothing_but_the_whole_image():
    assert SMALL.encode([]).tolist() == [81] * 9 + [0, 80]
    assert SMALL.title(SMALL.encode([])) == "nothing"
    assert SMALL.title(SMALL.encode([Box(2, 0, 0, 1, 1), Box(0, 0, 0, 1, 1)])) == "owl, cat"


def test_boxes_are_of_the_whole_image_and_the_crop_is_told():
    boxes = [{"class": "dog", "box": [0.5, 0.0, 0.75, 1.0]}, {"class": "cat", "box": [0.0, 0.0, 0.25, 1.0]}]
    # The right half of an image of 80x40: the cat is out of sight.
    tokens = SMALL.of(members(boxes), (80, 40), View(40, 0, 40, 40, False))
    assert tokens.tolist() == [1, 4, 8 * 9 + 6, 81, 81, 81, 81, 81, 81, 4, 80]
    mirrored = SMALL.of(members(boxes), (80, 40), View(40, 0, 40, 40, True))
    assert mirrored.tolist() == [1, 2, 8 * 9 + 4, 81, 81, 81, 81, 81, 81, 0, 8 * 9 + 4]


def test_boxes_of_a_random_view_follow_the_image():
    boxes = [{"class": "owl", "box": [0.0, 0.0, 0.5, 1.0]}]
    sample = Sample("a", "a.tar", {"png": picture(64, 32), **members(boxes)})
    item = ImageItem(32, 3, crop="random", flip=True, layout=SMALL)
    black_left = np.zeros((32, 64, 3), np.uint8)
    black_left[:, 32:] = 255  # the owl is black
    buffer = io.BytesIO()
    Image.fromarray(black_left).save(buffer, "PNG")
    sample = Sample("a", "a.tar", {"png": buffer.getvalue(), **members(boxes)})
    seen = set()
    for position in range(30):
        made = item(sample, position)
        tokens = made["tokens"].tolist()
        assert tokens[0] == 2 or made["image"].min() > 200  # told unless it is out of sight
        if tokens[0] == 2:
            left = tokens[1] % 9 == 0  # mirrored boxes begin in the middle
            share = (made["image"][0] < 128).mean(0)
            assert share[0] == 1.0 if left else share[-1] == 1.0
        seen.add(tuple(tokens))
    assert len(seen) > 5


def test_a_latent_is_told_the_boxes_of_its_view():
    format = LatentFormat("a", "latent", "float32", (1, 2, 2), {"size": 16}, flips=True)
    item = LatentItem(format, caption_source=None, flip=True, seed=5, layout=SMALL)
    told = members([{"class": "cat", "box": [0.25, 0.0, 0.5, 0.5]}], width=40, height=20)
    for position in range(12):
        tokens = item.told(told, position)["tokens"].tolist()
        if item.member(position) == "latent.npy":
            assert tokens[:3] == [0, 2, 4 * 9 + 4] and tokens[-2:] == [2, 8 * 9 + 6]
        else:
            assert tokens[:3] == [0, 4, 4 * 9 + 6] and tokens[-2:] == [2, 8 * 9 + 6]
    assert item.told_members == {"json"}
    with pytest.raises(DataError, match="does not tell the image's width and height"):
        size_told(members([]))


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ("none", "are a str; expected a list"),
        ([{"class": "cat"}], "expected class and box"),
        ([{"class": "cat", "box": [0, 0, 1]}], "expected class and box"),
        ([{"class": 1.5, "box": [0, 0, 1, 1]}], "have the class 1.5"),
        ([{"class": "cat", "box": [0.5, 0, 1.1, 1]}], "is outside of the image, or empty"),
        ([{"class": "cat", "box": [0.5, 0, 0.5, 1]}], "is outside of the image, or empty"),
        ([{"class": "cat", "box": [-0.1, 0, 0.5, 1]}], "is outside of the image, or empty"),
        ([{"class": "cat", "box": [0, float("nan"), 0.5, 1]}], "is outside of the image, or empty"),
        ([{"class": "cow", "box": [0, 0, 1, 1]}], "there is no class 'cow' among the 3"),
        ([{"class": 3, "box": [0, 0, 1, 1]}], "the label 3 is out of range"),
    ],
)
def test_what_is_no_layout_is_refused(boxes, said):
    with pytest.raises(DataError, match=said):
        SMALL.boxes(members(boxes))
    with pytest.raises(DataError, match="has no json member"):
        SMALL.boxes({})
