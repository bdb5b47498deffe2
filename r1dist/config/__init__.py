"""Every field of the YAML files, the loader, and the checks. Imports no torch."""

from .convert import ConvertRun
from .data import Data, Decontaminate, Source
from .model import Lora, Model
from .rewards import Reward, Verify
from .rollout import Rollout, Serve
from .runs import ChatRun, EvaluateRun, GRPORun, Requests, RewardModelRun, ServeRun, SFTRun
from .sampling import Filters, Generator, Prompting, Refine, SampleRun, Sampling
from .train import PlacementConfig, Train, TrainRL
