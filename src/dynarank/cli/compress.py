"""The command ``compress``: one compression, its progress, its tables."""

import json

from dynarank.cli.arguments import Compress
from dynarank.cli.outcome import aligned
from dynarank.cli.stages import telling
from dynarank.experiments.compress_config import CompressConfig
from dynarank.experiments.compression import prove
from dynarank.experiments.proof import Proof
from dynarank.experiments.result_folder import new_folder, save_proof
from dynarank.experiments.subject import Subject, trained_subject
from dynarank.experiments.tasks import TASKS
from dynarank.experiments.user_file import read_subject


def run_compression(command: Compress) -> None:
    """Compress, save the result, and print it."""
    config = CompressConfig(**command.settings)
    subject = find_subject(command.task, weights=command.weights, data_dir=command.data_dir)
    with new_folder(command.out, name=f"compressed-{subject.name}") as folder:
        with telling() as tell:
            proof = prove(subject, config, tell=tell)
        print(proof.report, end="\n\n")
        print_proof(proof)
        save_proof(folder, proof)
    print("", f"result  {folder}", sep="\n")
    if command.json:
        print(json.dumps(proof.as_dict() | {"out": str(folder)}, allow_nan=False))


def find_subject(task: str, *, weights: str | None, data_dir: str | None) -> Subject:
    """Return the subject of a file or of a built-in name.

    Raises:
        ValueError: There is none, or weights are missing or given to a file.
        RuntimeError: The file cannot be run.
    """
    if task not in TASKS and not task.endswith(".py"):
        raise ValueError(f"unknown task {task!r}. Available: {', '.join(sorted(TASKS))}, or a Python file of your own.")
    if task not in TASKS:
        given = [name for name, value in (("weights", weights), ("data-dir", data_dir)) if value is not None]
        if given:
            raise ValueError(f"--{given[0]} belongs to the built-in tasks {', '.join(TASKS)}; {task} loads its own.")
        return read_subject(task)
    if weights is None:
        raise ValueError(
            f"the built-in task {task} needs --weights FOLDER, a trained network. Make one with: "
            f"dynarank pretrain {task} --out FOLDER"
        )
    return trained_subject(task, weights, data_dir=data_dir)


def print_proof(proof: Proof) -> None:
    """Print the table of networks, and what there is to say about it."""
    print("\n".join([*aligned(proof.table()), "", *proof.verdict()]))
