"""Rank policies: which rank each layer gets at a rank event. One file each, found by discovery."""
