"""What one training step means in each stage."""
