"""From the journals to a dataset of samples: filters, bounds of rows, no text twice, further rows added."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Generator, SampleRun
from ..data.formats import as_turns
from ..data.sources import load_conversations
from .filters import Sample, fault, refine, scores


@dataclass
class Tally:
    """Counts of one generator's samples: kept, and dropped by which filter."""

    prompts: int = 0
    samples: int = 0
    tokens: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> samples."""


def select(run: SampleRun, generator: Generator, journals: list[Path], seen: set[str], tally: Tally) -> Iterator[dict]:
    """The rows that `generator` gives, up to its share of `run.rows` and to what is left of them; counts into `tally`.

    They come in the order of its prompts, with `run.rows` in one that the seed draws, so that they are no particular
    ones. `seen` holds the completions of the rows so far, of all generators, with white space and case taken out.
    """
    quota = row_quota(run, generator)
    for line in by_prompt(run, generator, journals):
        taken = 0
        tally.prompts += 1
        for index, raw in enumerate(line["samples"]):
            sample = Sample(raw["text"], raw["tokens"], raw["finished"], raw["accuracy"])
            text = sample.text if generator.refine is None else refine(sample.text, generator.refine)
            scored = scores(sample, text, run.filters)
            key = "".join(f"{line.get('earlier') or ''}{line['problem']}{text}".lower().split())
            reason = fault(sample, text, scored, run.filters)
            if reason is None and key in seen:
                reason = "seen before"
            if reason is None and taken == generator.per_prompt:
                reason = "enough of this prompt"
            if reason is None and tally.kept == quota:
                reason = "enough of this generator"
            if reason is None and len(seen) == run.rows:
                reason = "enough rows"
            tally.samples += 1
            tally.tokens += sample.tokens
            if reason is not None:
                tally.dropped[reason] = tally.dropped.get(reason, 0) + 1
                continue
            seen.add(key)
            taken += 1
            tally.kept += 1
            yield _row(run, generator, line, text, index, raw, scored)


def mixed(run: SampleRun) -> Iterator[dict]:
    """The rows of `run.mix`, as they are; with weights, mixed by them until the first source has no further row."""
    for row in load_conversations(run.mix, run.seed) if run.mix else []:
        reply = {"role": "assistant", "content": row["completion"]}
        common = {"answer": None, "source": row["source"], "kind": row["kind"], "provenance": None}
        yield {"messages": [*row["messages"], reply], **common}


def filters_text(tallies: dict[str, Tally], what: str) -> str:
    """How many of `what` ("sample" or "prompt") each filter removed, by generator, as a sentence."""
    parts = []
    for name, tally in tallies.items():
        by_count = sorted(tally.dropped.items(), key=lambda item: -item[1])
        taken = ", ".join(f"{count} {reason}" for reason, count in by_count)
        parts.append(f"{name}: {getattr(tally, what + 's')} {what}s, dropped {taken or 'none'}")
    return "; ".join(parts)


def row_quota(run: SampleRun, generator: Generator) -> int | None:
    """Most rows that `generator` may give; None: as many as there are."""
    return None if run.rows is None else round(run.rows * generator.share)


def by_prompt(run: SampleRun, generator: Generator, journals: list[Path]) -> Iterator[dict]:
    """The journals' lines by prompt, whichever was finished first; with `run.rows`, in an order that the seed draws.

    One at a time is in memory.
    """
    places = {}
    for journal in journals:
        with journal.open("rb") as file:
            place = 0
            for line in file:
                places[json.loads(line)["prompt_id"]] = (journal, place)
                place += len(line)
    prompts = sorted(places)
    if run.rows is not None:
        random.Random(f"{run.seed}:{generator.name}").shuffle(prompts)
    for prompt in prompts:
        journal, place = places[prompt]
        with journal.open("rb") as file:
            file.seek(place)
            yield json.loads(file.readline())


def _row(run: SampleRun, generator: Generator, line: dict, text: str, index: int, raw: dict, scored: dict) -> dict:
    exchanges = [*line.get("earlier", []), {"question": line["problem"], "reply": text}]
    return {
        "messages": [turn for exchange in exchanges for turn in as_turns(exchange)],
        "answer": line["answer"],
        "source": line["source"],
        "kind": line["kind"],
        "provenance": {
            "generator": generator.name,
            "model": generator.model.path,
            "prompt_id": line["prompt_id"],
            "sample_index": index,
            "seed": raw["seed"],
            "temperature": generator.sampling.temperature,
            "top_p": generator.sampling.top_p,
            "max_tokens": generator.sampling.max_tokens,
            "tokens": raw["tokens"],
            **scored,
        },
    }
