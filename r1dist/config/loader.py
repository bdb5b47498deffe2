"""A YAML file and a command line become a checked configuration, or an error that names the mend."""

import copy
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError, asks_for_help, did_you_mean
from ..shipped import located, recipes
from .benchmarks import PROTOCOLS, settle
from .engines import choose_engine
from .objective import OBJECTIVES
from .plain import NULL, Plain, is_text, load, read_as
from .runs import EvaluateRun, GRPORun
from .tree import alternatives, child, parts_of, section_of
from .trl_fields import GRPO_DEFAULTS, TRL_CLASS, TRL_DEFAULTS, field_types, validator
from .trl_limits import OURS_INSTEAD
from .validate import validate
from .values import expanded, refusal

logger = logging.getLogger(__name__)

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
    "batch_size": "rollout.batch_size",
    "learns_from": "loss: pairwise` or `loss: pointwise",
    "ways": "generators",
}
SERVER_ADDRESS = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port")


def config_path(argv: list[str], default_config: Path | None = None) -> Path | None:
    """The file or recipe that `--config` names, else the default."""
    arguments = _arguments(argv)
    if "config" not in arguments:
        return default_config
    if arguments["config"] is None:
        raise UserError("--config needs a value, the YAML's path.")
    try:
        return Path(located(expanded(arguments["config"])))
    except ValueError as error:
        raise UserError(f"--config: {error}; got {arguments['config']!r}.") from error


def parse(run_class: type, argv: list[str], default_config: Path | None = None, processes: int | None = None) -> Any:
    """Build `run_class` from `--config FILE` and overrides such as `--max_steps 4` or `--data.template chat`.

    Args:
        processes: Training processes, if they are known already; see `validate`.

    With `--help` it prints the fields and exits instead. Raises `UserError` for a missing file, text that is not YAML,
    an unknown key (the nearest one is named), a value of the wrong type, and what `validate` refuses.
    """
    if asks_for_help(argv):
        from .reference import help_text

        print(help_text(run_class))
        raise SystemExit(0)
    path = config_path(argv, default_config)
    tree = _read(path) if path is not None else {}
    for key, text in _arguments(argv).items():
        if key != "config":
            _set(tree, key, _value(key, text, functools.reduce(child, parts_of(key), run_class)))
    return build(run_class, tree, str(path) if path else "the command line", processes)


def build(run_class: type, tree: dict, where: str, processes: int | None = None) -> Any:
    """Build `run_class` from `tree`; `where` is named in errors. TRL's fields are moved into `trl`."""
    tree = read_as(run_class, tree)
    if run_class is EvaluateRun:
        return _build_evaluation(tree, where)
    return _build(run_class, tree, where, processes)


def _build_evaluation(tree: dict, where: str) -> EvaluateRun:
    sampling = _section_in(tree, "sampling", where)
    protocol = tree.get("protocol")
    usual = PROTOCOLS.get(protocol, {}) if isinstance(protocol, str) else {}
    tree = {**usual, **tree, "sampling": {**usual.get("sampling", {}), **sampling}}
    run = _build(EvaluateRun, tree, where, None)
    settle(run.benchmarks, run.protocol, run.sampling.samples, explicit="samples" in sampling)
    return run


def _build(run_class: type, tree: dict, where: str, processes: int | None) -> Any:
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        if name in (_section_in(tree, section, where) if section else tree):
            raise UserError(f"{where}: `{old}` is now `{new}`.")
    if run_class.__name__ in TRL_CLASS:
        trl_class = TRL_CLASS[run_class.__name__]
        known = field_types(trl_class)
        ours = {f.name for f in dataclasses.fields(run_class)} - {"trl"}
        trl = {key: tree.pop(key) for key in list(tree) if key in known and key not in ours}
        for key in trl:
            if key in OURS_INSTEAD:
                raise UserError(f"{where}: `{key}` is not set here; use {OURS_INSTEAD[key]} instead.")
        _reject_unknown(tree, ours, known, where)
        trl = _typed(functools.partial(_trl_values, trl_class), trl, where, run_class)
        if run_class is GRPORun:
            _translate_vllm(trl, tree, where)
        if trl.get("output_dir") is None:
            raise UserError(f"{where}: `output_dir` is missing; name the folder that this run writes to.")
        tree["trl"] = {**TRL_DEFAULTS, **trl}
    run = _typed(TypeAdapter(run_class).validate_python, tree, where, run_class)
    if isinstance(run, GRPORun):
        run.trl = {**GRPO_DEFAULTS, **OBJECTIVES[run.train.objective], **run.trl}
    engine = choose_engine(run.rollout) if hasattr(run, "rollout") else None
    validate(run, where, processes)
    if engine is not None:
        logger.info(engine)
    return run


def as_tree(run: Any) -> dict:
    """The resolved configuration as plain data, in the shape of the YAML that would give it."""
    tree = dataclasses.asdict(run)
    for reward in tree.get("rewards", {}).values():
        reward |= reward.pop("parameters")
    return {**tree.pop("trl", {}), **tree}


def split_arguments(run_class: type, argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of `argv` that set fields of `run_class` (or name its `--config`), and the others."""
    fields = {f.name for f in dataclasses.fields(run_class)} | {"config", "help"}
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

    Raises `UserError` where `rollout` itself says it, too, and for a server that would not be asked.
    """
    moved = (*ROLLOUT_INSTEAD, *SERVER_ADDRESS, "vllm_mode", "use_vllm")
    given = {key: trl.pop(key) for key in list(trl) if key in moved}
    meant = {ROLLOUT_INSTEAD[key]: (key, value) for key, value in given.items() if key in ROLLOUT_INSTEAD}
    if "use_vllm" in given:
        meant["engine"] = ("use_vllm", "vllm" if given["use_vllm"] else "transformers")
    addresses = [key for key in SERVER_ADDRESS if given.get(key) is not None]
    if addresses and given.get("vllm_mode") == "colocate":
        raise UserError(
            f"{where}: `vllm_mode: colocate` asks no server, and `{addresses[0]}` names one; keep one of them."
        )
    named_by = addresses[0] if addresses else "vllm_mode" if given.get("vllm_mode") == "server" else None
    if named_by is not None:
        if not given.get("use_vllm", _section_in(tree, "rollout", where).get("engine") == "vllm"):
            raise UserError(f"{where}: `{named_by}` is about a server, which is only asked with `use_vllm: true`.")
        host = given.get("vllm_server_host", "127.0.0.1")
        meant.setdefault("servers", (named_by, f"http://{host}:{given.get('vllm_server_port', 8000)}"))
        if "vllm_server_base_url" in addresses and len(addresses) > 1:
            raise UserError(f"{where}: `{addresses[0]}` and `{addresses[1]}` both name the server; keep one of them.")
    for path, (key, value) in meant.items():
        section = tree["rollout"] = dict(_section_in(tree, "rollout", where))
        *outer, name = path.split(".")
        for part in outer:
            section[part] = dict(_section_in(section, part, where))
            section = section[part]
        if name in section:
            raise UserError(f"{where}: `{key}` and `rollout.{path}` say the same thing; keep the latter.")
        section[name] = value


def _section_in(tree: dict, name: str, where: str) -> dict:
    section = tree.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{where}: `{name}` is a section; it must hold `field: value` lines, not {section!r}.")
    return section


def _arguments(argv: list[str]) -> dict[str, str | None]:
    """Key -> text, None for a key without (`--bf16`)."""
    arguments: dict[str, str | None] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise UserError(f"`{word}` is not understood; arguments are `--field value` or `--field=value`.")
        key, equals, text = word[2:].partition("=")
        position += 1
        bare = not equals and (position >= len(argv) or argv[position].startswith("--"))
        if not equals and not bare:
            text = argv[position]
            position += 1
        arguments[key] = None if bare else text
    return arguments


def _value(key: str, text: str | None, hint: Any) -> Any:
    """What the words `--key text` give a field of the type `hint`."""
    if text is None:
        if bool not in alternatives(hint) and hint is not Any:
            raise UserError(f"--{key} needs a value; `--{key}` alone is for fields that are true or false.")
        return True
    if is_text(hint) and text != "null":  # a colon or a bracket is nothing special there
        return text
    try:
        return load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{key}: `{text}` is not a value ({error.__class__.__name__}).") from error


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(
            f"--config: there is no file {path}, and no recipe of that name{did_you_mean(str(path), recipes())}"
        )
    try:
        tree = load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        what = "nothing" if not tree else "a list" if isinstance(tree, list) else "a text"
        raise UserError(f"{path} must hold `field: value` lines, not {what}.")
    return tree


def _set(tree: dict, key: str, value: Any) -> None:
    """Set a dotted key in place; a number between the dots counts into a list."""
    node, parts = tree, parts_of(key)
    for part, following in zip(parts, parts[1:] + [None], strict=True):
        index = int(part) if isinstance(node, list) and part.isdigit() else part
        if isinstance(node, list) and not (isinstance(index, int) and index < len(node)):
            raise UserError(f"--{key}: `{part}` is not one of the {len(node)} entries of that list.")
        if following is None:
            node[index] = value
        else:
            inner = node.get(index) if isinstance(node, dict) else node[index]
            # A copy: what YAML's anchors share is to be changed in one place.
            node[index] = {} if inner is None or (isinstance(inner, Plain) and inner in NULL) else copy.copy(inner)
            node = node[index]
            if not isinstance(node, dict | list):
                raise UserError(f"--{key}: `{part}` holds a value, not a section.")


def _trl_values(trl_class: str, values: dict) -> dict:
    return validator(trl_class).model_validate(values).model_dump(exclude_unset=True)


def _reject_unknown(tree: dict, ours: set[str], trl: dict, where: str) -> None:
    for key in tree:
        if key not in ours:
            raise UserError(_unknown(where, str(key), ours | trl.keys()))


def _unknown(where: str, key: str, known: Iterable[str]) -> str:
    return f"{where}: `{key}` is not a field{did_you_mean(key.rpartition('.')[2], known)}"


def _typed(check: Callable[[dict], Any], tree: dict, where: str, run_class: type) -> Any:
    try:
        return check(tree)
    except ValidationError as error:
        first = error.errors()[0]
        location, refused = refusal(first)
        key = ".".join(location)
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            section = section_of(functools.reduce(child, location[:-1], run_class))
            known = [f.name for f in dataclasses.fields(section)] if section else []
            raise UserError(_unknown(where, key, known)) from error
        if first["type"] in ("missing", "missing_argument"):
            raise UserError(f"{where}: `{key}` is missing.") from error
        raise UserError(f"{where}: `{key}`: {refused}") from error
