"""What a configuration costs, known before anything runs: parameters, operations, activations."""
