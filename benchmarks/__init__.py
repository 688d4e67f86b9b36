"""Side by side with other implementations: `make bench`. See docs/benchmarks.md."""
