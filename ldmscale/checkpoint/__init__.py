"""Checkpoints: when and how (manager), which (folders), what is in one (manifest), its bytes (storage, tensors).

Nothing here knows DeepSpeed or a network; `ldmscale.train.state` turns engines into pieces and back.
"""

from ldmscale.checkpoint.folders import Retention
from ldmscale.checkpoint.manager import CheckpointManager, newest_checkpoint
from ldmscale.checkpoint.storage import Piece, Reader

__all__ = ["CheckpointManager", "Piece", "Reader", "Retention", "newest_checkpoint"]
