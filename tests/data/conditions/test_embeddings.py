"""Embeddings of a sample: filled up with zeros, and refused where they cannot be used."""

import io

import numpy as np
import pytest

from ldmscale.data.conditions.annotations import GivenEmbeddings
from ldmscale.errors import DataError

READER = GivenEmbeddings("embeddings.npy", 4, 3)


def members(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return {"embeddings.npy": buffer.getvalue()}


def test_rows_are_filled_up_with_zeros():
    given = np.arange(8, dtype=np.float16).reshape(2, 4)
    found = READER.of(members(given))
    assert found.dtype == np.float32 and found.shape == (3, 4)
    assert np.array_equal(found[:2], given) and not found[2].any()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4), np.float32), "expected 1 to 3 rows of 4"),
        (np.zeros((0, 4), np.float32), "expected 1 to 3 rows of 4"),
        (np.zeros((2, 5), np.float32), "expected 1 to 3 rows of 4"),
        (np.zeros(4, np.float32), "expected 1 to 3 rows of 4"),
        (np.zeros((2, 4), np.int64), "no array of finite floats"),
        (np.zeros((2, 4), np.uint16), "are uint16; expected floats"),
        (np.full((1, 4), np.nan), "no array of finite floats"),
        (np.full((1, 4), 1e300), "are not all finite"),
    ],
)
def test_what_are_no_embeddings_is_refused(array, said):
    with pytest.raises(DataError, match=said):
        READER.of(members(array))


def test_a_sample_without_embeddings_is_refused():
    with pytest.raises(DataError, match="has no embeddings\\.npy member"):
        READER.of({"png": b""})
    with pytest.raises(DataError, match="its embeddings"):
        READER.of({"embeddings.npy": b"x" * 300})
