"""Pass-rate filter: prompts that the policy always or never solves give way to those that it sometimes solves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class PassRateFilter:
    """Indices into the dataset of prompts whose pass rate is known."""

    keep: tuple[int, ...] = ()
    drop: frozenset[int] = frozenset()


def pass_rates(rows: Iterable[dict], before: int) -> dict[int, float]:
    """prompt_id -> share of right answers at the last step below `before` that asked it, from traces' rows.

    The rows may have any order. Right is an `accuracy` of 1 or, in a run without that reward, full marks of `task`.
    Rollouts without either are left out, and prompts that have no other.
    """
    scores: dict[int, tuple[int, list[float]]] = {}
    for row in rows:
        step, score = row["step"], _right(row["rewards"])
        if step >= before or score is None:
            continue
        last, known = scores.get(row["prompt_id"], (-1, []))
        if step > last:
            scores[row["prompt_id"]] = (step, [score])
        elif step == last:
            known.append(score)
    return {prompt: fmean(known) for prompt, (_, known) in scores.items()}


def _right(rewards: dict[str, float | None]) -> float | None:
    if "accuracy" in rewards or rewards.get("task") is None:
        return rewards.get("accuracy")
    return float(rewards["task"] >= 1)


def filter_by_pass_rate(
    rates: dict[int, float], prompt_ids: Sequence[int], least: float, most: float
) -> PassRateFilter:
    """Keeps prompts of known rate within [least, most], drops those outside; `prompt_ids` is the dataset's column."""
    known = [place for place, prompt in enumerate(prompt_ids) if prompt in rates]
    keep = tuple(place for place in known if least <= rates[prompt_ids[place]] <= most)
    return PassRateFilter(keep, frozenset(known).difference(keep))
