"""A GGUF file becomes a Hugging Face folder: weights, configuration, tokenizer, chat template.

transformers reads and dequantizes the weights. The tokenizer is built here from the file's metadata: of a Llama's
byte-level BPE transformers makes one that splits text as GPT-2's, and whose end token is the beginning token.

Not handled, and refused: architectures that transformers cannot read, tokenizers other than the byte-level BPE of
`PRE_TOKENIZERS`, scaled rotary embeddings, and models in several files.
"""

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .config import ConvertRun, Model
from .data.templates import QUESTION, Template, load_template
from .errors import UserError
from .files import lock_run_dir, sha256

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

CONTROL, USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> how text is split before merges, as in the models' own tokenizer.json (and llama.cpp's
# src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "qwen2": Sequence([Split(Regex(QWEN2_WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
}
NORMALIZERS = {"qwen2": normalizers.NFC()}
# Digits, white space before digits, code, and characters of two to four bytes.
TEXTS = (
    "The capital of France is",
    "12 + 57 = 69\n\n1. x =  5",
    "def f(x):\n    return x ** 2",
    "Größe, 价格: 3½ €, 🙂",
)
# Of logits: products with the same weights at other addresses may be added up in another order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


def convert(run: ConvertRun) -> dict[str, Any]:
    """Write `run.output_dir` from `run.gguf`, and return what was written, as plain data.

    The folder is renamed to its place when it is complete and was checked: loaded again, it must give the logits of
    the GGUF file, and the tokenizer must give texts back.

    Raises `UserError` for a file that is damaged or cannot be converted, for a folder that is not empty, and if the
    checks fail; nothing is written then.
    """
    path, output = Path(run.gguf), Path(run.output_dir).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output_dir: {output} is there already. Remove it, or choose another.")
    reader = open_gguf(path, run.sha256)
    empty = _empty_model(reader, path)
    tokenizer = build_tokenizer(reader, path)
    template = None if tokenizer.chat_template is None else Template(tokenizer, "chat", str(path))
    if tokenizer.eos_token is None:
        raise UserError(f"gguf: {path}: neither metadata nor chat template say what ends a text. Take another file.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stop_ids = [tokenizer.eos_token_id] if template is None else template.stop_ids
    work = output.with_name(f".{output.name}.converting")
    with lock_run_dir(work):
        try:
            staged = work / output.name
            shutil.rmtree(staged, ignore_errors=True)  # of a conversion that was killed
            loaded = _load(path, run.dtype)
            _save(_copy(loaded, empty), tokenizer, stop_ids, staged)
            if template is not None:
                load_template(Model(path=str(staged)), "chat")
            difference = _check(staged, tokenizer, loaded, template, path)
            os.rename(staged, output)
        finally:
            shutil.rmtree(work)
    return {
        "output_dir": run.output_dir,
        "architecture": loaded.config.model_type,
        "parameters": loaded.num_parameters(),
        "dtype": run.dtype,
        "chat_template": template is not None,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "stop_ids": stop_ids,
        "largest_logit_difference": difference,
    }


def open_gguf(path: Path, digest: str | None = None) -> "GGUFReader":
    """The file's metadata and the places of its tensors.

    Raises `UserError` without the package `gguf`, and for a file that is not there, has another digest, is no GGUF
    file or is cut off.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "gguf: the package gguf is not installed in this environment.\n`pip install -e '.[gguf]'` adds it."
        )
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"gguf: there is no file {path}.")
    if digest is not None and (found := sha256(path)) != digest:
        raise UserError(f"gguf: {path} has the sha256 {found}, not {digest}. Fetch it again.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"gguf: {path} is no GGUF file: it does not begin with `GGUF`.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"gguf: {path} is cut off or damaged. Fetch it again. ({error})") from error


def build_tokenizer(reader: "GGUFReader", path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describe. Raises `UserError` for a kind that is not handled."""
    kind, pre = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"gguf: {path} has a tokenizer of the kind {kind}, {pre}; those that can be converted are "
            f"{' and '.join(f'gpt2, {name}' for name in PRE_TOKENIZERS)}.\nTake the model's own Hugging Face folder."
        )
    tokens, types, merges = (
        _required(reader, path, f"tokenizer.ggml.{k}") for k in ("tokens", "token_type", "merges")
    )
    # Bytes that the vocabulary lacks are left out, as llama.cpp does.
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    backend.normalizer = NORMALIZERS.get(pre)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {name: _value(reader, f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    if _value(reader, "tokenizer.ggml.add_bos_token"):
        bos_id = _required(reader, path, "tokenizer.ggml.bos_token_id")
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_value(reader, "tokenizer.chat_template"),
        model_max_length=_value(reader, f"{_value(reader, 'general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in named.items() if i is not None},
    )


def _value(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _required(reader: "GGUFReader", path: Path, key: str) -> Any:
    value = _value(reader, key)
    if value is None:
        raise UserError(f"gguf: {path} has no {key} in its metadata. Take the model's own Hugging Face folder.")
    return value


def _empty_model(reader: "GGUFReader", path: Path) -> PreTrainedModel:
    """The model without weights. Raises `UserError` if transformers cannot hold all that the file says."""
    architecture = _required(reader, path, "general.architecture")
    try:
        config = AutoConfig.from_pretrained(path.absolute().parent, gguf_file=path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"gguf: {path} is of the architecture {architecture}, which transformers cannot read from GGUF files.\n"
            f"Take the model's own Hugging Face folder. ({error})"
        ) from error
    if _value(reader, f"{architecture}.rope.scaling.type") not in (None, "none"):
        raise UserError(
            f"gguf: {path} scales its rotary embeddings ({architecture}.rope.scaling), which would be lost.\n"
            "Take the model's own Hugging Face folder."
        )
    held = sum(tensor.n_elements for tensor in reader.tensors)
    if held != model.num_parameters():
        raise UserError(
            f"gguf: {path} holds {held} parameters, and transformers' model of its configuration has "
            f"{model.num_parameters()}: tensors are missing or would be lost.\n"
            "Take the model's own Hugging Face folder."
        )
    return model


def _load(path: Path, dtype: str) -> PreTrainedModel:
    """The model with dequantized weights. Raises `UserError` if one cannot be read or is not there."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path.absolute().parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
    except NotImplementedError as error:
        raise UserError(
            f"gguf: {path} is quantized in a way that cannot be read: {error}. Take another file."
        ) from error
    if info["missing_keys"]:
        raise UserError(f"gguf: {path} has no weights for {min(info['missing_keys'])}. Take another file.")
    return model.eval()


def _copy(loaded: PreTrainedModel, empty: PreTrainedModel) -> PreTrainedModel:
    """`empty` with the weights of `loaded`: one that was loaded from GGUF is marked as quantized."""
    empty.load_state_dict(loaded.state_dict(), assign=True)
    empty.tie_weights()
    return empty


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], folder: Path) -> None:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ids)
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": stop_ids if stop_ids[1:] else stop_ids[0]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _check(
    folder: Path, built: PreTrainedTokenizerBase, loaded: PreTrainedModel, template: Template | None, path: Path
) -> float:
    """The largest difference of logits between `folder` and the GGUF file. Raises `UserError` if anything differs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=loaded.dtype).eval()
    prompts = [built(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for text, ids in zip(TEXTS, prompts, strict=True):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids or tokenizer.decode(ids) != text:
            raise UserError(f"gguf: {path}: the converted tokenizer does not give {text!r} back. It cannot be used.")
    if template is not None:
        prompts.append(template.prompt_ids(template.prompt(QUESTION)))
    batches = [torch.tensor([ids]) for ids in prompts]
    difference = max(float((saved(ids).logits - loaded(ids).logits).abs().max()) for ids in batches)
    if not difference <= TOLERANCE[str(loaded.dtype).removeprefix("torch.")]:
        raise UserError(f"gguf: {path}: the converted model's logits differ by {difference}. It cannot be used.")
    return difference
