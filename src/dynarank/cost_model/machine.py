"""What times depend on besides the layer, and the file in the user's cache where they are kept."""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

CACHE = "DYNARANK_CACHE_DIR"


@dataclass(frozen=True)
class Machine:
    """Where times were measured, and with what: times hold for nothing else.

    Args:
        processor: Name of the processor, or of the GPU.
        device: ``"cpu"``, ``"cuda"`` and so on, without a number.
        threads: Threads that torch computes with; None on a GPU.
        torch: Version of torch.
        dtype: Type of the weights.
    """

    processor: str
    device: str
    threads: int | None
    torch: str
    dtype: str

    def file(self) -> Path:
        """Return where a calibration of this machine is kept.

        That is ``calibration`` in the folder that ``DYNARANK_CACHE_DIR`` names, otherwise in
        ``$XDG_CACHE_HOME/dynarank`` or ``~/.cache/dynarank``.
        """
        named = os.environ.get(CACHE)
        folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynarank"
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return folder / "calibration" / f"{self.device}-{self.dtype}-{digest}.json"

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"{self.processor}{threads}, {self.dtype}, torch {self.torch}"


def this_machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Return what times depend on here and now.

    Example:
        >>> this_machine(dtype=torch.float64).dtype
        'float64'
    """
    device = torch.device(device)
    threads: Any = torch.get_num_threads() if device.type == "cpu" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Machine(name, device.type, threads, torch.__version__, str(dtype).removeprefix("torch."))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []  # not Linux
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
