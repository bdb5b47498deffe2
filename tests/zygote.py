"""Starts Python programs by forking a process that has imported everything: a tenth of a second instead of ten.

It is asked in two ways, until its standard input ends:

- JSON lines: {"run": script, "argv": [...], "env": {...}, "log": path} -> {"pid": n}, {"wait": pid} -> {"code": n}.
  The launcher `script` runs in a session of its own.
- By the stand-in for `python` (start.py), which programs started here find in `sys.executable`: what they start is
  forked, too. Called as `zygote.py STAND_IN SOCKET`.

What imports vLLM is forked by a second one, which has done so: see `with_vllm`.
"""

import fcntl
import gc
import json
import multiprocessing
import os
import random
import runpy
import select
import selectors
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[1]


class Server:
    def __init__(self, stand_in: str, listening: socket.socket):
        self.stand_in = stand_in
        self.listening = listening
        self.held = [listening]
        self.selector = selectors.DefaultSelector()
        self.selector.register(listening, selectors.EVENT_READ, self.start)
        self.selector.register(0, selectors.EVENT_READ, self.ordered)
        self.rest = b""
        self.leaders: dict[int, psutil.Process] = {}
        """The stand-ins that lead a session, by the process that runs for them, which leads a group."""
        self.stopped: set[int] = set()

    def serve(self) -> NoReturn:
        while True:
            for key, _ in self.selector.select(0.05 if self.leaders else None):
                key.data()
            self.stop_with_stand_ins()

    def stop_with_stand_ins(self) -> None:
        """Stop and continue what runs for stand-ins that are stopped: they cannot hand on a SIGSTOP."""
        for pid, stand_in in self.leaders.items():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                stops = stand_in.status() == psutil.STATUS_STOPPED
                if stops != (pid in self.stopped):
                    os.killpg(pid, signal.SIGSTOP if stops else signal.SIGCONT)
                    self.stopped ^= {pid}

    def ordered(self) -> None:
        if not (read := os.read(0, 1 << 16)):
            os._exit(0)
        *lines, self.rest = (self.rest + read).split(b"\n")
        for order in map(json.loads, lines):
            if "wait" in order:
                self.when_ended(order["wait"], lambda status: print(json.dumps({"code": code(status)}), flush=True))
            else:
                pid = os.fork()
                if pid == 0:
                    self.forked()
                    os.setsid()
                    log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                    words = [str(ROOT / "launch" / order["run"]), *order["argv"]]
                    files = [os.open(os.devnull, os.O_RDONLY), log, os.dup(log)]
                    program(words, os.environ | order["env"], str(ROOT), [0, 1, 2], files)
                print(json.dumps({"pid": pid}), flush=True)

    def with_vllm(self, listening: socket.socket) -> None:
        """At the first question there, fork the process that answers it and those that follow."""

        def begin() -> None:
            self.selector.unregister(listening)
            self.held.remove(listening)
            until, lives = socket.socketpair()  # it reads the end of its input when this process ends
            between = os.fork()
            if between == 0:
                if os.fork():  # no child of ours, as the programs are
                    os._exit(0)
                self.forked()
                lives.close()
                os.dup2(until.fileno(), 0)
                os.dup2(2, 1)  # vLLM logs while it is imported
                import_vllm()
                Server(self.stand_in, listening).serve()
            os.waitpid(between, 0)
            self.held.append(lives)
            until.close()
            listening.close()

        self.held.append(listening)
        self.selector.register(listening, selectors.EVENT_READ, begin)

    def start(self) -> None:
        """What the stand-in asks for: JSON of its arguments, environment, folder and files' numbers, with these files
        and a pipe that ends with it. It is told the process id, and how that process ended."""
        asking, _ = self.listening.accept()
        asks, _, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            stand_in, leads = psutil.Process(asks), os.getsid(asks) == asks
        except (psutil.NoSuchProcess, ProcessLookupError):
            return asking.close()
        length, files, _, _ = socket.recv_fds(asking, 8, 64)
        text = b""
        while len(text) < int(length, 16):
            text += asking.recv(1 << 16)
        pid = os.fork()
        if pid == 0:
            self.forked()
            asking.close()
            files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]  # out of the way of the numbers
            alive = files.pop()
            fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGKILL)  # killed, the stand-in takes us with it
            fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC)
            if select.select([alive], [], [], 0)[0]:
                os._exit(1)
            with suppress(PermissionError):  # of another session, it is in the group of no process of ours
                os.setpgid(0, 0 if leads else os.getpgid(asks))
            os.getppid = stand_in.ppid
            program(*json.loads(text), files)
        for file in files:
            os.close(file)
        with suppress(BrokenPipeError):
            asking.sendall(f"{pid}\n".encode())
        if leads:
            self.leaders[pid] = stand_in

        def ended(status: int) -> None:
            if self.leaders.pop(pid, None) and code(status) == -signal.SIGKILL:  # as its whole group is, mostly
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            asking.sendall(f"{code(status)}\n".encode())
            asking.close()

        self.when_ended(pid, ended)

    def when_ended(self, pid: int, tell) -> None:
        file = os.pidfd_open(pid)

        def ended() -> None:
            self.selector.unregister(file)
            os.close(file)
            with suppress(BrokenPipeError):  # who asked is gone
                tell(os.waitpid(pid, 0)[1])

        self.selector.register(file, selectors.EVENT_READ, ended)

    def forked(self) -> None:
        """In the child: without what is the server's, but with its way to start more."""
        self.selector.close()
        for held in self.held:
            held.close()
        sys.executable = self.stand_in
        multiprocessing.set_executable(self.stand_in)


def code(status: int) -> int:
    return os.waitstatus_to_exitcode(status)


def program(
    words: list[str], environment: dict[str, str], folder: str, numbers: list[int], files: list[int]
) -> NoReturn:
    """Run `python *words` with `files` under `numbers`."""
    for number, file in zip(numbers, files, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    import numpy as np  # here: the workers that verify import this file, too
    import torch

    # What OpenMP reads when it is loaded.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    if cores := environment.get("GOMP_CPU_AFFINITY"):
        os.sched_setaffinity(0, map(int, cores.split()))
    for seed in (random.seed, np.random.seed, torch.seed):  # as a fresh process: from anywhere
        seed()
    ends_with: int | str = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = [words[0], *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        ends_with = stop.code or 0
    except BaseException:
        traceback.print_exc()
        ends_with = 1
    if isinstance(ends_with, str):
        print(ends_with, file=sys.stderr)
        ends_with = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ends_with)


def main(stand_in: str, path: str) -> None:
    sockets = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    for listening, suffix in zip(sockets, ("", ".vllm"), strict=True):
        listening.bind(path + suffix)
        listening.listen(64)
    answers = os.dup(1)
    os.dup2(2, 1)  # what is imported may tell something
    import accelerate.commands.launch  # noqa: F401

    # Within any trainer accelerate imports DeepSpeed, which imports this.
    import deepspeed  # noqa: F401
    import torch._inductor.compile_fx
    import torch.distributed.run  # noqa: F401

    import r1dist.cluster.job_launcher
    import r1dist.cluster.plan
    import r1dist.evaluation.chat
    import r1dist.evaluation.evaluate
    import r1dist.generation.vllm.start
    import r1dist.generation.vllm.supervisor
    import r1dist.pipeline.runner
    import r1dist.reward_models.train
    import r1dist.rewards.warm_accuracy
    import r1dist.rewards.warm_language
    import r1dist.rl.train
    import r1dist.sampling.run
    import r1dist.sft.train  # noqa: F401

    gc.freeze()
    os.dup2(answers, 1)
    server = Server(stand_in, sockets[0])
    server.with_vllm(sockets[1])
    print("up", flush=True)
    server.serve()


def import_vllm() -> None:
    import setproctitle
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    setproctitle.getproctitle()  # it finds where titles are written while the environment is that of the start
    gc.freeze()


if __name__ == "__main__":
    main(*sys.argv[1:])
