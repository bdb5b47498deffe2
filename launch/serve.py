"""vLLM servers for others to use: `python launch/serve.py --model.path MODEL --endpoints FILE [--replicas 2 ...]`.

A flag that is not ours goes to vLLM as it is (`--max-num-seqs 512`).
"""

import asyncio
import logging
import shlex
import sys
from pathlib import Path

from r1dist.config import ServeRun
from r1dist.config.loader import parse, split_arguments
from r1dist.errors import UserError, run_cli
from r1dist.logs import set_up_logging


def main(argv: list[str]) -> None:
    ours, others = split_arguments(ServeRun, argv)
    run = parse(ServeRun, ours)
    run.arguments += others
    from r1dist.generation.vllm.start import plan_serve, require_vllm

    model, transport = plan_serve(run)
    if run.dry_run:
        from r1dist.generation.vllm.command import command

        for _ in range(run.replicas):
            print(shlex.join(command(run, model, transport, port=0)))
        return
    from r1dist.run.driver import require_usable_gpu

    require_usable_gpu()
    require_vllm()
    path = Path(run.endpoints)
    if path.exists():
        raise UserError(f"--endpoints: {path} is there already; its servers may be running. Stop them, or remove it.")
    from r1dist.generation.vllm.endpoints import token_of
    from r1dist.generation.vllm.supervisor import Supervisor

    set_up_logging(logging.INFO)
    token = None if run.token_file is None else token_of(run.token_file, "--token_file")
    asyncio.run(Supervisor(run, model, transport, path, token=token).run())


if __name__ == "__main__":
    sys.exit(run_cli(main))
