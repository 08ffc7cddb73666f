"""Switches: when a layer that started with full rank goes low-rank. One file each, found by discovery."""
