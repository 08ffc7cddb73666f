"""Comparisons of methods: what takes part, every run, what it costs, and the pages."""
