"""The training engine: everything that depends on DeepSpeed."""
