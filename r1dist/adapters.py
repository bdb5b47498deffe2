"""LoRA adapters by PEFT: their configuration, what a run with them leaves, and how a folder of them is loaded."""

import copy
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
)
from transformers.integrations import deepspeed
from transformers.utils import find_adapter_config_file

from .config import Lora, Model
from .errors import UserError
from .files import lock_run_dir, sha256

Task = Literal["CAUSAL_LM", "SEQ_CLS"]
AUTO_CLASS: dict[Task, type] = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGING = ".merging"  # folder beside the adapters: the lock of who merges them, and what is not complete yet


def require_peft(what: str) -> None:
    """Raises `UserError` where PEFT is not installed; `what` needs it."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what}: peft is not installed in this environment.\n`pip install -e '.[lora]'` adds it.")


def lora_config(lora: Lora | None, task: Task = "CAUSAL_LM") -> Any:
    """PEFT's configuration of the adapters, or None. With `SEQ_CLS` PEFT trains and saves the new head, too."""
    if lora is None:
        return None
    require_peft("model.lora")
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type=task,
    )


def trained_parameters(lora: Lora, architecture: PretrainedConfig, task: Task) -> int:
    """Parameters that are trained: the adapters, and with `SEQ_CLS` the head. No weights are loaded.

    Raises `UserError` if `targets` has a name of no layer, or the layer that shares its weights with another.
    """
    config = lora_config(lora, task)
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    architecture = copy.deepcopy(architecture)
    if task == "SEQ_CLS":
        architecture.num_labels = 1
    with torch.device("meta"):
        model = AUTO_CLASS[task].from_config(architecture)
        layers = [name for name, _ in model.named_modules()]
        for target in lora.targets if isinstance(lora.targets, list) else []:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                raise _no_such_layer(target, model)
        try:
            adapted = get_peft_model(model, config)
        except (ValueError, re.error) as error:
            raise _no_such_layer(lora.targets, model) from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if architecture.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise UserError(
            f"model.lora.targets: {lora.targets} adapts the head or the embeddings, which share their weights in this "
            "model: merged, an update of one would change the other.\nName other layers, or use `all-linear`."
        )
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _no_such_layer(targets: str | list[str], model: torch.nn.Module) -> UserError:
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    inner = sorted({name.rpartition(".")[2] for name in layers if "." in name})  # all but the head
    return UserError(
        f"model.lora.targets: {targets} is the name of no layer of this model that can be adapted.\n"
        f"Use `all-linear`, or some of {', '.join(inner)}."
    )


def is_missing_folder(path: str) -> bool:
    """Whether `path` is written as a folder's and there is none. Anything else may be a hub id."""
    return path.startswith((".", "/", "~")) and not Path(path).is_dir()


def adapter_folder(path: str) -> Path | None:
    """The folder with the adapters that `path` (a folder or a hub id) holds; None where it holds none."""
    if is_missing_folder(path) or find_adapter_config_file(path) is None:
        return None
    require_peft(f"{path} holds adapters")
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path))


def base_of(folder: Path) -> str:
    """The model that the adapters in `folder` were trained on. Raises `UserError` if it is no longer there."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if config.is_prompt_learning:
        raise UserError(f"{folder}: {config.peft_type.value} cannot be merged into the model. Name another model.")
    if base is None or is_missing_folder(base):
        raise UserError(
            f"{folder} holds adapters of a base model that is not there: {base}.\n"
            f"Correct `base_model_name_or_path` in its {CONFIG}."
        )
    return base


def path_with(name: str, path: str) -> str:
    """Where the file `name` of the model `path` is: adapters that do not bring it have it from their base model."""
    folder = adapter_folder(path)
    if folder is None or (folder / name).exists():
        return path if folder is None else str(folder)
    return path_with(name, base_of(folder))


@contextmanager
def whole_weights() -> Iterator[None]:
    """A model that is loaded inside is whole, also where transformers is set up to shard it over ranks (ZeRO-3)."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    sharding = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            deepspeed.set_hf_deepspeed_config(sharding)


@whole_weights()
def load_model(path: str, task: Task = "CAUSAL_LM", **kwargs: Any) -> PreTrainedModel:
    """The model of `path`; adapters are merged into their base model: W + alpha / r B A (arXiv 2106.09685, eq. 3).

    Its weights are whole on each rank that calls, see `whole_weights`.

    Args:
        kwargs: Of transformers' `from_pretrained`.

    Raises `UserError` if the adapters are of another task, or their base model is not there.
    """
    folder = adapter_folder(path)
    if folder is None:
        return AUTO_CLASS[task].from_pretrained(path, **kwargs)
    from peft import PeftConfig, PeftModel

    trained_for = PeftConfig.from_pretrained(str(folder)).task_type
    if trained_for not in (None, task):
        raise UserError(f"{path} holds adapters trained for {trained_for}; here {task} is needed. Name others.")
    base = load_model(base_of(folder), task, **kwargs)
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()


def merged_path(path: str, dtype: str) -> str:
    """`path`, or, where that holds adapters, a folder beside them with the merged model, written at the first call.

    For trainers and servers, which load a model by its path. The merged weights are in `dtype`, so that nothing of the
    adapters is rounded off; the folder's name has it and the digest of the adapters.

    Raises `UserError` as `load_model`, and if the folder cannot be written to.
    """
    folder = adapter_folder(path)
    if folder is None:
        return path
    digests = [sha256(folder / name) for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    merged = folder / f"merged-{dtype}-{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:12]}"
    if merged.is_dir():
        return str(merged)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"model.path: the adapters of {folder} must be merged, which is done in that folder; it cannot be "
            "written to.\nCopy it, and name the copy."
        )
    with lock_run_dir(folder / MERGING, wait=True):
        if not merged.is_dir():
            partial = folder / MERGING / merged.name
            shutil.rmtree(partial, ignore_errors=True)
            load_model(path, dtype=dtype).save_pretrained(partial)
            AutoTokenizer.from_pretrained(path_with("tokenizer_config.json", path)).save_pretrained(partial)
            os.rename(partial, merged)
    return str(merged)


def save_trained(trainer: Trainer, model: Model, task: Task = "CAUSAL_LM") -> None:
    """Save what was trained into the run's folder: the model, or as `model.lora.save` says. A collective.

    Its files are complete when it returns, on whichever rank.
    """
    trainer.save_model()
    if model.lora is not None and trainer.args.should_save:
        _complete_adapters(trainer, model, model.lora.save, task)
    trainer.accelerator.wait_for_everyone()


def _complete_adapters(trainer: Trainer, model: Model, save: str, task: Task) -> None:
    """What is missing beside the adapters that were saved, or the merged model, made from them, in their place."""
    folder = Path(trainer.args.output_dir)
    if task == "CAUSAL_LM":
        trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(folder)
    if save == "adapters":
        return
    head = {"num_labels": 1, "pad_token_id": trainer.processing_class.pad_token_id} if task == "SEQ_CLS" else {}
    load_model(str(folder), task, dtype=model.dtype, **head).save_pretrained(folder)
    for adapters in folder.glob("adapter_*"):
        adapters.unlink()
