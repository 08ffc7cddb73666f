"""How far weights turn from one look to the next and how many directions they use: when to go low-rank."""

from dynarank.stability.look import LayerLook
from dynarank.stability.measures import (
    Bulk,
    Directions,
    bulk,
    change,
    directions,
    effective_rank,
    overlap,
    retained_energy,
    stability,
    stable_rank,
)
from dynarank.stability.watch import WeightWatch

__all__ = [
    "Bulk",
    "Directions",
    "LayerLook",
    "WeightWatch",
    "bulk",
    "change",
    "directions",
    "effective_rank",
    "overlap",
    "retained_energy",
    "stability",
    "stable_rank",
]
