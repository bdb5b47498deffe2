"""A launcher's command in a fork of this process, which has imported what launchers import: seconds less for each."""

import atexit
import gc
import importlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterable, Mapping
from typing import IO

from .children import end_with_parent

FORK = multiprocessing.get_context("fork")
ACCELERATE = ["-m", "accelerate.commands.launch"]


def import_for_forks(modules: Iterable[str]) -> bool:
    """Import `modules` for commands to come. False where there is a GPU: CUDA cannot be used in a fork of a process
    that has looked for one."""
    import torch

    if torch.cuda.is_available():
        return False
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    for module in ("accelerate.commands.launch", "torch.distributed.run", *modules):
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy all that is shared
    atexit.register(gc.unfreeze)  # nanobind takes what is frozen at the end for leaks, and says so
    return True


class Forked:
    """`python *words`, with of `subprocess.Popen` what runs a step. `stderr`: None is this process's own."""

    def __init__(self, words: list[str], stderr: IO | None, env: Mapping[str, str]):
        ours, theirs = os.pipe()
        self.stdout = os.fdopen(ours)
        self._process = FORK.Process(target=_run, args=(words, theirs, stderr, dict(env)))
        self._process.start()
        os.close(theirs)

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _run(words: list[str], stdout: int, stderr: IO | None, env: dict[str, str]) -> None:
    end_with_parent()
    os.dup2(stdout, 1)
    if stderr is not None:
        os.dup2(stderr.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # a lock of the parent's is not ours
    os.environ.update(env)
    if words[:2] == ACCELERATE:
        _launch(words[2:])
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _launch(words: list[str]) -> None:
    """`accelerate launch *words`, its processes forked as well where Accelerate starts them by torchrun."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(words)
    arguments.run_path, arguments.start_method = True, "fork"  # options of torchrun, to which Accelerate hands them
    launch_command(arguments)
