"""Checkpoints: when and how (manager), which (folders), what is in one (manifest), its bytes (shards, tensors).

Nothing here knows DeepSpeed or a network; `ldmscale.train.snapshot` turns engines into pieces and back. `run_folder` imports
no torch, so this package exports nothing.
"""
