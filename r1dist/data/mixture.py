"""Several sources as one dataset."""

import logging
from collections import Counter

from datasets import Dataset, concatenate_datasets, interleave_datasets

from ..config import Source
from ..errors import UserError

logger = logging.getLogger(__name__)


def combined(sources: list[Source], parts: list[Dataset], seed: int, stopping_strategy: str | None) -> Dataset:
    """`parts`, the rows of `sources`, as one dataset: one after another or, with weights, mixed.

    In a mixture, a place is given to a source with the probability weight / sum of the weights, drawn by `seed`, and
    to that source's next row. It depends on the arguments alone: all ranks, and a run that is resumed, have the same.

    Args:
        stopping_strategy: That of `datasets.interleave_datasets`; None is `first_exhausted`.

    Raises `UserError` for a source with a weight of which decontamination left no row.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return concatenate_datasets(parts)
    for source, part in zip(sources, parts, strict=True):
        if not len(part):
            raise UserError(
                f"data.decontaminate: no row of {source.path} is left, which has a `weight` in the mixture.\n"
                "Leave the source out, or raise `ngram`."
            )
    shares = [weight / sum(weights) for weight in weights]
    rows = interleave_datasets(parts, shares, seed=seed, stopping_strategy=stopping_strategy or "first_exhausted")
    there: Counter[str] = Counter()
    for source, part in zip(sources, parts, strict=True):
        there[source.path] += len(part)
    taken = ", ".join(f"{count} from the {there[path]} of {path}" for path, count in Counter(rows["source"]).items())
    logger.info("mixed %d rows by weight: %s", len(rows), taken)
    return rows
