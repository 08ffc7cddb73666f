"""Networks and batches that the benchmark measures: one file each, found by discovery."""
