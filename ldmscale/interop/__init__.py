"""Models in the formats of others, both ways: CompVis checkpoints and diffusers folders.

`read` opens any of them as a `Model`; `compvis` and `diffusers_folder` write one. Every conversion is a renaming and a
rearrangement of elements: no value is computed, so both ways are exact.
"""
