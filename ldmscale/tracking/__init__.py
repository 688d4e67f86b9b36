"""One dictionary of metrics a log interval, to the console, to metrics.jsonl and to W&B.

Nothing here can end a run.
"""
