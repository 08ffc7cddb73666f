"""Integrators: how the factors move along the manifold in one step. One file each, found by discovery."""
