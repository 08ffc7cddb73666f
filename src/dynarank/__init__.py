"""dynarank: compress trained PyTorch networks, or train them on the manifold of low-rank matrices.

Example:
    >>> import torch, dynarank
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))
    >>> report = dynarank.factorize_(model, rank=4)
    >>> optimizer = dynarank.LowRankOptimizer(model, rank_policy=dynarank.Budget(0.5))
    >>> model(torch.ones(8, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> model[0]
    LowRankLinear(in_features=64, out_features=48, bias=True, rank=4)
"""

from dynarank.analysis import analyze
from dynarank.calibration import speed_plan
from dynarank.checkpoint import load, save
from dynarank.compress import compress_, recover_
from dynarank.dense_start.oialr import oialr
from dynarank.diagnostics import summary
from dynarank.export import load_compressed, save_compressed
from dynarank.factorize import dense_state_dict, factorize_, merge_, to_plain_
from dynarank.history import History
from dynarank.memory import memory_report
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.budget import Budget
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.report import write_report
from dynarank.schedules.periodic import Periodic

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Fixed",
    "History",
    "LowRankOptimizer",
    "NoiseEdge",
    "Periodic",
    "RelativeTail",
    "analyze",
    "compress_",
    "dense_state_dict",
    "factorize_",
    "load",
    "load_compressed",
    "memory_report",
    "merge_",
    "oialr",
    "recover_",
    "save",
    "save_compressed",
    "speed_plan",
    "summary",
    "to_plain_",
    "write_report",
]
