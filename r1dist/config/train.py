"""What the trainers do beyond TRL's fields, and where they run."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from .resumable import MayChange
from .rewards import STRICT
from .values import Bounds


@dataclass(config=STRICT, kw_only=True)
class PlacementConfig:
    """For launch/job.py: which nodes and GPUs train, and which serve. It decides what is unset."""

    nodes: MayChange[PositiveInt | None] = None
    """Unset: those of the SLURM job, else this machine."""
    gpus_per_node: MayChange[NonNegativeInt | None] = None
    """Unset: as many as this machine has. 0: the CPUs do the work."""
    gpu_gib: MayChange[float | None] = Field(default=None, gt=0)
    """Memory of a GPU. Unset: this machine's."""
    serve: MayChange[PositiveInt | None] = None
    """Nodes for vLLM servers; on a single node, GPUs."""
    processes: MayChange[PositiveInt | None] = None
    """Training processes of each node without GPUs. Unset: one."""
    zero_stage: MayChange[Literal[0, 1, 2, 3] | None] = None
    """Unset: the first that fits."""


@dataclass(config=STRICT, kw_only=True)
class Train:
    """What every trainer does beyond TRL's fields."""

    stall_timeout: MayChange[float] = Field(default=1800, gt=0)
    """Seconds without progress after which a rank writes all threads' stacks and ends the run."""


@dataclass(config=STRICT, kw_only=True)
class TrainRL(Train):
    """What the GRPO trainer does, too."""

    objective: Literal["paper", "trl"] = "paper"
    """`paper`: the report's GRPO, see `r1dist/config/objective.py`. `trl`: TRL's own defaults (DAPO without KL).
    Either way a field that the YAML sets itself wins."""
    dynamic_sampling: NonNegativeInt = 0
    """Times at most that groups with equal rewards are replaced by other prompts' (DAPO). 0: never."""
    activation_offload: MayChange[bool] = False
    """Keep activations in the host's memory until the backward pass: slower, for longer rollouts. GPUs only."""
    pass_rate: Bounds | None = None
    """[least, most] share of right answers. From the second epoch on, a prompt with a rate outside when it
    was last asked is replaced by one within. Unset: every epoch has every prompt once."""
    token_budget: MayChange[PositiveInt | None] = None
    """Most tokens of a forward, a shared prompt counted once. Micro-batches with more are divided. Unset: no bound."""
