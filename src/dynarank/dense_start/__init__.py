"""Networks that start with full rank and go low-rank while they train: OIALR and its relatives."""
