"""Decides which GPUs train, which serve, and how weights are transferred. Starts nothing.

One GPU: trainer and server share it. One node: its GPUs are split. Several nodes: whole nodes to each side.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import PlacementConfig
from ..errors import UserError
from ..generation.vllm.devices import GIB

USABLE = 0.92
"""Share of a GPU's memory to plan with; the CUDA context and fragmentation take the rest."""
SERVED_WEIGHTS = 0.6
"""Share of a GPU's memory that a server's weights may take; the key-value cache needs the rest."""


@dataclass(frozen=True)
class Machines:
    """The nodes to place on, all of the same kind."""

    nodes: int
    gpus: int
    """Of each node. 0: the CPUs do the work."""
    gpu_gib: float = 0.0


@dataclass(frozen=True)
class Load:
    """What a run needs."""

    trains: bool
    serves: bool
    """vLLM servers generate, and they are this run's own."""
    in_process: bool = False
    """Samples only, by the in-process engine: a process takes one GPU."""
    shares: bool = False
    """The YAML wants servers on the GPUs that train (`rollout.sleep`, or `ipc`)."""
    sleeps: bool = True
    """Servers that share the trainer's GPUs release their memory while it trains."""
    peak: Callable[[int, int], int] = lambda processes, zero_stage: 0
    """Bytes on each GPU that trains, by number of processes and ZeRO stage."""
    served: int = 0
    """Bytes of the weights that one server holds."""
    heads: int = 1
    """Attention heads; tensor parallelism must divide them."""
    tensor_parallel: int | None = None
    """The YAML's `rollout.serve.tensor_parallel`."""
    transport: str = "auto"
    """The YAML's `rollout.transport`."""
    rows: int = 1
    """Rows of an optimizer step for each training process."""


@dataclass(frozen=True)
class Placement:
    """The decision. Nodes are counted from 0; those that train come first."""

    machines: Machines
    train_nodes: int = 0
    processes: int = 0
    """On each node that trains or, where nothing trains, samples."""
    zero_stage: int = 0
    serve_nodes: int = 0
    """Nodes of their own for servers; 0 if they share the trainer's nodes, or there are none."""
    replicas: int = 0
    """Servers on each node that serves."""
    tensor_parallel: int = 1
    devices: str | None = None
    """The GPUs of servers on the trainer's node."""
    transport: str | None = None
    why: tuple[tuple[str, str, str], ...] = ()
    """(what, the decision, its reason)"""

    @property
    def world(self) -> int:
        return self.train_nodes * self.processes

    def table(self) -> str:
        """The decisions, one to a line."""
        m = self.machines
        each = f"{m.gpus} GPUs of {m.gpu_gib:g} GiB" if m.gpus else "CPUs"
        lines = [f"Placement on {_count(m.nodes, 'node')} with {each}:"]
        return "\n".join(
            lines + [f"  {what:<11}{decision:<38}{reason}".rstrip() for what, decision, reason in self.why]
        )


def place(machines: Machines, load: Load, config: PlacementConfig) -> Placement:
    """Decide. Raises `UserError` for what these machines cannot do, with the nearest that they can."""
    if load.trains and load.serves:
        placement = _both(machines, load, config)
    elif load.trains:
        if config.serve:
            raise UserError("placement.serve: this run has no servers of its own to place; leave it out.")
        placement = _training(machines, machines.nodes, load, config, "nothing else runs")
    else:
        placement = _sampling(machines, load, config)
    return placement


def _sampling(machines: Machines, load: Load, config: PlacementConfig) -> Placement:
    """Every GPU of every node: by servers of its own, else by a process for each GPU."""
    wrong = ["serve", "zero_stage", *([] if load.in_process and not machines.gpus else ["processes"])]
    for field in (name for name in wrong if getattr(config, name) is not None):
        raise UserError(f"placement.{field}: nothing is trained here, and every GPU samples; leave it out.")
    processes = (machines.gpus or config.processes or 1) if load.in_process else 1
    span = _span(machines, load)
    replicas = (machines.gpus // span or 1) if load.serves else 0
    placement = Placement(
        machines, serve_nodes=machines.nodes, processes=processes, replicas=replicas, tensor_parallel=span
    )
    each = f"{_count(machines.nodes, 'node')}, {processes} process{'es' if processes > 1 else ''} each"
    placement = _explained(placement, "work", each, "each claims shards of the prompts")
    if load.serves and machines.gpus:
        servers = f"{_count(replicas, 'server')} on {_count(span, 'GPU')} each"
        placement = _explained(placement, "serve", servers, "on each node, started by the run")
    return placement


def _both(machines: Machines, load: Load, config: PlacementConfig) -> Placement:
    if machines.nodes > 1:
        return _whole_nodes(machines, load, config)
    if machines.gpus == 0:
        if config.serve:
            raise UserError("placement.serve: one node without GPUs is shared; set rollout.serve.replicas and cores.")
        if load.shares:
            raise UserError("rollout.sleep and `ipc` are about a GPU's memory, and there is no GPU; leave them out.")
        placement = _training(machines, 1, load, config, "the cores are shared")
        return _explained(
            replace(placement, replicas=1, transport="shm"), "serve", "with the trainer", "started by the run"
        )
    if machines.gpus == 1 or load.shares:
        return _shared(machines, load, config)
    return _split_node(machines, load, config)


def _shared(machines: Machines, load: Load, config: PlacementConfig) -> Placement:
    """One server over all GPUs that train; they take turns."""
    if config.serve:
        raise UserError(
            "placement.serve: trainer and server share these GPUs; leave it out, or rollout.sleep and `ipc`."
        )
    if load.transport not in ("auto", "ipc"):
        raise UserError(f"rollout.transport: on shared GPUs weights go by `ipc`, not `{load.transport}`.")
    if load.heads % machines.gpus:
        most = max(n for n in range(1, machines.gpus) if load.heads % n == 0)
        raise UserError(
            f"rollout.sleep: a server over the {machines.gpus} GPUs that train cannot divide {load.heads} heads among "
            f"them.\nUse {most} GPUs, or leave rollout.sleep out: then some train and others serve."
        )
    if load.served > SERVED_WEIGHTS * machines.gpu_gib * GIB * machines.gpus:
        raise UserError(_too_large(load, machines))
    shared = "one GPU for both" if machines.gpus == 1 else "rollout.sleep asks for it"
    placement = _training(machines, 1, load, config, shared)
    placement = replace(placement, replicas=1, tensor_parallel=machines.gpus, transport="ipc")
    how = "they take turns (rollout.sleep)" if load.sleeps else "both keep their memory, without rollout.sleep"
    placement = _explained(placement, "serve", "1 server on the same", how)
    return _explained(placement, "weights", "ipc", "within a GPU they need not move")


def _split_node(machines: Machines, load: Load, config: PlacementConfig) -> Placement:
    """Some of a node's GPUs serve; the trainer has the first ones."""
    span = _span(machines, load)
    serving = config.serve or max(span, machines.gpus // 2 // span * span)
    if serving >= machines.gpus or serving % span:
        most = (machines.gpus - 1) // span * span
        if not most:
            raise UserError(
                f"placement: a server takes {span} of the {machines.gpus} GPUs, which leaves none to train. "
                "Use another node, or rollout.sleep."
            )
        nearest = min(range(span, most + 1, span), key=lambda n: abs(n - serving))
        raise UserError(
            f"placement.serve: {serving} of {machines.gpus} GPUs cannot be servers of {span}; "
            f"the nearest is {nearest}."
        )
    if not config.serve:  # the trainer's memory comes first
        while serving > span and not _fits(machines, 1, machines.gpus - serving, load, config):
            serving -= span
    training = machines.gpus - serving
    placement = _training(replace(machines, gpus=training), 1, load, config, "the first GPUs of the node")
    placement = replace(
        placement,
        machines=machines,
        replicas=serving // span,
        tensor_parallel=span,
        devices=",".join(map(str, range(training, machines.gpus))),
        transport=_between(load),
    )
    why = "as the YAML says" if config.serve else "half, as far as training fits on the others"
    placement = _explained(
        placement, "serve", f"{_count(placement.replicas, 'server')} on {_count(span, 'GPU')} each", why
    )
    return _explained(placement, "weights", placement.transport, "from GPU to GPU")


def _whole_nodes(machines: Machines, load: Load, config: PlacementConfig) -> Placement:
    if load.shares:
        raise UserError(
            "rollout.sleep: on several nodes whole nodes serve and none is shared; leave it out, and `ipc`, too."
        )
    serving = config.serve or machines.nodes // 2
    if serving >= machines.nodes:
        raise UserError(
            f"placement.serve: {serving} of {machines.nodes} nodes would leave none to train; "
            f"at most {machines.nodes - 1}."
        )
    if not config.serve:
        while serving > 1 and not _fits(machines, machines.nodes - serving, machines.gpus, load, config):
            serving -= 1
    span = _span(machines, load)
    placement = _training(machines, machines.nodes - serving, load, config, "whole nodes, the first ones")
    placement = replace(
        placement,
        serve_nodes=serving,
        replicas=machines.gpus // span if machines.gpus else 1,
        tensor_parallel=span,
        transport=_between(load) if machines.gpus else "shm",
    )
    on = f" on {_count(span, 'GPU')} each" if machines.gpus else ""
    why = "as the YAML says" if config.serve else "half of the nodes, as far as training fits on the others"
    servers = _count(placement.replicas * serving, "server")
    placement = _explained(placement, "serve", f"{_count(serving, 'node')}, {servers}{on}", why)
    how = "from GPU to GPU" if placement.transport == "nccl" else "files in the run's folder, which all nodes share"
    return _explained(placement, "weights", placement.transport, how)


def _training(machines: Machines, nodes: int, load: Load, config: PlacementConfig, why: str) -> Placement:
    if machines.gpus and config.processes not in (None, machines.gpus):
        raise UserError(
            f"placement.processes: there is one for each GPU that trains, here {machines.gpus}; leave it out."
        )
    processes = machines.gpus or config.processes or 1
    world = nodes * processes
    stage, reason = _zero_stage(machines, world, load, config)
    placement = Placement(machines, train_nodes=nodes, processes=processes, zero_stage=stage)
    each = f"{_count(nodes, 'node')}, {processes} process{'es' if processes > 1 else ''} each"
    placement = _explained(placement, "train", each, why)
    placement = _explained(placement, "ZeRO", str(stage) if stage else "none", reason)
    return _explained(placement, "step", f"{load.rows * world} rows", f"{load.rows} for each of {world} process(es)")


def _zero_stage(machines: Machines, world: int, load: Load, config: PlacementConfig) -> tuple[int, str]:
    """The least sharding that fits, or the configured one."""
    if world == 1 and config.zero_stage:
        raise UserError(f"placement.zero_stage: {config.zero_stage} shards over processes, and there is one; use 0.")
    if world > 1 and config.zero_stage == 0:
        raise UserError(f"placement.zero_stage: {world} processes train under DeepSpeed here; 1 is the nearest.")
    if machines.gpus == 0:
        if config.zero_stage == 1:
            raise UserError("placement.zero_stage: on CPUs it is 2 or 3; the nearest is 2.")
        return config.zero_stage or (2 if world > 1 else 0), "on CPUs"
    room = USABLE * machines.gpu_gib * GIB
    possible = [0] if world == 1 else [1, 2, 3]
    fitting = [stage for stage in possible if load.peak(world, stage) <= room]
    if not fitting:
        least = load.peak(world, possible[-1])
        enough = next((n for n in (2**k for k in range(1, 14)) if n > world and load.peak(n, 3) <= room), None)
        mend = f"{enough} GPUs with ZeRO-3 would do" if enough else "no number of GPUs would do"
        raise UserError(
            f"placement: training takes {least / GIB:.1f} GiB on each of {world} GPU(s), and {room / GIB:.1f} can be "
            f"used; {mend}.\nOr use a smaller per_device_train_batch_size, gradient_checkpointing, or LoRA."
        )
    if config.zero_stage is not None and config.zero_stage not in fitting:
        raise UserError(
            f"placement.zero_stage: {config.zero_stage} takes {load.peak(world, config.zero_stage) / GIB:.1f} GiB on "
            f"each GPU, and {room / GIB:.1f} can be used; the nearest is {fitting[0]}."
        )
    stage = config.zero_stage if config.zero_stage is not None else fitting[0]
    why = "as the YAML says" if config.zero_stage is not None else "the first that fits"
    return stage, f"{why}: {load.peak(world, stage) / GIB:.1f} of {room / GIB:.1f} GiB"


def _fits(machines: Machines, nodes: int, processes: int, load: Load, config: PlacementConfig) -> bool:
    try:
        _zero_stage(machines, nodes * max(1, processes), load, config)
    except UserError:
        return False
    return True


def _span(machines: Machines, load: Load) -> int:
    """GPUs of one server: the fewest that hold the weights and divide both the heads and the node."""
    if not machines.gpus or not load.serves:
        return load.tensor_parallel or 1
    possible = [n for n in range(1, machines.gpus + 1) if machines.gpus % n == 0 and load.heads % n == 0]
    if load.tensor_parallel is not None:
        if load.tensor_parallel not in possible:
            nearest = min(possible, key=lambda n: abs(n - load.tensor_parallel))
            raise UserError(
                f"rollout.serve.tensor_parallel: {load.tensor_parallel} does not divide {machines.gpus} GPUs and "
                f"{load.heads} heads; the nearest is {nearest}."
            )
        return load.tensor_parallel
    fitting = [n for n in possible if load.served <= SERVED_WEIGHTS * machines.gpu_gib * GIB * n]
    if not fitting:
        raise UserError(_too_large(load, machines))
    return fitting[0]


def _too_large(load: Load, machines: Machines) -> str:
    return (
        f"placement: a server's weights take {load.served / GIB:.1f} GiB, too much for the {machines.gpus} GPU(s) of "
        f"{machines.gpu_gib:g} GiB of one node. Use larger GPUs or a smaller model."
    )


def _between(load: Load) -> str:
    if load.transport == "ipc":
        raise UserError("rollout.transport: `ipc` is for GPUs that train and serve by turns; here `nccl` would do.")
    return "nccl" if load.transport == "auto" else load.transport


def _explained(placement: Placement, what: str, decision: str, reason: str) -> Placement:
    return replace(placement, why=(*placement.why, (what, decision, reason)))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
