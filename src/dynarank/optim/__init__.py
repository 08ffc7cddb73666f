"""Where layers, integrator, rank policy, schedule and the base optimizer meet."""
