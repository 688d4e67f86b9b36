"""Figures of what was trained: how well images are reconstructed, and whether samples follow their prompts."""
