"""Measures on one machine what grows with the number of ranks, shards and samples: `python -m benchmarks.scale --help`.

`manifest` writes and reads a checkpoint's manifest as N ranks do; `index` and `order` measure the shards' index and the order
of samples; `exchange` starts N real gloo ranks; `requests` counts what a local S3 server is asked for. Counts (pieces, bytes,
descriptors, file calls, requests) are exact and carry over to a cluster. Seconds depend on this machine.
"""
