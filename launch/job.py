"""A run over all nodes and GPUs that are there: `python launch/job.py grpo --config FILE [--dry_run]`.

The first word is `grpo`, `sft`, `reward_model`, `sample`, `evaluate` or `pipeline`; the others are that launcher's. In
a SLURM job (launch/slurm/) it uses the job's nodes, and is put back into the queue when its time runs out.
"""

import os
import signal
import subprocess
import sys

from r1dist.errors import EXIT_INTERRUPTED, RunStopped, UserError, asks_for_help, run_cli
from r1dist.shipped import RECIPES

KINDS = ("grpo", "sft", "reward_model", "sample", "evaluate", "pipeline")


def main(argv: list[str]) -> None:
    heard: list[int] = []
    # SLURM's warning may come at any moment, and must not kill us before or after the work.
    signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    kind, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if asks_for_help([kind]):
        return
    if kind not in KINDS:
        raise UserError(f"`{kind}` is not something to run; the first word is one of {', '.join(KINDS)}.")
    from r1dist.cluster.allocation import Cluster
    from r1dist.cluster.job_launcher import JobLauncher, PipelineJob

    if kind == "pipeline":
        work = PipelineJob(arguments, RECIPES / "tiny" / "pipeline.yaml", heard)
    else:
        work = JobLauncher(kind, arguments, Cluster.here(), heard)
    if work.config.dry_run:
        print(work.plan())
        return
    try:
        work.run()
    except RunStopped as stopped:
        # SLURM's warning that the time is nearly over; somebody who cancels does not want it back.
        if stopped.code == EXIT_INTERRUPTED and signal.SIGUSR1 in heard and "SLURM_JOB_ID" in os.environ:
            print(f"requeued: {stopped}", flush=True)
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        raise


if __name__ == "__main__":
    sys.exit(run_cli(main))
