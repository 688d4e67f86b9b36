"""A text encoder that is read and never trained, such as CLIP's or T5's, called like the one that is trained."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn


class FrozenTextEncoder(nn.Module):
    """Token ids to the last hidden states of a network of the transformers library.

    No attention mask is given: padding tokens take part, in training as in sampling, as in Stable Diffusion. It stays in
    evaluation mode, without gradients and in its own number format, whatever happens to the network that reads from it.

    Args:
        network: called with `input_ids`, answers with `.last_hidden_state`.
        max_tokens: longest sequence; width: D.
    """

    def __init__(self, network: nn.Module, *, max_tokens: int, width: int) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.max_tokens = max_tokens
        self.width = width
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTextEncoder:
        """Stays in evaluation mode: its dropout is no part of our training."""
        return super().train(False)

    def digest(self) -> str:
        """Identifies the weights, in float32. Their names have no part in it: the library has changed them before."""
        found = hashlib.sha256()
        for weight in self.parameters():
            found.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    @torch.no_grad()
    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, L] int64, L <= max_tokens -> float32 [B, L, D]."""
        length = token_ids.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"the captions have {length} tokens, this text encoder takes {self.max_tokens}")
        hidden: Tensor = self.network(input_ids=token_ids).last_hidden_state  # [B, L, D]
        return hidden.float()


class StoredTextEncoder(FrozenTextEncoder):
    """The same for captions that were encoded before: their vectors are looked up, and the encoder itself is not there.

    Args:
        tokens: int64 [N, L], distinct rows.
        vectors: float32 [N, L, D], what the encoder makes of them; may be mapped from a file.
        digest: of the encoder that made them.
    """

    def __init__(self, tokens: np.ndarray, vectors: np.ndarray, digest: str) -> None:
        nn.Module.__init__(self)
        self.max_tokens, self.width = vectors.shape[1:]
        self._places = {row.tobytes(): place for place, row in enumerate(tokens)}
        self._vectors, self._digest = vectors, digest

    def digest(self) -> str:
        """Of the encoder that made the vectors."""
        return self._digest

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, L] int64 -> float32 [B, L, D] on their device. Raises KeyError for a row that is not stored."""
        rows = np.ascontiguousarray(token_ids.cpu().numpy())
        places = [self._places[row.tobytes()] for row in rows]
        return torch.from_numpy(self._vectors[places]).to(token_ids.device)
