"""`start.py PYTHON SOCKET *words` stands in for `PYTHON *words`: it has the zygote fork a process that runs them.

This one waits for it: it hands signals on, ends as it ends, and takes it with it if it is killed. What is neither a
script, nor a module that the tests start, nor the fork server of the workers that verify, nor a process that vLLM
spawns, runs in a real Python. Of a server all does, with REAL_SERVERS in the environment: for tests that look at its
processes or stop them, which stand-ins cannot be.
"""

import json
import os
import signal
import socket
import sys

MODULES = ("accelerate.commands.launch", "torch.distributed.run", "r1dist")
SUPERVISOR = "r1dist.generation.vllm.supervisor"
VLLM = "vllm.entrypoints.openai.api_server"
FORK_SERVER = "from multiprocessing.forkserver import main;"
SPAWNED = "from multiprocessing.spawn import spawn_main;"


def asked(words: list[str]) -> str | None:
    """What to add to the socket's path for the zygote that forks this program; None if a real Python runs it."""
    first, second, *_ = [*words, "", ""]
    real_servers = "REAL_SERVERS" in os.environ
    if (first, second) == ("-m", VLLM) or (first == "-c" and second.startswith(SPAWNED)):
        return None if real_servers else ".vllm"
    if (first, second) == ("-m", SUPERVISOR):
        return None if real_servers else ""
    forked = first.endswith(".py") or (first == "-m" and second in MODULES)
    return "" if forked or (first == "-c" and second.startswith(FORK_SERVER)) else None


def main(python: str, path: str, *words: str) -> None:
    rest = list(words)
    while rest[:1] in (["-u"], ["-B"]):
        rest.pop(0)
    if (suffix := asked(rest)) is None:
        os.execv(python, [python, *words])
    listed = sorted(map(int, os.listdir("/proc/self/fd")))
    files = [number for number in listed if os.path.exists(f"/proc/self/fd/{number}")]  # one was of the listing itself
    held = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)  # until there is somebody to hand them on to
    server = socket.socket(socket.AF_UNIX)
    server.connect(path + suffix)
    alive, _ours = os.pipe()  # the other end is closed when this process ends, however it does
    text = json.dumps([rest, dict(os.environ), os.getcwd(), files]).encode()
    socket.send_fds(server, [b"%08x" % len(text)], [*files, alive])
    server.sendall(text)
    for file in (alive, *files[3:]):
        os.close(file)
    told = server.makefile()
    pid = int(told.readline())
    for number in held:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    code = int(told.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
