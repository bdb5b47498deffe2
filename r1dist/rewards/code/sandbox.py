"""Runs an untrusted program under bubblewrap: alone in its namespaces, without network, within limits.

What it sees: the system's `/usr` and the Python it is run by, read-only; an empty `/tmp` in memory, where it
starts; a `/proc` of its own processes; `/dev/null`, `zero`, `urandom`. Nothing is written to a disk.
What it is: an unprivileged user without capabilities, who may make no further namespaces.

Not handled: memory as a whole is bounded only by `memory_mib` times `processes`; the number of empty files in `/tmp`
only by the time it takes to make them. CPU seconds are counted for each process.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

from ...errors import UserError, VerifiersBroken
from .seccomp import system_call_filter

INSTALL = "apt-get install bubblewrap util-linux"
# As root, bwrap itself is run by this user: root's processes are not held to a number of processes by the kernel,
# and a program that breaks out should not be root.
NOBODY = 65534
KERNEL_SECONDS = 30  # far beyond what it takes to make namespaces, or to end them
OPEN_FILES = 64
# One hash seed, so that a program that depends on the order of a set gets the same score after a resume.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
# Process 1 of the namespace. When it ends the kernel kills whatever else is there, before bwrap ends.
# When the machine is out of memory, its program goes before the trainer, unless it takes that mark off itself.
FIRST_PROCESS = 'echo 1000 > /proc/self/oom_score_adj; "$@"; exit $?'
CPU_SECONDS_SPENT = 128 + signal.SIGXCPU


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """Of the wall clock."""
    cpu_seconds: int = 10
    """Of a core, for each process."""
    memory_mib: int = 1024
    """Address space of each process."""
    processes: int = 8
    """Processes and threads at one time."""
    output_bytes: int = 1 << 20
    """Of stdout, of stderr, and of any one file."""
    folder_bytes: int = 64 << 20
    """All files in its folder together. They are in memory."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program. `exit_code` is the shell's: 128 + n after signal n, None if it was stopped."""

    state: Literal["finished", "timeout", "output"]
    exit_code: int | None
    stdout: bytes
    stderr: bytes

    @property
    def succeeded(self) -> bool:
        return self.state == "finished" and self.exit_code == 0


def require_sandbox() -> None:
    """Raises `UserError` if something is not installed, `VerifiersBroken` if the machine does not let it run."""
    outcome = run([python(), "-c", "print(6 * 7)"])
    if outcome.stdout != b"42\n":
        raise VerifiersBroken(
            f"The sandbox cannot run {python()} (exit code {outcome.exit_code}).\n{_last_line(outcome.stderr)}"
        )


@cache
def python() -> str:
    """The Python that programs are run by: this process' own, outside of its venv, else the system's.

    As root, this process' own is passed over where only root can read it. Raises `UserError` if there is neither.
    """
    own = Path(sys.base_prefix).resolve() / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if own.is_file() and (os.geteuid() != 0 or all(folder.stat().st_mode & 0o001 for folder in own.parents)):
        return str(own)
    return _tool("python3", "apt-get install python3")


def compiler() -> str:
    """The C++ compiler; raises `UserError` if there is none, which would else look like programs that fail."""
    return _tool("g++", "apt-get install g++")


def run(
    command: list[str], files: dict[str, bytes] | None = None, stdin: bytes = b"", limits: Limits | None = None
) -> Outcome:
    """Run `command` in a fresh sandbox with `files` in its folder, and wait for the end of all its processes.

    A program that fails, whatever it does, is an `Outcome`. Raises `VerifiersBroken` if it was not run at all, and
    `UserError` if something is not installed.
    """
    limits = limits or Limits()
    with ExitStack() as opened:

        def in_memory(content: bytes = b"") -> BinaryIO:
            file = opened.enter_context(open(os.memfd_create("r1dist"), "w+b"))
            file.write(content)
            file.seek(0)
            return file

        streams = [in_memory(stdin), in_memory(), in_memory()]
        rules = in_memory(system_call_filter())
        given = {name: in_memory(content) for name, content in (files or {}).items()}
        report, report_end = (opened.enter_context(open(fd, mode)) for fd, mode in zip(os.pipe(), "rw", strict=True))
        arguments = _bubblewrap(limits) + [
            "--seccomp",
            f"{rules.fileno()}",
            "--json-status-fd",
            f"{report_end.fileno()}",
        ]
        for name, file in given.items():
            arguments += ["--perms", "0755", "--file", f"{file.fileno()}", f"/tmp/{name}"]
        process = subprocess.Popen(
            [*arguments, "--", "/bin/sh", "-c", FIRST_PROCESS, "sh", *_limited(limits), *command],
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            env=ENVIRONMENT,
            pass_fds=[file.fileno() for file in (rules, report_end, *given.values())],
        )
        report_end.close()
        exit_code, late = _follow(process, report.fileno(), limits.seconds)
        size = max(os.fstat(stream.fileno()).st_size for stream in streams[1:])
        stdout, stderr = (os.pread(stream.fileno(), limits.output_bytes, 0) for stream in streams[1:])
    if exit_code is None and not late:
        raise VerifiersBroken(
            f"The sandbox did not start: {_last_line(stderr)}\n"
            "It needs user namespaces: see kernel.unprivileged_userns_clone, user.max_user_namespaces, and in a "
            "container its seccomp profile."
        )
    if late or exit_code == CPU_SECONDS_SPENT:
        return Outcome("timeout", None, stdout, stderr)
    if size >= limits.output_bytes:
        return Outcome("output", None, stdout, stderr)
    return Outcome("finished", exit_code, stdout, stderr)


def _follow(process: subprocess.Popen, report: int, seconds: float) -> tuple[int | None, bool]:
    """Wait for bwrap, which waits for all; gives the program's exit code, and whether it was stopped.

    bwrap reports the namespace's first process, then the program's exit code if it was run, and closes the pipe
    at its end.
    """
    output, late, deadline = b"", False, time.monotonic() + KERNEL_SECONDS
    closing = select.poll()
    closing.register(report, select.POLLIN)
    try:
        while True:
            if not closing.poll(max(0.0, deadline - time.monotonic()) * 1000):
                if late:
                    raise VerifiersBroken(
                        f"Process {process.pid}, a sandbox, does not end. What is the machine waiting for?"
                    )
                late, deadline = True, time.monotonic() + KERNEL_SECONDS
                # bwrap waits until the kernel has ended everything in the namespace with its first process.
                os.kill(json.loads(output.splitlines()[0])["child-pid"] if output else process.pid, signal.SIGKILL)
                continue
            piece = os.read(report, 4096)
            if not piece:
                break
            if not output:
                deadline = time.monotonic() + seconds
            output += piece
    finally:
        process.kill()  # only an exception, Ctrl-C say, leaves something to kill; the rest dies with it
        process.wait()
    status = {}
    for line in output.splitlines():
        status |= json.loads(line)
    return status.get("exit-code"), late and "child-pid" in status


@cache
def _bubblewrap(limits: Limits) -> list[str]:
    drop_root = [_tool("setpriv", INSTALL), "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    bwrap = _tool("bwrap", INSTALL)
    shown = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")):
        if path.is_symlink():
            shown += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            shown += ["--ro-bind", str(path), str(path)]
    if not Path(python()).is_relative_to("/usr"):
        shown += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    for name in ("null", "zero", "urandom"):
        shown += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        shown += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    return [
        *(drop_root if os.geteuid() == 0 else []),
        bwrap,
        *("--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)),
        *("--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"),
        *(*shown, "--proc", "/proc"),
        *("--size", str(limits.folder_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"),
    ]


def _limited(limits: Limits) -> list[str]:
    """Limits are set inside: the kernel counts a user's processes for each user namespace.

    By a tool and not by `preexec_fn`, which would have a trainer of many gigabytes and threads fork itself.
    """
    return [
        _tool("prlimit", INSTALL),
        f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
        f"--as={limits.memory_mib << 20}",
        f"--nproc={limits.processes + 1}",  # the first process counts
        f"--fsize={limits.output_bytes}",
        f"--nofile={OPEN_FILES}",
        "--core=0",
    ]


@cache
def _tool(name: str, install: str) -> str:
    found = shutil.which(name, path="/usr/bin:/bin")
    if found is None:
        raise UserError(f"rewards: the sandbox for programs needs `{name}`, which is not installed: {install}")
    return found


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "bwrap printed nothing")
