"""The command ``evaluate``: a compressed network next to the network as given."""

import copy
import json

from dynarank.cli.arguments import Evaluate
from dynarank.cli.compress import find_subject, print_proof
from dynarank.experiments.compression import compare
from dynarank.export import load_compressed


def run_evaluation(command: Evaluate) -> None:
    """Load a compressed network, measure both, and print the table."""
    subject = find_subject(command.task, weights=command.weights, data_dir=command.data_dir)
    compressed = load_compressed(command.compressed, copy.deepcopy(subject.model()))
    proof = compare(subject, compressed, batch_sizes=command.batch_sizes, seconds=command.seconds)
    print_proof(proof)
    if command.json:
        print(json.dumps(proof.as_dict(), allow_nan=False))
