"""A YAML file and a command line become a checked configuration, or an error that names the mend."""

import dataclasses
import difflib
import functools
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from .objective import OBJECTIVES
from .runs import GRPORun
from .tree import section_of
from .trl_fields import TRL_CLASS, field_types, validator
from .validate import validate

# TRL's fields that one of ours replaces: set, they would be contradicted or ignored.
OURS_INSTEAD = {
    "model_init_kwargs": "`model.dtype` and `model.attn_implementation`",
    "reward_weights": "`rewards`",
    "vllm_model_impl": "`rollout.serve.arguments: [--model-impl, transformers]`",
    "vllm_group_port": "`rollout.transport`, which chooses free ports,",
    "vllm_structured_outputs_regex": "a reward for the form",
    "use_transformers_continuous_batching": "`rollout.engine`",
    "use_transformers_paged": "`rollout.engine`",
    "generation_kwargs": "`temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty`",
    "cache_implementation": "`rollout.engine`",
    "ds3_gather_for_generation": "`rollout.engine: vllm`, which gathers in buckets,",
    "resume_from_checkpoint": "`resume`",
    "remove_unused_columns": "`data.sources`",
    "eval_strategy": "launch/evaluate.py",
    "do_eval": "launch/evaluate.py",
}
# TRL's fields for its vLLM -> the `rollout` field that means the same.
ROLLOUT_INSTEAD = {
    "vllm_server_base_url": "servers",
    "vllm_server_timeout": "no_server_timeout",
    "vllm_enable_sleep_mode": "sleep",
    "vllm_gpu_memory_utilization": "serve.gpu_memory_utilization",
    "vllm_max_model_length": "serve.max_model_len",
    "vllm_tensor_parallel_size": "serve.tensor_parallel",
}
# Fields of earlier versions -> what they are called now.
RENAMED = {
    "verify.patience": "verify.retry_timeout",
    "rollout.timeout": "rollout.no_server_timeout",
    "rollout.in_flight": "rollout.max_concurrent_requests",
    "learns_from": "loss: pairwise` or `loss: pointwise",
    "ways": "generators",
}
SERVER_MODE = ("vllm_mode", "vllm_server_host", "vllm_server_port")
# What this project sets where the YAML is silent.
TRL_DEFAULTS = {"logging_steps": 1, "report_to": "none", "save_total_limit": 2}
# TRL's own default masks whole sequences, the longer the likelier.
GRPO_DEFAULTS = {"vllm_importance_sampling_mode": "token_truncate"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as text and `no` as false; this loader reads them as YAML 1.2 does."""


BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def config_path(argv: list[str], default_config: Path | None = None) -> Path | None:
    """The file that `--config` names, else the default."""
    named = _arguments(argv).get("config")
    return Path(named) if named is not None else default_config


def parse(run_class: type, argv: list[str], default_config: Path | None = None, processes: int | None = None) -> Any:
    """Build `run_class` from `--config FILE` and overrides such as `--max_steps 4` or `--data.template chat`.

    Args:
        processes: Training processes, if they are known already; see `validate`.

    Raises `UserError` for a missing file, text that is not YAML, an unknown key (the nearest one is named), a value of
    the wrong type, and what `validate` refuses.
    """
    path = config_path(argv, default_config)
    tree = _read(path) if path is not None else {}
    for key, text in _arguments(argv).items():
        if key != "config":
            _set(tree, key, text if _is_text(run_class, key) and text != "null" else _value(f"--{key}", text))
    return build(run_class, tree, str(path) if path else "the command line", processes)


def build(run_class: type, tree: dict, where: str, processes: int | None = None) -> Any:
    """Build `run_class` from `tree`; `where` is named in errors. TRL's fields are moved into `trl`."""
    tree = dict(tree)
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        if name in (tree.get(section, {}) if section else tree):
            raise UserError(f"{where}: `{old}` is now `{new}`.")
    if run_class.__name__ in TRL_CLASS:
        trl_class = TRL_CLASS[run_class.__name__]
        known = field_types(trl_class)
        ours = {f.name for f in dataclasses.fields(run_class)} - {"trl"}
        trl = {key: tree.pop(key) for key in list(tree) if key in known and key not in ours}
        if run_class is GRPORun:
            _translate_vllm(trl, tree, where)
        for key in trl:
            if key in OURS_INSTEAD:
                raise UserError(f"{where}: `{key}` is not set here; use {OURS_INSTEAD[key]} instead.")
        _reject_unknown(tree, ours, known, where)
        trl = _typed(functools.partial(_trl_values, trl_class), trl, where, run_class)
        if "output_dir" not in trl:
            raise UserError(f"{where}: `output_dir` is missing; name the folder that this run writes to.")
        tree["trl"] = {**TRL_DEFAULTS, **trl}
    run = _typed(TypeAdapter(run_class).validate_python, tree, where, run_class)
    if isinstance(run, GRPORun):
        run.trl = {**GRPO_DEFAULTS, **OBJECTIVES[run.train.objective], **run.trl}
    validate(run, where, processes)
    return run


def as_tree(run: Any) -> dict:
    """The resolved configuration as plain data, in the shape of the YAML that would give it."""
    tree = dataclasses.asdict(run)
    return {**tree.pop("trl", {}), **tree}


def split_arguments(run_class: type, argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of `argv` that set fields of `run_class` (or name its `--config`), and the others."""
    fields = {f.name for f in dataclasses.fields(run_class)} | {"config"}
    ours: list[str] = []
    others: list[str] = []
    target = others
    for word in argv:
        if word.startswith("--"):
            target = ours if re.split(r"[.=]", word[2:])[0] in fields else others
        target.append(word)
    return ours, others


def _translate_vllm(trl: dict, tree: dict, where: str) -> None:
    """Move what TRL's users say about vLLM from `trl` into the section `rollout` of `tree`, in place.

    Raises `UserError` where `rollout` itself says it, too.
    """
    given = {key: trl.pop(key) for key in list(trl) if key in (*ROLLOUT_INSTEAD, *SERVER_MODE, "use_vllm")}
    meant = {ROLLOUT_INSTEAD[key]: (key, value) for key, value in given.items() if key in ROLLOUT_INSTEAD}
    if "use_vllm" in given:
        meant["engine"] = ("use_vllm", "vllm" if given["use_vllm"] else "transformers")
    if given.get("vllm_mode") == "server" and "servers" not in meant:
        host = given.get("vllm_server_host", "127.0.0.1")
        meant["servers"] = ("vllm_mode", f"http://{host}:{given.get('vllm_server_port', 8000)}")
    for path, (key, value) in meant.items():
        section = tree["rollout"] = dict(tree.get("rollout", {}))
        *outer, name = path.split(".")
        for part in outer:
            section[part] = dict(section.get(part, {}))
            section = section[part]
        if name in section:
            raise UserError(f"{where}: `{key}` and `rollout.{path}` say the same thing; keep the latter.")
        section[name] = value


def _arguments(argv: list[str]) -> dict[str, str]:
    arguments, position = {}, 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise UserError(f"`{word}` is not understood; arguments are `--field value` or `--field=value`.")
        key, equals, text = word[2:].partition("=")
        position += 1
        if not equals:
            bare = position >= len(argv) or argv[position].startswith("--")
            text = "true" if bare else argv[position]
            position += 0 if bare else 1
        arguments[key] = text
    return arguments


def _value(where: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: `{text}` is not a value ({error.__class__.__name__}).") from error


def _is_text(run_class: type, key: str) -> bool:
    """Whether `key` names a field of ours that holds text, in which a colon or a number is nothing special."""
    *location, name = key.split(".")
    section = _section(run_class, [part for part in location if not part.isdigit()])
    hint = typing.get_type_hints(section).get(name) if section else None
    return hint is str or hint == str | None


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"--config: there is no file {path}.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `field: value` lines, not a {type(tree).__name__}.")
    return tree


def _set(tree: dict, key: str, value: Any) -> None:
    """Set a dotted key in place; a number between the dots counts into a list."""
    node, parts = tree, key.split(".")
    for part, following in zip(parts, parts[1:] + [None], strict=True):
        index = int(part) if isinstance(node, list) and part.isdigit() else part
        if isinstance(node, list) and not (isinstance(index, int) and index < len(node)):
            raise UserError(f"--{key}: `{part}` is not one of the {len(node)} entries of that list.")
        if following is None:
            node[index] = value
        else:
            if isinstance(node, dict):
                node.setdefault(index, {})
            node = node[index]
            if not isinstance(node, dict | list):
                raise UserError(f"--{key}: `{part}` holds a value, not a section.")


def _trl_values(trl_class: str, values: dict) -> dict:
    return validator(trl_class).model_validate(values).model_dump(exclude_unset=True)


def _reject_unknown(tree: dict, ours: set[str], trl: dict, where: str) -> None:
    for key in tree:
        if key not in ours:
            raise UserError(_unknown(where, str(key), ours | trl.keys()))


def _unknown(where: str, key: str, known: typing.Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key.rpartition(".")[2], list(known), n=1, cutoff=0.5)
    mend = f"; did you mean `{nearest[0]}`?" if nearest else "."
    return f"{where}: `{key}` is not a field{mend}"


def _typed(check: typing.Callable[[dict], Any], tree: dict, where: str, run_class: type) -> Any:
    try:
        return check(tree)
    except ValidationError as error:
        first = error.errors()[0]
        # Tags of a union ("float", "function-after[...]") are no part of the field's name.
        location = [part for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
        key = ".".join(map(str, location))
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            section = _section(run_class, location[:-1])
            known = [f.name for f in dataclasses.fields(section)] if section else []
            raise UserError(_unknown(where, key, known)) from error
        if first["type"] in ("missing", "missing_argument"):
            raise UserError(f"{where}: `{key}` is missing.") from error
        got = first["input"]
        raise UserError(f"{where}: `{key}`: {first['msg']}; got {got!r} ({type(got).__name__}).") from error


def _section(run_class: type, location: list) -> type | None:
    """The dataclass that holds the field at `location`, a path of names and list positions."""
    current: type | None = run_class
    for part in location:
        if isinstance(part, str) and current is not None:
            current = section_of(typing.get_type_hints(current).get(part))
    return current
