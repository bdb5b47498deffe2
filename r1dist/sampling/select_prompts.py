"""From the journals to a dataset of prompts for RL: those whose share of right samples lies within `pass_rate`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from datasets import Dataset

from ..config import Generator, SampleRun
from ..data.formats import as_turns
from ..errors import UserError
from .select import Tally, by_prompt, row_quota

COPIED = ["answer", "tests", "language", "entry", "source", "kind"]


@dataclass
class PromptTally(Tally):
    """The same counts, `kept` and `dropped` of prompts. `unscorable`: no sample of the prompt could be verified."""

    pass_rates: dict[str, int] = field(default_factory=dict)
    """Share of right samples, to four decimals -> prompts, from hard to easy."""


def select_prompts(
    run: SampleRun, generator: Generator, journals: list[Path], prompts: Dataset, seen: set[str], tally: PromptTally
) -> Iterator[dict]:
    """The rows that `generator` gives, up to its share of `run.rows` and to what is left of them; counts into `tally`.

    A journal has the verdicts, `prompts`, which `generator` was asked, all else. So a journal of an earlier version
    will do. `seen` holds the prompts of the rows so far, of all generators.

    Raises `UserError` where a journal is of other prompts.
    """
    least, most = run.pass_rate
    quota = row_quota(run, generator)
    places = {prompt_id: place for place, prompt_id in enumerate(prompts["prompt_id"])}
    prompts = prompts.select_columns(["problem", "earlier", "system", *COPIED])
    rates: Counter[float] = Counter()
    for line in by_prompt(run, generator, journals):
        place = places.get(line["prompt_id"])
        row = None if place is None else prompts[place]
        if row is None or row["problem"] != line["problem"]:
            raise UserError(
                f"generators: `{generator.name}` was asked other prompts when {journals[0]} was written: "
                "its sources have changed.\nChoose another output_dir."
            )
        scores = [sample["accuracy"] for sample in line["samples"] if sample["accuracy"] is not None]
        rate = fmean(scores) if scores else None
        key = str([row["system"], row["earlier"], row["problem"]])
        reason = None
        if rate is None:
            reason = "unscorable"
        elif rate > most:
            reason = "too easy"
        elif rate < least:
            reason = "too hard"
        elif key in seen:
            reason = "seen before"
        elif tally.kept == quota:
            reason = "enough of this generator"
        elif len(seen) == run.rows:
            reason = "enough rows"
        tally.prompts += 1
        tally.samples += len(line["samples"])
        tally.tokens += sum(sample["tokens"] for sample in line["samples"])
        if rate is not None:
            rates[round(rate, 4)] += 1
        if reason is not None:
            tally.dropped[reason] = tally.dropped.get(reason, 0) + 1
            continue
        seen.add(key)
        tally.kept += 1
        yield _row(generator, line, row, rate)
    tally.pass_rates = {str(rate): rates[rate] for rate in sorted(rates)}


def _row(generator: Generator, line: dict, row: dict, rate: float) -> dict:
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    earlier = [turn for exchange in row["earlier"] for turn in as_turns(exchange)]
    return {
        "problem": [*system, *earlier, {"role": "user", "content": row["problem"]}],
        **{name: row[name] for name in COPIED},
        "pass_rate": rate,
        "provenance": {
            "generator": generator.name,
            "model": generator.model.path,
            "prompt_id": line["prompt_id"],
            "samples": len(line["samples"]),
            "temperature": generator.sampling.temperature,
            "top_p": generator.sampling.top_p,
            "max_tokens": generator.sampling.max_tokens,
        },
    }
