"""Text encoders: the transformer that is trained together with the U-Net, and pretrained ones that are not trained.

Rombach et al. 2022, appendix E.2.1 and table 17: token and position vectors, pre-norm self-attention and
feed-forward layers, a final norm; no attention mask (padding tokens take part, as they did in training). The
1.45B model counts this network as 581,994,042 parameters. That includes a head over the vocabulary of
39,098,682 parameters which never received a gradient and which nothing reads; it is left out here, so
`TextTransformer` has 542,895,360.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.attention import MultiHeadAttention
from ldmscale.models.layers import (
    Checkpointing,
    LayerNorm,
    SmallNormalEmbedding,
    check_checkpointing,
    dropout_layer,
    run_block,
)


class TextLayer(nn.Module):
    """Self-attention, then two linear layers round an erf GELU; each normalised first, added to its input."""

    def __init__(
        self, width: int, *, heads: int, head_channels: int, feedforward_mult: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn_layer_norm = LayerNorm(width)
        self.self_attn = MultiHeadAttention(width, heads=heads, head_channels=head_channels, dropout=dropout)
        self.final_layer_norm = LayerNorm(width)
        self.fc1 = nn.Linear(width, feedforward_mult * width)
        self.dropout = dropout_layer(dropout)
        self.fc2 = nn.Linear(feedforward_mult * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))  # [B, L, D]
        inner = self.dropout(F.gelu(self.fc1(self.final_layer_norm(x))))  # [B, L, mult D]
        x = x + self.fc2(inner)  # [B, L, D]
        return x


class TextTransformer(nn.Module):
    """Token ids to one vector a token.

    Args:
        vocab_size: rows of the token table.
        max_tokens: longest sequence; shorter ones are accepted.
        width: D. heads x head_channels need not equal it (released: 8 x 64 at width 1280).
        feedforward_mult: inner width of the feed-forward layers, in widths.
        checkpointing: "full" keeps only the inputs of the layers for the backward pass,
            "selective" the results of attention too.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        width: int,
        layers: int,
        heads: int,
        head_channels: int,
        feedforward_mult: int = 4,
        dropout: float = 0.0,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        check_checkpointing(checkpointing)
        self.checkpointing: Checkpointing = checkpointing
        self.max_tokens = max_tokens
        self.width = width
        self.embed_tokens = SmallNormalEmbedding(vocab_size, width)
        self.embed_positions = SmallNormalEmbedding(max_tokens, width)
        self.layers = nn.ModuleList(
            TextLayer(
                width,
                heads=heads,
                head_channels=head_channels,
                feedforward_mult=feedforward_mult,
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.layer_norm = LayerNorm(width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, L] int64, L <= max_tokens -> [B, L, D]."""
        length = token_ids.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"the captions have {length} tokens, this text encoder takes {self.max_tokens}")
        positions = torch.arange(length, device=token_ids.device)  # [L]
        x = self.embed_tokens(token_ids) + self.embed_positions(positions)  # [B, L, D]
        for layer in self.layers:
            x = run_block(layer, self.checkpointing, x)  # [B, L, D]
        result: Tensor = self.layer_norm(x)  # [B, L, D]
        return result


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
