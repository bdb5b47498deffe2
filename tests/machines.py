"""A real SLURM on this machine, two nodes with addresses of their own on loopback; and two network namespaces.

They need root, and the packages slurm-wlm, munge and iproute2; `make test-slurm` installs them.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from conftest import ROOT

NODES = {"n1": "127.0.0.11", "n2": "127.0.0.12"}
CORES, MEMORY = 4, 4000
"""Of each node; MiB."""
EACH = f"CPUs={CORES} RealMemory={MEMORY} Gres=gpu:8"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=64
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=2,sched_interval=2
KillWait=20
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Its daemons, and what a user types. Everything is in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        ports = [_free_port() for _ in range(1 + len(NODES))]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr={address} Port={port} {EACH}"
            for (name, address), port in zip(NODES.items(), ports[1:], strict=True)
        )
        host = socket.gethostname()
        self.conf = folder / "slurm.conf"
        self.conf.write_text(CONF.format(host=host, ports=ports, folder=folder, nodes=nodes))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for number in range(8):  # SLURM only looks whether a device's file is there
            (folder / f"gpu{number}").touch()
        (folder / "state").mkdir()
        self.env = {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "R1DIST_PYTHON": sys.executable,
            "R1DIST_HOME": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        subprocess.run(["mungekey", "--create", f"--keyfile={self.folder}/munge.key"], check=True)
        munge = [f"--{name}={self.folder}/munge.{ending}" for name, ending in
                 (("socket", "sock"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"),
                  ("seed-file", "seed"))]  # fmt: skip
        self._daemon("munged", "--foreground", "--force", *munge)
        until(lambda: (self.folder / "munge.sock").exists(), 10, "munged")
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name, "-f", str(self.conf))
        until(
            lambda: self.ask("sinfo", "-h", "-N", "-o", "%N %t").split() == ["n1", "idle", "n2", "idle"], 60, "nodes"
        )

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True).stdout

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        """A launcher, as on a machine from which jobs are submitted."""
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True)

    def submit(self, *words: str) -> str:
        """`sbatch`; gives the job's id."""
        said = subprocess.run(["sbatch", "--parsable", *words], env=self.env, cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        return said.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol` says of a job."""
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, job: str, holds, seconds: float, what: str) -> None:
        """Waits until something holds, which it will not after the job's end."""

        def either() -> bool:
            assert self.job(job)["JobState"] not in OVER or holds(), f"job {job} ended before {what}"
            return holds()

        until(either, seconds, what)

    def ended(self, job: str, seconds: float) -> str:
        """Waits for the job's end; gives its state."""
        until(lambda: self.job(job)["JobState"] in OVER, seconds, f"the end of job {job}")
        return self.job(job)["JobState"]

    def _daemon(self, *words: str) -> None:
        log = (self.folder / f"{words[0]}.out").open("a")
        self.daemons.append(subprocess.Popen(words, env=self.env, stdout=log, stderr=log))


def until(holds, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.3)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Namespaces:
    """Two of them, with a cable between: what to put before a command, and the address, of each."""

    def __init__(self):
        self.ends = {f"r1dist-{side}": f"10.77.0.{number}" for number, side in enumerate("ab", start=1)}
        a, b = self.ends
        _ip(f"netns add {a}", f"netns add {b}", f"link add {a} type veth peer name {b}")
        for name, address in self.ends.items():
            _ip(f"link set {name} netns {name}", f"-n {name} addr add {address}/24 dev {name}")
            _ip(f"-n {name} link set {name} up", f"-n {name} link set lo up")

    def enter(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", name]

    def cut(self) -> None:
        name = next(iter(self.ends))
        _ip(f"-n {name} link set {name} down")

    def remove(self) -> None:
        _ip(*(f"netns del {name}" for name in self.ends))


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
