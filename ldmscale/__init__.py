"""ldmscale trains latent diffusion models from WebDataset shards to a released model."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Parts", "build", "load", "sample"]

if TYPE_CHECKING:
    from ldmscale.inference.load import build, load
    from ldmscale.inference.parts import Parts
    from ldmscale.inference.sample import sample


def __getattr__(name: str) -> object:
    # Loaded on first use: the command line must answer --help without importing torch.
    if name in ("Parts", "build", "load"):
        from ldmscale.inference import load as parts

        return getattr(parts, name)
    if name == "sample":
        from ldmscale.inference.sample import sample

        return sample
    raise AttributeError(f"module 'ldmscale' has no attribute {name!r}")
