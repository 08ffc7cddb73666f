"""Low-rank twins of torch layers: one file each, found by discovery."""
