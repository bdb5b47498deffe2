"""A model's path, tokenizer and configuration, before its weights are loaded."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.hub_kernels import is_kernel, load_and_register_attn_kernel
from transformers.modeling_flash_attention_utils import (
    FLASH_ATTENTION_COMPATIBILITY_MATRIX,
    FLASH_ATTN_KERNEL_FALLBACK,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .adapters import Task, is_missing_folder, merged_path, path_with, require_peft, trained_parameters
from .config import Model
from .errors import UserError
from .tiny import EMBEDDED

VARLEN = "flash_attention_2"
INSTALL_VARLEN = "`make setup GPU=1`"


def model_path(model: Model) -> str:
    """The path of the weights: `tiny` and `tiny-small` are the embedded bases."""
    return str(EMBEDDED.get(model.path, model.path))


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, with `model.chat_template_kwargs` as defaults of its chat template.

    Where it has no token for padding, the end of a text pads. Raises `UserError` if it cannot be loaded.
    """
    path = model.tokenizer or path_with("tokenizer_config.json", model_path(model))
    tokenizer = _load(AutoTokenizer, path, "model.tokenizer" if model.tokenizer else "model.path")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template_kwargs:
        tokenizer.chat_template = _with_defaults(tokenizer, model)
    return tokenizer


def _with_defaults(tokenizer: PreTrainedTokenizerBase, model: Model) -> str:
    """The chat template with `model.chat_template_kwargs` written into it, so that the saved model keeps them."""
    if tokenizer.chat_template is None:
        raise UserError(f"model.chat_template_kwargs: the tokenizer of {model.path} has no chat template.")
    template = tokenizer.get_chat_template()
    defaults = ""
    for name, value in model.chat_template_kwargs.items():
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(
                f"model.chat_template_kwargs: the chat template of {model.path} has no `{name}`; leave it out."
            )
        defaults += f"{{%- set {name} = {name} if {name} is defined else {value!r} -%}}"
    return defaults + template


def load_model_config(model: Model) -> PretrainedConfig:
    """The architecture's configuration, without weights; raises `UserError` if it cannot be loaded."""
    return _load(AutoConfig, path_with("config.json", model_path(model)), "model.path")


def named_stop_ids(model: Model) -> list[int]:
    """The token ids that the model's generation settings name as ends of a completion."""
    try:
        named = GenerationConfig.from_pretrained(path_with("generation_config.json", model_path(model))).eos_token_id
    except OSError:  # a model need not have such settings
        return []
    return [named] if isinstance(named, int) else named or []


def stop_at(model: PreTrainedModel, stop_ids: list[int]) -> None:
    """What is saved of `model` names all of `stop_ids`, so that `generate` stops there, too."""
    model.generation_config.eos_token_id = stop_ids


def weights_path(model: Model) -> str:
    """The path of whole weights, for trainers and servers: adapters are merged, see `adapters.merged_path`."""
    path = merged_path(model_path(model), model.dtype)
    # Adapters record it, to be loaded from any working directory.
    return str(Path(path).absolute()) if model.lora is not None and Path(path).is_dir() else path


def check_lora(model: Model, task: Task = "CAUSAL_LM") -> None:
    """Raises `UserError` if `model.lora` cannot be used with this model, of which no weights are loaded."""
    if model.lora is not None:
        require_peft("model.lora")
        trained_parameters(model.lora, load_model_config(model), task)


def model_init_kwargs(model: Model, trl: dict[str, Any]) -> dict[str, Any]:
    """How TRL is to load the policy (and its reference); `trl`: TRL's fields. Raises `UserError` as `attention`.

    TRL's own `device_map` would spread one process's model over all GPUs that it sees, those of servers included. None
    leaves the device to the trainer.
    """
    kernel = attention(model, computes_in_half(model, trl))
    return {"dtype": model.dtype, "attn_implementation": kernel, "device_map": None}


def mixed_precision(trl: dict[str, Any]) -> bool:
    """Whether a trainer with these fields of TRL's computes in 16 bits whatever its weights are; on a GPU it may."""
    if "bf16" in trl or "fp16" in trl:
        return bool(trl.get("bf16") or trl.get("fp16"))
    return torch.cuda.is_available() and not trl.get("use_cpu")


def computes_in_half(model: Model, trl: dict[str, Any]) -> bool:
    """Whether a trainer computes in 16 bits on a GPU, which varlen kernels need."""
    return (mixed_precision(trl) or model.dtype != "float32") and not trl.get("use_cpu")


def attention(model: Model, half: bool) -> str:
    """transformers' name of the attention kernel: `model.attn_implementation`, with `auto` decided.

    A varlen kernel takes rows of several sequences without a mask. `auto` chooses one on a GPU where it is installed.

    Args:
        half: The computation is in 16 bits, on a GPU if there is one.

    Raises `UserError` for a kernel that is not there.
    """
    asked = model.attn_implementation
    if asked == "auto":
        ampere = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
        return VARLEN if half and ampere and why_missing(VARLEN) is None else "sdpa"
    if why := why_missing(asked):
        raise UserError(
            f"model.attn_implementation: {asked} cannot be used here: {why}.\n"
            f"Leave it out to use what is there; {INSTALL_VARLEN} adds flash attention where there is a GPU."
        )
    return asked


def why_missing(kernel: str) -> str | None:
    """Why an attention kernel cannot be used here; None if it can. One of the hub is loaded by that."""
    flash = re.fullmatch(r"flash_attention_(\d)", kernel)
    if flash and (known := FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(int(flash[1]))):
        if known["general_availability_check"]():
            return None
        kernel = FLASH_ATTN_KERNEL_FALLBACK[kernel]  # transformers' own choice where the package is missing
    if not is_kernel(kernel):
        there = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
        return None if kernel in there else f"there are {', '.join(k for k in there if '|' not in k)}"
    try:
        load_and_register_attn_kernel(kernel)
    except (ImportError, ValueError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return None


def _load(auto_class: type, path: str, field: str) -> Any:
    if is_missing_folder(path):
        raise UserError(f"{field}: there is no folder {path}.")
    try:
        return auto_class.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}: {path} cannot be loaded: it is no folder with a model, nor does the hub give it.\n"
            f"Check the name and the network, or give a local folder. ({str(error).splitlines()[0]})"
        ) from error
