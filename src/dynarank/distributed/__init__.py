"""Data-parallel runs: the same factors, ranks, forms and steps on all processes, and a wrapper that follows them."""

from dynarank.distributed._channel import independent, is_main_process, world
from dynarank.distributed._reducer import rebuilding, unwrap
from dynarank.distributed._replicas import Replicas, broadcast_factors

__all__ = ["Replicas", "broadcast_factors", "independent", "is_main_process", "rebuilding", "unwrap", "world"]
