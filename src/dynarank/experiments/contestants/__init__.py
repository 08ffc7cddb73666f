"""Ways to train a network that are compared with each other: one file each, found by discovery."""

from dynarank.experiments.contestants.base import AbstractContestant, Setting, Size

__all__ = ["AbstractContestant", "Setting", "Size"]
