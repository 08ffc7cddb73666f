"""The command ``calibrate``: measure single layers on this machine and keep what was found."""

import json

import torch

from dynarank.calibration import calibrate
from dynarank.cli.arguments import Calibrate


def run_calibration(command: Calibrate) -> None:
    """Measure, save, and print the tables.

    Raises:
        ValueError: A number is out of range.
        RuntimeError: The device is not there.
    """
    if command.threads is not None and command.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {command.threads}.")
    before = torch.get_num_threads()
    torch.set_num_threads(command.threads or before)
    try:
        calibration = calibrate(device=command.device, seconds=command.seconds)
    finally:
        torch.set_num_threads(before)
    file = calibration.save()
    print(calibration)
    print(f"\nkept in {file}")
    if command.json:
        print(json.dumps(calibration.as_dict(), allow_nan=False))
