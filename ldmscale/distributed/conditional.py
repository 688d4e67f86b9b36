"""A new object in a store, by one writer only: created under a condition, and read back, since answers get lost."""

from __future__ import annotations

from typing import Any


def create(filesystem: Any, place: str, content: bytes) -> bool:
    """Write an object of an fsspec filesystem unless it is there; whether `content` is what is there then.

    S3 (`If-None-Match`), Google's store (generation 0) and files refuse the second writer. For others reading back must
    do, so contents tell their writers apart. Raises what the store's library raises if there is nothing afterwards.
    """
    refused: Exception | None = None
    try:
        filesystem.pipe_file(place, content, mode="create")
    except Exception as error:  # "it exists" is told by each store's library in its own way
        refused = error
    try:
        found = bytes(filesystem.cat_file(place))  # the answer may have been lost after the deed
    except FileNotFoundError:
        if refused is not None:
            raise refused from None
        return False
    return found == content
