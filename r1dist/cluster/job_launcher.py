"""Runs a launcher over the nodes of a job: places it, starts its servers and waits for them, watches it to its end.

Inside a SLURM job every command is a step of it, by `srun`; outside, the commands run on this machine. Several
nodes must share the run's folder.
"""

import dataclasses
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from ..config import EvaluateRun, GRPORun, SampleRun, Serve
from ..config.loader import config_path, parse
from ..config.pipeline import PipelineRun
from ..config.trl_fields import trl_value
from ..config.validate import validate
from ..data.prompts import prompt_dataset
from ..data.templates import load_template
from ..errors import Interrupted, RunStopped, StageFailed, UserError
from ..files import LOGS, SERVERS, lock_run_dir, samples_folder
from ..generation.ports import free_port
from ..generation.vllm.endpoints import OWNER_ONLY, read
from ..generation.vllm.start import require_length, require_vllm, sleeps
from ..generation.weight_sync.scratch import clear
from ..models import load_model_config
from ..pipeline.graph import KINDS, accelerate_launch, parsed
from ..run.children import code_noted, end_with_parent, forget, handing_on, last_words
from ..run.setup import computing_dtype, hardware_defaults
from ..shipped import CONFIGS, LAUNCH
from .allocation import Cluster
from .memory import BYTES, Sharding, parameter_count, peak, training_memory
from .placement import Load, Placement, place
from .shapes import model_shape

SHARD = 64  # prompts that a node claims at a time, where the YAML says nothing
SERVER_STARTS = 3
"""Times that a node's supervisor of servers is started, should it end."""
TICK = 0.5
NOT_BEGUN = "the work had not begun. The same command begins it."


class JobLauncher:
    """One run of `kind` (`grpo`, `sft`, `reward_model`, `sample`, `evaluate`) with the launcher's `arguments`.

    `asked` grows by the signals that ask to stop; it is looked at before the work begins, and while servers come up.

    Raises `UserError` for a placement that cannot be.
    """

    def __init__(self, kind: str, arguments: list[str], cluster: Cluster, asked: list[int]):
        self.kind = KINDS[kind]
        self.name = kind
        self.arguments = arguments
        self.config = parsed(self.kind, arguments)
        self.folder = folder_of(self.config)
        self.logs = self.folder / LOGS
        self.apart = self.folder / SERVERS
        config = self.config.placement
        if self.kind.trains and self.config.trl.get("use_cpu") and config.gpus_per_node is None:
            config = dataclasses.replace(config, gpus_per_node=0)
        machines = cluster.machines(config)
        self.elsewhere = machines.nodes > len(cluster.nodes)
        self.cluster = Cluster.imagined(machines.nodes) if self.elsewhere else cluster
        if self.kind.trains and machines.gpus and not torch.cuda.is_available():  # planned from a machine without
            self.config.trl.setdefault("bf16", True)
        self.placement = place(machines, load_of(self.config), config)
        where = str(config_path(arguments) or "the command line")
        validate(self.config, where, self.placement.world if self.kind.trains else None)
        self.asked = asked
        self.served_length: int | None = None
        """Of the servers on nodes of their own: the longest prompt and completion, once it is known."""
        self._before: dict[Path, int] = {}

    def plan(self) -> str:
        """The placement, and each command."""
        commands = [self._serve(node) for node in self._serving()] + [self._work(0)]
        return "\n".join([self.placement.table(), *map(shlex.join, commands)])

    def run(self) -> None:
        """Run it to its end. Raises `RunStopped` with the reason as its last line."""
        if self.elsewhere:
            raise UserError(
                f"placement.nodes: {self.placement.machines.nodes} are asked for, and this is one. Use "
                "launch/slurm/, or leave it out."
            )
        print(self.placement.table(), flush=True)
        if self.kind.trains and self.placement.serve_nodes:
            require_vllm()
            self.served_length = require_length(self.config.rollout.serve, longest(self.config))
        # Two jobs in one folder would take each other's servers; samplers are meant to be many.
        with lock_run_dir(self.logs) if self.kind.trains else nullcontext():
            self._go()

    def _go(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        if self.kind.trains:
            forget(self.folder)
        self._before = {path: path.stat().st_size for path in self.logs.glob("*.log")}
        with self._servers() as servers:
            go_on(self.asked)
            log = self.logs / f"{self.name}.log"
            asked_by_file = self.folder if self.kind.trains else None
            with (
                _started(self._work(free_port()), log) as work,
                handing_on(self.name, work, asked_by_file, self.asked),
            ):
                while work.poll() is None:
                    for server in servers:
                        server.look()
                    time.sleep(TICK)
            code = code_noted(asked_by_file, work.returncode)
        if self.asked and not self.kind.trains:
            raise Interrupted(f"what was drawn is kept in {self.folder}. The same command continues.")
        if code:
            raise StageFailed(
                f"{self.name} ended with exit code {code}; logs in {self.logs}.\n{self._reason(log)}", code
            )

    def _reason(self, log: Path) -> str:
        """The last words, in this job, of a log and of its steps' logs."""
        logs = [log, *sorted(self.logs.glob(f"{log.stem}-*.log"))]
        return "\n".join(last_words(*((path, self._before.get(path, 0)) for path in logs)))

    def _serving(self) -> range:
        """The nodes with servers of the trainer's, by number; a node that samples starts its own."""
        first = self.placement.train_nodes
        return range(first, first + self.placement.serve_nodes if self.kind.trains else first)

    @contextmanager
    def _servers(self) -> Iterator[list["NodeServers"]]:
        """The servers on nodes of their own: healthy when the context begins, stopped when it ends."""
        if not self._serving():
            yield []
            return
        self.apart.mkdir(exist_ok=True)
        clear(self.apart)
        self._token().touch(OWNER_ONLY)
        self._token().write_text(secrets.token_urlsafe(32))
        servers = [
            NodeServers(self._serve(node), self._endpoints(node), self._serve_log(node)) for node in self._serving()
        ]
        try:
            deadline = time.monotonic() + self.config.rollout.serve.start_timeout
            while not all([server.healthy() for server in servers]):
                go_on(self.asked)
                for server in servers:
                    server.look()
                if time.monotonic() > deadline:
                    late = [server for server in servers if not server.healthy()]
                    raise RunStopped(f"no server on time. {late[0].last_error()}")
                time.sleep(TICK)
            yield servers
        finally:
            for server in servers:
                server.process.terminate()
            for server in servers:
                server.process.wait()

    def _serve_log(self, node: int) -> Path:
        return self.logs / f"serve-{self.cluster.nodes[node]}.log"

    def _endpoints(self, node: int) -> Path:
        return self.apart / f"{self.cluster.nodes[node]}.json"

    def _token(self) -> Path:
        return self.apart / "token"

    def _serve(self, node: int) -> list[str]:
        """The command of one node's servers."""
        rollout, placement = self.config.rollout, self.placement
        gpus = placement.machines.gpus
        serve = dataclasses.replace(
            rollout.serve,
            replicas=placement.replicas if gpus else rollout.serve.replicas,
            tensor_parallel=placement.tensor_parallel,
            devices=",".join(map(str, range(gpus))) if gpus else None,
            host=self.cluster.addresses[node],
            dtype=served_dtype(self.config),
            max_model_len=self.served_length or rollout.serve.max_model_len,
        )
        words = [sys.executable, str(LAUNCH / "serve.py"), "--model.path", self.config.model.path]
        words += ["--endpoints", str(self._endpoints(node)), "--token_file", str(self._token())]
        words += ["--transport", placement.transport]
        for name, usual in dataclasses.asdict(Serve()).items():
            value = getattr(serve, name)
            if name != "arguments" and value != usual:
                words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        return [*self.cluster.on(node), *words, *serve.arguments]

    def _work(self, port: int) -> list[str]:
        """The command that trains or samples; its processes meet at `port` of the first node."""
        placement = self.placement
        script = [str(LAUNCH / self.kind.script), *self.arguments, *self._settled()]
        logs = str(self.logs / f"{self.name}-%N-%t.log") if self.cluster.job else None
        ranks = ["--tee", "3", "--log_dir", str(self.logs / "ranks")]
        if not self.kind.trains:
            launcher = [sys.executable]
            if placement.processes > 1:  # of each node, which know nothing of each other
                launcher += ["-m", "torch.distributed.run", "--standalone"]
                launcher += ["--nproc_per_node", str(placement.processes), *ranks]
            return [*self.cluster.on(0, placement.serve_nodes, logs), *launcher, *script]
        launcher = [sys.executable, *accelerate_launch(_accelerate(placement))]
        launcher += ["--num_machines", str(placement.train_nodes), "--num_processes", str(placement.world)]
        launcher += ["--main_process_port", str(port)] if placement.world > 1 else []
        if placement.train_nodes == 1:
            return [*self.cluster.on(0, 1, logs), *launcher, *(ranks if placement.world > 1 else []), *script]
        launcher += ["--main_process_ip", self.cluster.addresses[0], "--same_network"]
        launcher += ["--deepspeed_multinode_launcher", "standard", "--tee", "3"]
        each = f'--machine_rank "$SLURM_NODEID" --log_dir {shlex.quote(str(self.logs / "ranks"))}-"$SLURM_NODEID"'
        shell = f"exec {shlex.join(launcher)} {each} {shlex.join(script)}"
        return [*self.cluster.on(0, placement.train_nodes, logs), "sh", "-c", shell]

    def _settled(self) -> list[str]:
        """What the placement adds to the launcher's arguments."""
        placement, field = self.placement, "output" if isinstance(self.config, EvaluateRun) else "output_dir"
        # A node's home folder may be another.
        words = [f"--{field}", self.config.output if field == "output" else str(self.folder)]
        if not self.kind.trains:
            if placement.serve_nodes * placement.processes > 1 and not self.config.shard:
                words += ["--shard", str(SHARD)]
            return words + (self._servers_of_a_node() if placement.replicas and placement.machines.gpus else [])
        if placement.serve_nodes:
            words += ["--rollout.servers", ",".join(str(self._endpoints(node)) for node in self._serving())]
            if placement.transport == "shm":
                words += ["--rollout.weights_folder", str(self.apart)]
        elif placement.replicas and placement.machines.gpus:
            words += self._servers_of_a_node()
            words += ["--rollout.serve.devices", placement.devices] if placement.devices else []
        return words + (["--rollout.transport", placement.transport] if placement.transport else [])

    def _servers_of_a_node(self) -> list[str]:
        sizes = {"replicas": self.placement.replicas, "tensor_parallel": self.placement.tensor_parallel}
        return [word for name, size in sizes.items() for word in (f"--rollout.serve.{name}", str(size))]


class PipelineJob:
    """`launch/pipeline.py` inside a job: its stages run one after another over the job's nodes."""

    def __init__(self, arguments: list[str], default: Path, asked: list[int]):
        self.config = parse(PipelineRun, arguments, default)
        self.command = [sys.executable, str(LAUNCH / "pipeline.py"), *arguments, "--launcher", "job"]
        self.command += ["--output_dir", self.config.output_dir]
        self.asked = asked

    def plan(self) -> str:
        return subprocess.run(self.command, check=True, capture_output=True, text=True).stdout

    def run(self) -> None:
        """Raises `StageFailed` with the pipeline's exit code; the pipeline has printed the reason."""
        go_on(self.asked)
        process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
        with handing_on("pipeline", process, None, self.asked):
            code = process.wait()
        if code == -signal.SIGTERM and self.asked:  # before it could hear us
            raise Interrupted(NOT_BEGUN)
        if code:
            raise StageFailed(f"the pipeline ended with exit code {code}, for the reason above.", code)


def go_on(asked: list[int]) -> None:
    """Raises `Interrupted` if the work is not to begin."""
    if asked:
        raise Interrupted(f"{signal.Signals(asked[0]).name}: {NOT_BEGUN}")


class NodeServers:
    """`launch/serve.py` on a node; started again if it ends."""

    def __init__(self, command: list[str], endpoints: Path, log: Path):
        self.command = command
        self.endpoints = endpoints
        self.log = log
        self.starts = 0
        self._start()

    def look(self) -> None:
        """Raises `RunStopped` if it ended too often."""
        if self.process.poll() is None:
            return
        if self.starts == SERVER_STARTS:
            raise RunStopped(f"the servers of a node ended {self.starts} times. {self.last_error()}")
        print(f"servers: started again. {self.last_error()}", flush=True)
        self._start()

    def healthy(self) -> bool:
        """Whether all of its servers are up."""
        return self.endpoints.exists() and all(server.state == "ready" for server in read(self.endpoints).servers)

    def last_error(self) -> str:
        return f"{self.log} ends with:\n" + "\n".join(last_words((self.log, 0)))

    def _start(self) -> None:
        self.endpoints.unlink(missing_ok=True)  # of a start that was killed
        self.starts += 1
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=end_with_parent
            )


def folder_of(run) -> Path:
    """Where `run` leaves its logs. Raises `UserError` for an evaluation that keeps nothing."""
    if not isinstance(run, EvaluateRun):
        return Path(run.output_dir if isinstance(run, SampleRun) else run.trl["output_dir"])
    if run.output is None:
        raise UserError("output: name the file for the scores; samples and logs will be in a folder beside it.")
    return samples_folder(Path(run.output))


def load_of(run) -> Load:
    """What `run` needs of its machines."""
    rollout = getattr(run, "rollout", None)
    serves = rollout is not None and rollout.engine == "vllm" and rollout.servers == "managed"
    if isinstance(run, SampleRun | EvaluateRun):
        models = [run.model] if isinstance(run, EvaluateRun) else [generator.model for generator in run.generators]
        shapes = [model_shape(model) for model in models]
        largest = max(shapes, key=parameter_count)
        served = parameter_count(largest) * BYTES["bfloat16"]
        return Load(
            trains=False,
            serves=serves,
            in_process=rollout.engine == "transformers",
            served=served,
            heads=largest.num_attention_heads,
            tensor_parallel=_configured_tensor_parallel(rollout),
        )
    shape = model_shape(run.model)
    rows = trl_value(run, "per_device_train_batch_size") * trl_value(run, "gradient_accumulation_steps")

    def bytes_of(processes: int, zero_stage: int) -> int:
        parts = training_memory(run, shape, Sharding(processes, zero_stage))
        own = {name: size for name, size in parts.items() if not (serves and name.endswith("(generation)"))}
        return peak(own)

    return Load(
        trains=True,
        serves=serves,
        shares=serves and bool(rollout.sleep or rollout.transport == "ipc"),
        sleeps=serves and sleeps(rollout, shared=True),
        peak=bytes_of,
        served=parameter_count(shape) * BYTES["bfloat16"],
        heads=shape.num_attention_heads,
        tensor_parallel=_configured_tensor_parallel(rollout) if serves else None,
        transport=rollout.transport if serves else "auto",
        rows=rows,
    )


def served_dtype(run: GRPORun) -> str:
    """The servers' dtype: the trainer's, unless the YAML sets one."""
    if run.rollout.serve.dtype != "auto":
        return run.rollout.serve.dtype
    return computing_dtype(SimpleNamespace(**hardware_defaults(run.trl, run.model.dtype)), run.model.dtype)


def longest(run: GRPORun) -> int:
    """Tokens of the longest prompt with its completion."""
    context = load_model_config(run.model).max_position_embeddings
    completion = trl_value(run, "max_completion_length")
    template = load_template(run.model, run.data.template, run.prompting.prefill)
    rows = prompt_dataset(run.data, template, context, completion, run.prompting, trl_value(run, "seed"))
    return max(rows["prompt_length"]) + completion


def _configured_tensor_parallel(rollout) -> int | None:
    """The YAML's tensor parallelism; None for 1, the default."""
    return rollout.serve.tensor_parallel if rollout.serve.tensor_parallel > 1 else None


def _accelerate(placement: Placement) -> Path:
    where = CONFIGS / "accelerate"
    if placement.zero_stage == 0:
        return where / ("single_gpu.yaml" if placement.machines.gpus else "cpu.yaml")
    return where / f"zero{placement.zero_stage}{'' if placement.machines.gpus else '_cpu'}.yaml"


@contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    print(shlex.join(command), flush=True)
    with log.open("a") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                   preexec_fn=end_with_parent)  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
