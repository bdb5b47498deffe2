"""The nodes of a job, and the command line that starts a command on them: SLURM, or this machine alone."""

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config import PlacementConfig
from ..errors import UserError
from ..generation.ports import address_towards
from ..run.driver import require_usable_gpu
from .placement import GIB, Machines

# Each step may use all that the job has on its nodes; our own processes share it out.
SRUN = ("srun", "--overlap", "--cpu-bind=none", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--unbuffered")


@dataclass(frozen=True)
class Cluster:
    """Where commands can be started.

    Raises `subprocess.CalledProcessError` where SLURM does not answer.
    """

    job: str | None
    """The SLURM job; None outside of one."""
    nodes: tuple[str, ...]
    """By name; this process is on the first."""
    addresses: tuple[str, ...]

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Cluster":
        """The SLURM job that this process is in, or this machine alone."""
        job = environment.get("SLURM_JOB_ID")
        if job is None:
            return cls(None, ("localhost",), ("127.0.0.1",))
        nodes = _output("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
        output = _output("scontrol", "show", "node", "--oneliner", ",".join(nodes)).splitlines()
        named = {_field(line, "NodeName"): _field(line, "NodeAddr") for line in output}
        addresses = [socket.gethostbyname(named[node]) for node in nodes]
        if len(nodes) > 1:  # its own name often leads a machine to its loopback
            addresses[0] = address_towards(addresses[1])
        return cls(job, tuple(nodes), tuple(addresses))

    @classmethod
    def imagined(cls, count: int) -> "Cluster":
        """Nodes of another machine, for a plan."""
        names = tuple(f"node{number}" for number in range(count))
        return cls("planned", names, names)

    def machines(self, config: PlacementConfig) -> Machines:
        """The nodes to place on: as the YAML says, else as found here. Raises `UserError`."""
        if config.gpus_per_node is None:
            require_usable_gpu()
        gpus = torch.cuda.device_count() if config.gpus_per_node is None else config.gpus_per_node
        gib = config.gpu_gib
        if gib is None and gpus:
            if not torch.cuda.is_available():
                raise UserError("placement.gpu_gib is missing: there is no GPU here to read it from.")
            gib = round(torch.cuda.get_device_properties(0).total_memory / GIB, 1)
        return Machines(config.nodes or len(self.nodes), gpus, gib or 0.0)

    def on(self, first: int, count: int = 1, log: str | None = None) -> list[str]:
        """What to put before a command to start it once on each of `count` nodes, from node `first` on.

        Args:
            log: Where the output goes, by SLURM's patterns (`%N`: machine, `%t`: task); unset, to this process's.
        """
        if self.job is None:
            return []
        names = ",".join(self.nodes[first : first + count])
        # The number of tasks, too: a step inherits the job's.
        where = [f"--nodes={count}", f"--ntasks={count}", f"--nodelist={names}"]
        return [*SRUN, *where, *([] if log is None else [f"--output={log}"])]


def _field(line: str, name: str) -> str:
    return next(word for word in line.split() if word.startswith(f"{name}=")).partition("=")[2]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
