"""Which prompts are worth asking again: those that the policy solved now and then, and neither always nor never."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Verdict:
    """Places in the dataset of prompts whose pass rate is known."""

    fit: tuple[int, ...] = ()
    unfit: frozenset[int] = frozenset()


def pass_rates(rows: Iterable[dict], before: int) -> dict[int, float]:
    """Each prompt's mean accuracy at the last step under `before` that asked it; traces' `rows` in any order.

    Rollouts without a score, and prompts that have none other, are left out.
    """
    scores: dict[int, tuple[int, list[float]]] = {}
    for row in rows:
        step, score = row["step"], row["rewards"].get("accuracy")
        if step >= before or score is None:
            continue
        last, known = scores.get(row["prompt_id"], (-1, []))
        if step > last:
            scores[row["prompt_id"]] = (step, [score])
        elif step == last:
            known.append(score)
    return {prompt: fmean(known) for prompt, (_, known) in scores.items()}


def judge(rates: dict[int, float], prompt_ids: Sequence[int], least: float, most: float) -> Verdict:
    """Which places of `prompt_ids` have a rate within [least, most], and which have one outside."""
    known = [place for place, prompt in enumerate(prompt_ids) if prompt in rates]
    fit = tuple(place for place in known if least <= rates[prompt_ids[place]] <= most)
    return Verdict(fit, frozenset(known).difference(fit))
