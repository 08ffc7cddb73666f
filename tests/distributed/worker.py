"""One process of a pool: runs scenarios by name until its input ends. Started as a script, one thread each."""

import os
import pickle
import sys
import traceback
from datetime import timedelta
from pathlib import Path


def main() -> None:
    process, processes, store, seconds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what torch prints must not get between the answers
    sys.path.insert(0, str(Path(__file__).parent))
    import scenarios
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    options = {"rank": process, "world_size": processes, "timeout": timedelta(seconds=seconds)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = ("done", getattr(scenarios, name)(**arguments))
        except Exception:  # noqa: BLE001 - told to the test, whatever it is
            answer = ("failed", traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()
    os._exit(0)  # a peer may be gone already: no farewell


if __name__ == "__main__":
    main()
