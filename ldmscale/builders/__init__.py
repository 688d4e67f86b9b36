"""Networks built from their configuration."""
