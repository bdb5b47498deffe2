"""Every check that looks at more than one field. Each raises `UserError`, which names the mend."""

from typing import Any

from ..errors import UserError
from .data import Data
from .gym import PATH as GYM
from .gym import check_tasks, has_tasks
from .objective import LOSS_TYPES
from .runs import EvaluateRun, GRPORun, RewardModelRun, SFTRun, TrainingRun
from .sampling import Filters, SampleRun
from .source import Source, sources_in
from .trackers import check_trackers
from .trl_fields import micro_steps_per_generation, trl_value
from .trl_limits import UNSUPPORTED, UNSUPPORTED_IN_GRPO

MEASURED_ON = {GRPORun: "`data.eval`", SFTRun: "`data.eval` or `holdout`", RewardModelRun: "`holdout`"}
EVALUATED = ("accuracy", "format", "finished", "mean_tokens")
"""Scores of an evaluation during training that say which checkpoint is the best."""


def validate(run: Any, where: str, processes: int | None = None) -> None:
    """Check the fields of `run` against each other; `where` is the file that errors name.

    Args:
        processes: Training processes. None: not known yet, what depends on them is left to a later call.

    Raises `UserError`.
    """
    check_tasks(run, where)
    _check_streams(run, where)
    _check_weights(run, where)
    _check_hidden_tests(run, where)
    if isinstance(run, SampleRun):
        _check_generators(run)
        _check_prompt_filter(run, where)
    if isinstance(run, SampleRun | EvaluateRun):
        _check_servers(run, where)
    if isinstance(run, EvaluateRun):
        _check_evaluation(run, where)
    if isinstance(run, TrainingRun):
        _check_supported(run, where)
        check_trackers(run.trl, where)
        _check_hub(run, where)
        _check_training_evaluation(run, where)
    else:
        _check_not_trained(run, where)
    if isinstance(run, SFTRun):
        _check_packing(run, where)
    if not isinstance(run, GRPORun):
        return
    if "task" in run.rewards and not any(has_tasks(source) for source in run.data.sources):
        raise UserError(f"{where}: `rewards.task` is for rows of a task, but `data.sources` has no `path: {GYM}`.")
    _check_servers(run, where)
    _check_objective(run, where)
    _check_staleness(run, where)
    _check_pass_rate(run, where)
    _check_generation(run, where, processes)
    if processes is not None:
        _check_groups(run, processes)


def _check_generators(run: SampleRun) -> None:
    names = [generator.name for generator in run.generators]
    if len(set(names)) < len(names):
        raise UserError("generators: two of them have the same `name`; each needs its own.")
    if any(generator.data.eval for generator in run.generators):
        raise UserError("generators: `data.eval` is for training, and nothing is trained here; leave it out.")
    if run.rows is None and any(generator.share < 1 for generator in run.generators):
        raise UserError("generators: a `share` below 1 needs `rows`, the number that it is a share of.")


def _check_streams(run: Any, where: str) -> None:
    for name, source in sources_in(run):
        if source.stream and source.limit is None:
            raise UserError(f"{where}: `{name}.stream` needs `limit`, the number of rows to read.")


def _check_weights(run: Any, where: str) -> None:
    """All sources of a list have a weight or none has, and only where a mixture is made of them."""
    mixed = _mixed(run)
    for name, source in sources_in(run):
        if source.weight is not None and name.rpartition(".")[0] not in mixed:
            raise UserError(f"{where}: `{name}.weight`: these rows are not mixed, but all used; leave it out.")
    for name, sources in mixed.items():
        without = [number for number, source in enumerate(sources) if source.weight is None]
        if 0 < len(without) < len(sources):
            raise UserError(
                f"{where}: `{name}.{without[0]}` has no `weight`, but others of `{name}` have.\nGive all of them one, "
                "or none: then each is used whole."
            )
    for name, data in _data_of(run).items():
        if data.stopping_strategy is not None and data.sources[0].weight is None:
            raise UserError(f"{where}: `{name}.stopping_strategy` is of sources with a `weight`; leave it out.")


def _check_hidden_tests(run: Any, where: str) -> None:
    """What is trained on, or drawn for it, has no tests that a program can look into."""
    for name, data in _data_of(run).items():
        for number, source in enumerate(data.sources):
            if source.tests_format == "humaneval":
                raise UserError(
                    f"{where}: `{name}.sources.{number}.tests_format`: humaneval is for evaluation, since its tests "
                    "run beside the program,\nwhich could learn to pass them otherwise. Name tests of the form "
                    "{stdin, stdout} or {call, returns}."
                )


def _mixed(run: Any) -> dict[str, list[Source]]:
    """Dotted name -> the lists of sources that may have weights."""
    lists = {f"{name}.sources": data.sources for name, data in _data_of(run).items()}
    return lists | ({"mix": run.mix} if isinstance(run, SampleRun) else {})


def _data_of(run: Any) -> dict[str, Data]:
    if isinstance(run, SampleRun):
        return {f"generators.{number}.data": generator.data for number, generator in enumerate(run.generators)}
    return {"data": run.data} if isinstance(run, GRPORun | SFTRun) else {}


def _check_prompt_filter(run: SampleRun, where: str) -> None:
    """With `pass_rate`, nothing is set that is of samples, and each generator draws enough for some rate within."""
    if run.pass_rate is None:
        return
    _check_shares(run.pass_rate, f"{where}: `pass_rate`")
    least, most = run.pass_rate
    of_samples = {"filters": run.filters != Filters(), "mix": bool(run.mix)}
    for number, generator in enumerate(run.generators):
        of_samples[f"generators.{number}.refine"] = generator.refine is not None
        of_samples[f"generators.{number}.per_prompt"] = generator.per_prompt > 1
    for field, is_set in of_samples.items():
        if is_set:
            raise UserError(f"{where}: with `pass_rate` the rows are prompts, and `{field}` is of samples; drop one.")
    for number, generator in enumerate(run.generators):
        sampling, field = generator.sampling, f"generators.{number}.sampling"
        samples = sampling.samples if sampling.temperature > 0 else 1  # all alike
        if not any(least <= right / samples <= most for right in range(samples + 1)):
            steps = "0 or 1" if samples == 1 else f"multiples of 1/{samples}"
            mend = f"`{field}.samples`" if sampling.temperature > 0 else f"`{field}.temperature`, which is 0"
            raise UserError(
                f"{where}: no prompt can have a `pass_rate` within [{least:g}, {most:g}]: rates are {steps} "
                f"here.\nRaise {mend}, or widen `pass_rate`."
            )


def _check_shares(bounds: list[float], field: str) -> None:
    least, most = bounds
    if not 0 <= least <= most <= 1:
        raise UserError(f"{field} is [{least:g}, {most:g}]; it is [least, most], both from 0 to 1.")


def _check_evaluation(run: EvaluateRun, where: str) -> None:
    if not (run.data.sources or run.benchmarks or run.requests):
        raise UserError(f"{where}: nothing to evaluate: set `data.sources`, `benchmarks` or `requests`.")
    names = [benchmark.name for benchmark in run.benchmarks]
    if taken := {"data", "requests"}.intersection(names):
        raise UserError(f"{where}: `benchmarks`: `{taken.pop()}` is the name of other scores; choose another.")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: `benchmarks`: two of them have the same `name`; each needs its own.")
    if run.shard is not None and run.output is None:
        raise UserError(
            f"{where}: `shard` divides the work among processes, which share the folder of `output`; set it."
        )


def _check_supported(run: TrainingRun, where: str) -> None:
    """Fields of TRL's that would break checkpoints, or that our trainers do without."""
    table = UNSUPPORTED | (UNSUPPORTED_IN_GRPO if isinstance(run, GRPORun) else {})
    for name, (allowed, why) in table.items():
        if name in run.trl and run.trl[name] not in allowed:
            raise UserError(f"{where}: `{name}` is not supported: it {why}. Leave it out.")
    if run.resume and run.trl.get("save_only_model"):
        raise UserError(
            f"{where}: `save_only_model` leaves checkpoints without the optimizer, which `resume` needs; leave one of "
            "them out."
        )


def _check_hub(run: TrainingRun, where: str) -> None:
    for name in ("hub_model_id", "hub_revision"):
        if run.trl.get(name) is not None and not run.trl.get("push_to_hub"):
            raise UserError(f"{where}: `{name}` is about `push_to_hub`, which is off; set that, or leave it out.")


def _check_training_evaluation(run: TrainingRun, where: str) -> None:
    evaluates, best = trl_value(run, "eval_strategy") != "no", trl_value(run, "metric_for_best_model")
    benchmarks = run.data.eval if isinstance(run, GRPORun | SFTRun) else []
    holdout = run.holdout if isinstance(run, SFTRun | RewardModelRun) else []
    what = MEASURED_ON[type(run)]
    alone = isinstance(run, RewardModelRun) and not evaluates  # `holdout` is measured at the end
    if evaluates != bool(benchmarks or holdout) and not alone:
        raise UserError(f"{where}: `eval_strategy` says when to measure the model, {what} on what; set both or none.")
    for name in ("eval_steps", "eval_on_start"):
        if run.trl.get(name) and not evaluates:
            raise UserError(
                f"{where}: `{name}` is of an evaluation during training; set `eval_strategy` and {what}, too."
            )
    if holdout and evaluates and trl_value(run, "dataloader_drop_last"):
        raise UserError(f"{where}: `dataloader_drop_last` would leave rows of `holdout` out; leave one of them out.")
    scores = [f"{benchmark.name}/{score}" for benchmark in benchmarks for score in EVALUATED]
    if holdout and evaluates:
        scores += ["loss"] if isinstance(run, SFTRun) else ["loss", "accuracy"]
    known = f"there are {', '.join(scores)}" if scores else f"without `eval_strategy` and {what} there is none"
    if best is None and trl_value(run, "load_best_model_at_end"):
        raise UserError(f"{where}: `load_best_model_at_end` needs `metric_for_best_model`; {known}.")
    if best is not None and best.removeprefix("eval_") not in scores:
        raise UserError(f"{where}: `metric_for_best_model`: no evaluation during training has `{best}`; {known}.")
    if evaluates and isinstance(run, GRPORun) and run.rollout.max_staleness:
        raise UserError(
            f"{where}: `eval_strategy`: with `rollout.max_staleness` {run.rollout.max_staleness} the servers never "
            "stop to be given the weights that would be measured.\nSet one of them to its default."
        )


def _check_packing(run: SFTRun, where: str) -> None:
    packing, longest = run.trl.get("packing", True), trl_value(run, "max_length")
    if packing and longest is None:
        raise UserError(
            f"{where}: `max_length` is the length of the blocks of `packing`; set it, or `packing: false`."
        )
    if trl_value(run, "padding_free") and not packing and longest is not None:
        raise UserError(
            f"{where}: `padding_free` without `packing` needs `max_length: null`; leave it out, or set that."
        )


def _check_servers(run: GRPORun | SampleRun | EvaluateRun, where: str) -> None:
    if run.rollout.engine != "vllm" and run.rollout.servers != "managed":
        raise UserError(
            f"{where}: `rollout.servers` names {run.rollout.servers}, but with `rollout.engine: transformers` no "
            "server is asked.\nSet `rollout.engine: vllm`, or leave `rollout.servers` out."
        )


def _check_not_trained(run: Any, where: str) -> None:
    parts = run.generators if isinstance(run, SampleRun) else [run]
    if any(part.model.lora is not None for part in parts if hasattr(part, "model")):
        raise UserError(
            f"{where}: `model.lora` is for training, and nothing is trained here; leave it out.\n"
            "To use adapters, name their folder as `model.path`."
        )


def _check_objective(run: GRPORun, where: str) -> None:
    loss_type = trl_value(run, "loss_type")
    if loss_type not in LOSS_TYPES:
        raise UserError(
            f"{where}: `loss_type` {loss_type} is not supported; there are {', '.join(LOSS_TYPES)}.\n"
            "GSPO is `loss_type: grpo` with `importance_sampling_level: sequence`."
        )
    if trl_value(run, "sync_ref_model"):
        if trl_value(run, "beta") == 0:
            raise UserError(f"{where}: `sync_ref_model` resets the reference model, which `beta: 0` does without.")
        if run.model.lora is not None:
            raise UserError(
                f"{where}: `sync_ref_model` and `model.lora`: with adapters the reference is the base model, which "
                "is never reset. Leave one of them out."
            )


def _check_staleness(run: GRPORun, where: str) -> None:
    rollout = run.rollout
    if rollout.max_staleness and rollout.engine != "vllm":
        raise UserError(
            f"{where}: `rollout.max_staleness` is {rollout.max_staleness}, but with `rollout.engine: transformers` "
            "the trainer generates itself, and not while it trains.\nSet `rollout.engine: vllm`, or this to 0."
        )
    if rollout.max_staleness and rollout.sleep:
        raise UserError(
            f"{where}: with `rollout.max_staleness` {rollout.max_staleness} the servers generate while the trainer "
            "trains, with `rollout.sleep` they release their memory then.\nSet one of them to its default."
        )


def _check_pass_rate(run: GRPORun, where: str) -> None:
    if run.train.pass_rate is None:
        return
    _check_shares(run.train.pass_rate, f"{where}: `train.pass_rate`")
    if not run.rewards.keys() & {"accuracy", "task"}:
        raise UserError(
            f"{where}: `train.pass_rate` is a share of right answers, but `rewards` has no `accuracy` and no `task`."
        )
    if run.rollout.max_staleness:
        raise UserError(
            f"{where}: with `rollout.max_staleness` {run.rollout.max_staleness} an epoch begins before the one before "
            "has been scored, which `train.pass_rate` needs.\nSet one of them to its default."
        )


def _check_generation(run: GRPORun, where: str, processes: int | None) -> None:
    """A generation is whole micro-steps, and an optimizer step takes whole generations, or a whole share of one."""
    given = trl_value(run, "generation_batch_size")
    if given is not None and trl_value(run, "steps_per_generation") is not None:
        raise UserError(f"{where}: `generation_batch_size` and `steps_per_generation` say the same thing; keep one.")
    if given is not None and processes is not None:
        rows = trl_value(run, "per_device_train_batch_size") * processes
        if given % rows:
            raise UserError(
                f"{where}: `generation_batch_size` {given} is no multiple of the {rows} rollouts of a micro-step "
                f"(`per_device_train_batch_size` {rows // processes} x {processes} processes).\n"
                f"It may be {' or '.join(str(n) for n in (given - given % rows, given - given % rows + rows) if n)}."
            )
    steps = micro_steps_per_generation(run, processes)
    if steps is None:  # not known yet
        return
    accumulation = trl_value(run, "gradient_accumulation_steps")
    iterations = trl_value(run, "num_iterations")
    if steps % accumulation and accumulation % steps:
        fitting = [n for n in range(1, steps + accumulation) if n % accumulation == 0 or accumulation % n == 0]
        below, above = max(n for n in fitting if n < steps), min(n for n in fitting if n > steps)
        source = "" if given is None else f" (`generation_batch_size` {given})"
        raise UserError(
            f"{where}: `steps_per_generation` {steps}{source} and `gradient_accumulation_steps` {accumulation}: one "
            "must be a multiple of the other.\nOtherwise optimizer steps would have unequal numbers of rollouts. "
            f"`steps_per_generation` may be {below} or {above}."
        )
    if steps < accumulation and iterations > 1:
        raise UserError(
            f"{where}: `num_iterations` {iterations} trains on each generation several times, which needs whole "
            f"optimizer steps of it.\nSet `steps_per_generation` ({steps}) to a multiple of "
            f"`gradient_accumulation_steps` ({accumulation})."
        )


def _check_groups(run: GRPORun, processes: int) -> None:
    """A generation holds whole groups, and with dynamic sampling each process does."""
    group = trl_value(run, "num_generations")
    per_device = trl_value(run, "per_device_train_batch_size")
    steps = micro_steps_per_generation(run, processes)
    batch = per_device * steps * processes
    if batch % group:
        divisors = [n for n in range(2, batch + 1) if batch % n == 0]
        raise UserError(
            f"num_generations {group} does not divide the {batch} rollouts of a generation "
            f"(per_device_train_batch_size {per_device} x {steps} micro-steps x {processes} processes).\n"
            f"With this batch num_generations may be {', '.join(map(str, divisors))}; "
            f"or make the batch a multiple of {group}."
        )
    if run.train.dynamic_sampling:
        check_whole_groups(run, processes, "train.dynamic_sampling replaces whole groups on each process")


def check_whole_groups(run: GRPORun, processes: int, why: str) -> None:
    """Raises `UserError`, which begins with `why`, if a group may lie on several processes."""
    group = trl_value(run, "num_generations")
    per_device = trl_value(run, "per_device_train_batch_size")
    steps = micro_steps_per_generation(run, processes)
    if per_device * steps % group:
        raise UserError(
            f"{why}, but num_generations {group} does not divide its {per_device * steps} rollouts.\n"
            f"Make per_device_train_batch_size ({per_device}) times steps_per_generation ({steps}) a multiple of "
            f"{group}."
        )
