"""`start.py PYTHON SOCKET *words` stands in for `PYTHON *words`: it has the zygote fork a process that runs them.

This one waits for it: it hands signals on, ends as it ends, and takes it with it if it is killed. What is neither a
script nor a module that the tests start runs in a real Python.
"""

import json
import os
import signal
import socket
import sys

MODULES = ("accelerate.commands.launch", "torch.distributed.run", "r1dist")


def main(python: str, path: str, *words: str) -> None:
    rest = list(words[1:] if words[:1] == ("-u",) else words)
    if not (rest and (rest[0].endswith(".py") or (rest[0] == "-m" and rest[1] in MODULES))):
        os.execv(python, [python, *words])
    held = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)  # until there is somebody to hand them on to
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    alive, _ours = os.pipe()  # the other end is closed when this process ends, however it does
    text = json.dumps([rest, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [b"%08x" % len(text)], [0, 1, 2, alive])
    server.sendall(text)
    os.close(alive)
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
