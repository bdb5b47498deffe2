"""All rewards by name, ours and the user's own: what each takes is in its signature, which the YAML is checked by."""

import functools
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict  # pydantic reads no other in Python 3.11

from ..config import GRPORun
from ..config.rewards import IN_TRAINER, OF_ALL, Reward
from ..config.validate import check_whole_groups
from ..config.values import PathText, refusal
from ..errors import UserError, did_you_mean
from ..files import sha256
from .code.reward import code, code_format
from .format import format_reward, soft_format, tag_count
from .language import language
from .length import cosine, length, overlong
from .own import OwnReward, is_own
from .repetition import repetition
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
    name: str, dtype: str, model: Annotated[PathText, Field(description="a reward model's folder")]
) -> Callable[[list[str], list[dict]], list[float]]:
    """The scores by the reward model in the folder `model`. Raises `UserError` if there is none."""
    from .model import ModelReward  # torch and transformers are nothing for a pool's workers to import

    return ModelReward(name, model, dtype)


MODELS = {"helpfulness": by_model, "safety": by_model}
"""What makes such a reward of its name, a dtype, and the parameters that the YAML gives."""
BUILT_IN = {"accuracy": accuracy, "format": format_reward} | MODELS | VERIFIERS | ONE_BY_ONE
"""The report's own come first."""


def check_rewards(run: GRPORun, processes: int | None = None) -> None:
    """`settle` the run's rewards; in `processes`, if they are known, groups are whole where a reward looks at them."""
    settle(run.rewards)
    for key in filter(is_own, run.rewards):
        if processes is not None and own_reward(key).form == "group":
            check_whole_groups(run, processes, f"rewards.{key} looks at all completions of a prompt")


def settle(rewards: dict[str, Reward]) -> None:
    """Check each reward by its function, and put its parameters in as the function's types read them, as plain data.

    Raises `UserError` for a name that is no reward, a function that cannot be imported, and for a parameter that is
    not taken, missing or senseless.
    """
    for name, reward in rewards.items():
        adapter = _adapter(name)
        reward.parameters = adapter.dump_python(parameters(name, reward), mode="json")
        given = [field for field in IN_TRAINER if getattr(reward, field) is not None]
        if not is_own(name) and (given or not reward.isolated):
            field = (given or ["isolated"])[0]
            raise UserError(f"rewards.{name}: `{field}` is for functions of your own; leave it out.")
        if is_own(name) and given and reward.isolated:
            raise UserError(f"rewards.{name}: `{given[0]}` is of `isolated: false`; set that, too, or leave it out.")
    if "overlong" in rewards:
        most, cache = (rewards["overlong"].parameters[field] for field in ("max_tokens", "cache_tokens"))
        if cache > most:
            raise UserError(
                f"rewards.overlong: `cache_tokens` {cache} is more than `max_tokens` {most}, so every completion "
                "would be punished; lower it."
            )
    names = [*BUILT_IN]
    for key in filter(is_own, rewards):
        if own_reward(key).name in names:
            raise UserError(f"rewards.{key}: there is another reward `{own_reward(key).name}`; rename the function.")
        names.append(own_reward(key).name)


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
    """Field -> SHA-256 of the file of each function of the user's."""
    return {f"rewards.{key}": sha256(own_reward(key).file) for key in rewards if is_own(key)}


def _fields(name: str) -> dict[str, Parameter]:
    """The parameters of a reward's function that the YAML gives."""
    if is_own(name):
        return {each.name: each for each in own_reward(name).fields}
    if name not in BUILT_IN:
        raise UserError(
            f"rewards: `{name}` is not a reward; there are {', '.join(BUILT_IN)}.\n"
            "One of your own is `module:function` or `path/to/file.py:function`."
        )
    return {each.name: each for each in list(signature(BUILT_IN[name]).parameters.values())[2:]}


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
