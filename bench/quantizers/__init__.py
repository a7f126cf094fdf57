"""Real quantised checkpoints by the tools themselves, each in an environment of its own: make quantized-data."""
