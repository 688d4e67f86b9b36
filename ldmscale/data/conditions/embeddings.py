"""Embeddings that come with a sample as an array, such as those of an image's neighbours (retrieval-augmented models)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldmscale.data.images.decode import decode_array
from ldmscale.errors import DataError


@dataclass(frozen=True)
class GivenEmbeddings:
    """Reads a context. A value, so that loading processes can have it.

    Attributes:
        member: of the sample, such as "embeddings.npy": [L, width], L from 1 to max_tokens, floats.
        width: D. max_tokens: rows of the result.
    """

    member: str
    width: int
    max_tokens: int

    def of(self, members: Mapping[str, bytes]) -> np.ndarray:
        """float32 [max_tokens, width], zeros behind the sample's own rows, as they stand for no embedding.

        Raises:
            DataError: if there are none, or of another shape, or some that are not finite.
        """
        if self.member not in members:
            raise DataError(
                f"has no {self.member} member for the embeddings (members: {', '.join(sorted(members)) or 'none'})"
            )
        try:
            found = decode_array(members[self.member])
        except DataError as error:
            raise DataError(f"its embeddings ({self.member}) are no array of finite floats") from error
        if found.ndim != 2 or found.shape[1] != self.width or not 1 <= found.shape[0] <= self.max_tokens:
            raise DataError(
                f"its embeddings ({self.member}) have shape {found.shape}; expected 1 to {self.max_tokens} rows of "
                f"{self.width}"
            )
        if found.dtype.kind != "f":
            raise DataError(f"its embeddings ({self.member}) are {found.dtype}; expected floats")
        whole = np.zeros((self.max_tokens, self.width), dtype=np.float32)
        with np.errstate(over="ignore"):  # said below
            whole[: len(found)] = found
        if not np.isfinite(whole).all():
            raise DataError(f"its embeddings ({self.member}) are not all finite")
        return whole
