"""Ways to write one weight with fewer numbers: one file each, found by discovery."""
