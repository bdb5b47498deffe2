"""All rewards by name, ours and the user's own: what each takes is in its signature, which the YAML is checked by."""

import functools
import re
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict  # pydantic reads no other in Python 3.11

from ..config import GRPORun
from ..config.rewards import IN_TRAINER, OF_ALL, OF_SERVER, Reward
from ..config.validate import check_whole_groups
from ..config.values import Expanded, PathText, refusal
from ..errors import UserError, did_you_mean
from ..files import sha256
from .code.reward import code, code_format
from .format import format_reward, soft_format, tag_count
from .judge import Judge, check_placeholders
from .language import language
from .length import cosine, length, overlong
from .own import OwnReward, is_own
from .repetition import repetition
from .server import Endpoint, ServerReward
from .steps import reasoning_steps
from .task import accuracy, task

ONE_BY_ONE: dict[str, Callable[..., float | None]] = {
    "cosine": cosine,
    "format": format_reward,
    "length": length,
    "overlong": overlong,
    "soft_format": soft_format,
    "tag_count": tag_count,
}
"""Rewards of a completion and its row, called with the parameters that the YAML gives.

They run in the trainer's thread: the longest completion, whatever it holds, takes them a few milliseconds.
"""

VERIFIERS: dict[str, Callable[..., float | None]] = {
    "accuracy": accuracy,
    "code": code,
    "code_format": code_format,
    "language": language,
    "reasoning_steps": reasoning_steps,
    "repetition": repetition,
    "task": task,
}
"""The same, where a completion can make them slow, or worse: only ever called in a pool's workers."""


def by_model(
    name: str, dtype: str, model: Annotated[PathText, Field(description="a reward model's folder")],
    url: Expanded | None = None, api_key_env: str | None = None,
) -> Callable[[list[str], list[dict]], list[float]] | ServerReward:  # fmt: skip
    """The scores by the reward model in the folder `model`: in this process, or by the server at `url` that holds it.

    Raises `UserError` if there is none.
    """
    # torch and transformers are nothing for a pool's workers to import
    if url is not None:
        from .served import ServedModel

        return ServedModel(name, model, url, api_key_env)
    from .model import ModelReward

    return ModelReward(name, model, dtype)


MODELS = {"helpfulness": by_model, "safety": by_model}
"""What makes such a reward of its name, a dtype, and the parameters that the YAML gives."""
JUDGE = re.compile(r"judge(_\w+)?")
"""Names of judges: a run may have several."""
BUILT_IN = {"accuracy": accuracy, "format": format_reward} | MODELS | VERIFIERS | ONE_BY_ONE | {"judge": Judge}
"""The report's own come first."""
NO_FIELDS = {"completion", "row", "name", "dtype"}
"""Parameters of these that the YAML does not give."""


def check_rewards(run: GRPORun, processes: int | None = None) -> None:
    """`settle` the run's rewards; in `processes`, if they are known, groups are whole where a reward looks at them."""
    settle(run.rewards)
    for key in filter(is_own, run.rewards):
        if processes is not None and own_reward(key).form == "group":
            check_whole_groups(run, processes, f"rewards.{key} looks at all completions of a prompt")
    for name in filter(JUDGE.fullmatch, run.rewards):
        check_placeholders(judge_of(name, run.rewards[name]), _columns_of(run))


def _columns_of(run: GRPORun) -> set[str]:
    """The columns that rows of the run have, of one source or another."""
    from ..data.sources import TAKEN  # `datasets` is nothing for a pool's workers to import

    return TAKEN - {"columns"} | {each.rpartition(".")[2] for source in run.data.sources for each in source.columns}


def settle(rewards: dict[str, Reward]) -> None:
    """Check each reward by its function, and put its parameters in as the function's types read them, as plain data.

    Raises `UserError` for a name that is no reward, a function that cannot be imported, and for a parameter that is
    not taken, missing or senseless.
    """
    for name, reward in rewards.items():
        adapter = _adapter(name)
        reward.parameters = adapter.dump_python(parameters(name, reward), mode="json")
        _check_calls(name, reward)
        if JUDGE.fullmatch(name):
            judge_of(name, reward)
    if "overlong" in rewards:
        most, cache = (rewards["overlong"].parameters[field] for field in ("max_tokens", "cache_tokens"))
        if cache > most:
            raise UserError(
                f"rewards.overlong: `cache_tokens` {cache} is more than `max_tokens` {most}, so every completion "
                "would be punished; lower it."
            )
    names = [*BUILT_IN, *filter(JUDGE.fullmatch, rewards)]
    for key in filter(is_own, rewards):
        if own_reward(key).name in names:
            raise UserError(f"rewards.{key}: there is another reward `{own_reward(key).name}`; rename the function.")
        names.append(own_reward(key).name)


def _check_calls(name: str, reward: Reward) -> None:
    """Raises `UserError` for fields of `reward` that are of other rewards."""
    given = [field for field in IN_TRAINER if getattr(reward, field) is not None]
    if is_own(name):
        if given and reward.isolated:
            raise UserError(f"rewards.{name}: `{given[0]}` is of `isolated: false`; set that, too, or leave it out.")
        return
    if not reward.isolated or reward.deterministic:
        given = ["deterministic" if reward.isolated else "isolated"]
    elif asks_server(name, reward):
        Endpoint(name, *(reward.parameters.get(field) for field in OF_SERVER))
        return
    if given:
        raise UserError(f"rewards.{name}: `{given[0]}` is for functions of your own; leave it out.")
    if reward.parameters.get("api_key_env") is not None:
        raise UserError(f"rewards.{name}: `api_key_env` is for a server; set `url`, too, or leave it out.")


def asks_server(name: str, reward: Reward) -> bool:
    """Whether it is a reward of ours that asks a server, with the fields of `isolated: false`."""
    return not is_own(name) and reward.parameters.get("url") is not None


def judge_of(name: str, reward: Reward) -> Judge:
    """The judge `name`. Raises `UserError`."""
    return Judge(name, **parameters(name, reward))


def parameters(name: str, reward: Reward) -> dict[str, Any]:
    """What the YAML gives the reward `name`, in its function's types. Raises `UserError`."""
    try:
        return _adapter(name).validate_python(reward.parameters)
    except ValidationError as error:
        first, known = error.errors()[0], _fields(name)
        location, refused = refusal(first)
        field = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"rewards.{name}: it takes no `{field}`{did_you_mean(field, [*known, *OF_ALL])}"
            ) from error
        if first["type"] == "missing" and len(first["loc"]) == 1:
            about = [each.description for each in _metadata(known[field]) if isinstance(each, FieldInfo)]
            raise UserError(f"rewards.{name}: it needs {', '.join([f'`{field}`', *about])}.") from error
        raise UserError(f"`{'.'.join(['rewards', name, *location])}`: {refused}") from error


@functools.cache
def own_reward(key: str) -> OwnReward:
    """The user's function; imported once in this process. Raises `UserError`."""
    return OwnReward(key)


def isolated(rewards: dict[str, Reward]) -> dict[str, Callable[..., Any]]:
    """Name -> the user's functions that a pool must know."""
    return {own_reward(key).name: own_reward(key) for key in rewards if is_own(key) and rewards[key].isolated}


def source_digests(rewards: dict[str, Reward]) -> dict[str, str]:
    """Field -> SHA-256 of the file of each function of the user's, and of each rubric that is in one."""
    functions = {f"rewards.{key}": sha256(own_reward(key).file) for key in rewards if is_own(key)}
    files = {name: file for name, each in rewards.items() if (file := each.parameters.get("rubric_file"))}
    rubrics = {f"rewards.{name}.rubric_file": sha256(Path(file)) for name, file in files.items() if not is_own(name)}
    return functions | rubrics


def _fields(name: str) -> dict[str, Parameter]:
    """The parameters of a reward's function that the YAML gives."""
    if is_own(name):
        return {each.name: each for each in own_reward(name).fields}
    ours = "judge" if JUDGE.fullmatch(name) else name
    if ours not in BUILT_IN:
        raise UserError(
            f"rewards: `{name}` is not a reward; there are {', '.join(BUILT_IN)}.\n"
            "One of your own is `module:function` or `path/to/file.py:function`; further judges are `judge_NAME`."
        )
    return {each.name: each for each in signature(BUILT_IN[ours]).parameters.values() if each.name not in NO_FIELDS}


@functools.cache
def _adapter(name: str) -> TypeAdapter:
    hints: dict[str, Any] = {}
    for field, each in _fields(name).items():
        if field in OF_ALL:
            raise UserError(f"rewards.{name}: its parameter `{field}` is a field of every reward; rename it.")
        hint = Any if each.annotation is Parameter.empty else each.annotation
        hints[field] = hint if each.default is Parameter.empty else NotRequired[hint]
    try:
        fields = TypedDict("fields", hints)
        fields.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
        return TypeAdapter(fields)
    except PydanticUserError as error:
        said = str(error).splitlines()[0]
        raise UserError(f"rewards.{name}: a parameter's type is none that a YAML can give: {said}") from error


def _metadata(parameter: Parameter) -> Sequence[Any]:
    return getattr(parameter.annotation, "__metadata__", ())
