"""The pure core: names, states and decisions. No clock, no randomness, no I/O."""
