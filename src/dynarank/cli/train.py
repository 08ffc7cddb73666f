"""The command ``train``: one run, its progress, its table."""

import dataclasses
import json
from typing import Any

from dynarank.cli.arguments import Train
from dynarank.cli.display import showing
from dynarank.cli.outcome import print_outcome
from dynarank.experiments import TrainConfig, resume, train
from dynarank.experiments.plain import standard
from dynarank.experiments.processes import is_main

CHANGEABLE = ("data_dir", "device", "threads", "compare")  # options that a resumed run may be given anew


def run_training(command: Train) -> None:
    """Train, and print the outcome on the first process."""
    config = TrainConfig(**command.settings)
    changed = _changed(config)
    if command.resume is not None:
        _check_resume(changed)
    with showing() as progress:
        if command.resume is None:
            outcome = train(config, progress)
        else:
            outcome = resume(command.resume, progress, **changed)
    if is_main():
        print_outcome(outcome)
        if command.json:
            print(json.dumps(standard(outcome), allow_nan=False))


def _changed(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that are not the default ones."""
    fields = dataclasses.fields(config)
    return {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}


def _check_resume(changed: dict[str, Any]) -> None:
    wrong = [f"--{name.replace('_', '-')}" for name in changed if name not in CHANGEABLE]
    if wrong:
        raise ValueError(
            f"a resumed run has the settings it was started with, got {', '.join(wrong)}. Leave them out; only "
            f"{', '.join('--' + name.replace('_', '-') for name in CHANGEABLE)} may be given anew."
        )
