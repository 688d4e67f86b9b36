"""Checkpoints: which and where (manager), what is in one (manifest), and its bytes (storage, files).

Nothing here knows DeepSpeed or a network; `ldmscale.train.state` turns engines into pieces and back.
"""

from ldmscale.checkpoint.manager import CheckpointManager, newest_checkpoint
from ldmscale.checkpoint.storage import Piece, Reader

__all__ = ["CheckpointManager", "Piece", "Reader", "newest_checkpoint"]
