"""From samples to scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..rewards.format import has_format
from ..rewards.language import language_share
from ..rewards.pool import Pool
from ..rewards.thinking import thinking_of
from .consensus import consensus
from .estimators import clustered_interval, pass_at_k

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """The result of greedy or sampled completions. Intervals are of 95 %, over problems.

    `accuracy` is pass@1, the mean over problems and samples, `pass_at_k` the unbiased estimates for the powers of two
    up to `samples`, by `k`; `cons_at_n` is the share of problems where the majority of all samples is right. Those two
    are None with one sample, and `cons_at_n` for programs, whose answers cannot be compared. `unscorable` problems are
    in none of them. `format` and `finished` are shares of completions (those that are not finished were cut off),
    `mean_tokens` the mean length. `language` is the mean share of words in the target language in the thinking, of
    completions that think a word (None if there is none).
    """

    problems: int
    samples: int
    unscorable: int
    accuracy: float
    ci95: Interval
    pass_at_k: dict[str, float] | None
    pass_at_k_ci95: dict[str, Interval] | None
    cons_at_n: float | None
    cons_at_n_ci95: Interval | None
    format: float
    finished: float
    language: float | None
    language_ci95: Interval | None
    mean_tokens: float


def measures(text: str, target: str) -> dict[str, float | None]:
    """The scores of a completion that need no gold answer; `target`: the language to think in."""
    return {"format": float(has_format(text)), "language": language_share(thinking_of(text), target)}


def scores_of(lines: Sequence[dict], pool: Pool) -> Scores:
    """The scores of a journal's lines, whose samples have `measures`. `pool` compares answers."""
    samples = [sample for line in lines for sample in line["samples"]]
    number = len(lines[0]["samples"])
    # The gold answer decides whether a row can be scored, so all samples of a problem can or none.
    scorable = [line for line in lines if line["samples"][0]["accuracy"] is not None]
    right = [round(sum(sample["accuracy"] for sample in line["samples"])) for line in scorable]
    spoken = [[s["language"] for s in line["samples"] if s["language"] is not None] for line in lines]
    in_target = [fmean(shares) for shares in spoken if shares]
    rates = [count / number for count in right]
    by_k = {f"{k}": [pass_at_k(number, count, k) for count in right] for k in _powers(number)} if number > 1 else None
    agreed = None
    if number > 1 and all(line["answer"] is not None for line in scorable):
        agreed = consensus([line["samples"] for line in scorable], pool)
    return Scores(
        problems=len(lines),
        samples=number,
        unscorable=len(lines) - len(scorable),
        accuracy=fmean(rates),
        ci95=clustered_interval(rates),
        pass_at_k=by_k and {k: fmean(values) for k, values in by_k.items()},
        pass_at_k_ci95=by_k and {k: clustered_interval(values) for k, values in by_k.items()},
        cons_at_n=agreed and fmean(agreed),
        cons_at_n_ci95=agreed and clustered_interval(agreed),
        format=fmean(sample["format"] for sample in samples),
        finished=fmean(sample["finished"] for sample in samples),
        language=fmean(in_target) if in_target else None,
        language_ci95=clustered_interval(in_target) if in_target else None,
        mean_tokens=fmean(sample["tokens"] for sample in samples),
    )


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**exponent for exponent in range(most.bit_length())]
