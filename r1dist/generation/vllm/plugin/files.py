"""The receiving end of the `shm` transport: a vLLM weight transfer engine that loads safetensors files."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from ...weight_sync.files import opened, read_index


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """The folder of one version of the weights."""

    folder: str
    digest: str
    """SHA-256 of the folder's index, as the trainer wrote it."""


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads a folder of safetensors into the live model, all of it within one call.

    vLLM takes the model apart when an update begins and puts it together when it ends; a failure in between
    leaves it in pieces. So everything that can be wrong with the payload is found out before that.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        folder = Path(update_info.folder)
        index = read_index(folder, update_info.digest)
        self._check_names({name: tuple(entry["shape"]) for name, entry in index.items()})
        with opened(folder) as tensors:  # all of it, before the trainer may remove the folder for the next version
            initialize_layerwise_reload(self.model)
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in tensors)
            finalize_layerwise_reload(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def _check_names(self, given: dict[str, tuple[int, ...]]) -> None:
        missing = sorted(self._expected.keys() - given.keys())
        unknown = sorted(given.keys() - self._expected.keys())
        misshapen = sorted(name for name, shape in given.items() if shape != self._expected.get(name, shape))
        for problem, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen)):
            if names:
                raise ValueError(f"weights refused: {len(names)} tensors are {problem}, {names[0]} among them")

    @functools.cached_property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor of this architecture's checkpoint, a tied head included."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.model_config.hf_config)
        return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
