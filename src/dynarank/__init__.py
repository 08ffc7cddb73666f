"""dynarank: train PyTorch networks on the manifold of low-rank matrices, with ranks that adapt by themselves."""
