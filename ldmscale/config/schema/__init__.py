"""The typed configuration keys of every job."""
