"""Starts launchers by forking a process that has imported everything: a tenth of a second instead of ten.

JSON lines: {"run": script, "argv": [...], "env": {...}, "log": path} -> {"pid": n}, {"wait": pid} -> {"code": n}.
"""

import importlib.util
import json
import os
import random
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    import r1dist.reward_models.train
    import r1dist.rl.train
    import r1dist.sft.train  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                run(order)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def run(order: dict) -> None:
    """What the shell would have started; never returns."""
    os.setsid()
    log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(order["env"])
    import numpy as np  # here: the workers that verify import this file, too
    import torch

    for seed in (random.seed, np.random.seed, torch.seed):  # as a fresh process: from anywhere
        seed()
    sys.argv = [order["run"], *order["argv"]]
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "launch" / order["run"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = 1
    try:
        code = module.run_cli(module.main)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
