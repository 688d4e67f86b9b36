"""A text encoder that is read and never trained, such as CLIP's or T5's, called like the one that is trained."""

from __future__ import annotations

import hashlib

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
