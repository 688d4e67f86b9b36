"""The loop, and what it trains with: the engine, the moving average, learning rates, and their state in checkpoints."""
