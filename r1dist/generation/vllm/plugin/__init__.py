"""What of ours runs inside a vLLM server: a way in for weights, a guard at the door, and an end with its owner."""

import os
import signal
import threading
import time

OWNER = "R1DIST_SUPERVISOR"
"""Environment variable: the process id that a server must not outlive."""
NAP = 0.0001
"""Seconds; a decoding step on a core takes some hundred of them."""


def register() -> None:
    """vLLM's `general_plugins` entry point; vLLM calls it in each of its processes."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if "shm" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "shm", "r1dist.generation.vllm.plugin.files", "FileWeightTransferEngine"
        )
    if current_platform.is_cpu():
        _wait_asleep()
    if OWNER in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[OWNER]),), name="r1dist-owner", daemon=True).start()


def _wait_asleep() -> None:
    """Let the engine sleep between looks at whether its worker has answered: vLLM's spins for that.

    It takes most of a core, which on CPUs a trainer or another server needs. A GPU's server keeps the spinning: its
    steps are shorter, and its host has cores to spare.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(NAP)


def _end_with(owner: int) -> None:
    """Kill this process when `owner` is gone: a supervisor that was killed cannot stop its servers itself."""
    import psutil

    try:
        process = psutil.Process(owner)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
