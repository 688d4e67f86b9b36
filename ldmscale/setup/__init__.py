"""From a checked configuration to a running job."""
