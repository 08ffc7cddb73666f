"""A benchmark of its own: what a training step, inference and memory cost, methods in turn beside dense networks."""
