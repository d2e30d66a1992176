"""The protocol's model: worlds of workers, reapers, messages and faults around the package's own pure core."""
