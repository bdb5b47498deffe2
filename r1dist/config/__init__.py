"""Every field of the YAML files, the loader, and the checks. Imports no torch."""

from .convert import ConvertRun
from .data import Data, Decontaminate
from .model import Lora, Model
from .rewards import Reward, Verify
from .rollout import Rollout, Serve
from .runs import ChatRun, EvaluateRun, EvaluationData, GRPORun, Requests, RewardModelRun, ServeRun, SFTRun
from .sampling import Filters, Generator, Prompting, Refine, SampleRun, Sampling
from .source import Source
from .train import PlacementConfig, Train, TrainRL
