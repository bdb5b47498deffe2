"""Rows in groups that cost alike: of similar length, or with as many rows of one prompt as can be."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

KEY = 8
"""Keys and values whose memory is a token's in a decoder layer, or less."""


class Size(NamedTuple):
    """Of a forward, padding included."""

    tokens: int
    keys: int
    """Of attention, a prompt's once for each of its completions: at least `tokens`."""

    @property
    def cost(self) -> int:
        """Memory, in tokens of a forward that shares no prompt."""
        return self.tokens + (self.keys - self.tokens) // KEY


@dataclass(frozen=True)
class Rows:
    """Rows in the order in which they are divided: a group is a run of them."""

    order: list[int]
    lengths: list[int]
    """Tokens of each row, by its number."""
    sizes: Callable[[Iterable[int]], Iterator[Size]]
    """Of rows: the size of a group of the first, of the first two, ... It does not fall."""
    shared: bool = False
    """Rows of one prompt hold it once."""

    def groups_needed(self, budget: int | None) -> int:
        """How many groups cost at most `budget` each, a longer row alone in one."""
        return 1 if budget is None else len(self._filled(budget))

    def partition(self, bins: int, budget: int | None = None) -> list[list[int]]:
        """The rows in `bins` groups; the costliest is as cheap as it can be.

        Args:
            budget: Longer rows are alone. There are enough `bins` for the others to stay within it.

        Raises `ValueError` if there are fewer rows than `bins`.
        """
        if len(self.order) < bins:
            raise ValueError(f"{len(self.order)} rows do not fill {bins} micro-batches")
        alone = [[i] for i in self.order if budget is not None and self.lengths[i] > budget]
        if alone:
            others = [i for i in self.order if self.lengths[i] <= budget]
            return alone + (replace(self, order=others).partition(bins - len(alone)) if others else [])
        low, high = max(self.lengths[i] for i in self.order), self._size(self.order).cost
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._filled(middle)) <= bins else (middle + 1, high)
        groups = self._filled(low)
        while len(groups) < bins:
            widest = max(range(len(groups)), key=lambda i: (len(groups[i]) > 1, self._size(groups[i]).cost))
            half = (len(groups[widest]) + 1) // 2
            groups[widest : widest + 1] = [groups[widest][:half], groups[widest][half:]]
        return groups

    def _size(self, group: list[int]) -> Size:
        return list(self.sizes(group))[-1]

    def _filled(self, bound: int) -> list[list[int]]:
        """As few groups as cost at most `bound` each, a row that costs more alone in one."""
        groups, first = [], 0
        while first < len(self.order):
            within = itertools.takewhile(lambda size: size.cost <= bound, self.sizes(self.order[first:]))
            last = first + max(1, sum(1 for _ in within))
            groups.append(self.order[first:last])
            first = last
        return groups


def by_length(lengths: list[int], packed: bool) -> Rows:
    """The longest first. A group has as many columns for each row as the longest has tokens, `packed` no padding."""

    def padded(rows: Iterable[int]) -> Iterator[Size]:
        for count, width in enumerate(itertools.accumulate((lengths[i] for i in rows), max), 1):
            yield Size(count * width, count * width)

    def summed(rows: Iterable[int]) -> Iterator[Size]:
        for tokens in itertools.accumulate(lengths[i] for i in rows):
            yield Size(tokens, tokens)

    return Rows(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), lengths, summed if packed else padded)


def by_prompt(prompts: list[int], shared: list[int], own: list[int]) -> Rows:
    """Those of one prompt together, the prompt with the longest row first, and of its rows the longest.

    A group has a prompt's tokens once, and in attention once more for each completion.

    Args:
        prompts: The number of each row's prompt.
        shared: Tokens of each row that it shares with its prompt's others.
        own: Tokens that it does not share.
    """
    lengths = [sum(pair) for pair in zip(shared, own, strict=True)]
    longest: dict[int, int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), length)
    order = sorted(range(len(prompts)), key=lambda i: (-longest[prompts[i]], prompts[i], -lengths[i], i))

    def sizes(rows: Iterable[int]) -> Iterator[Size]:
        tokens = keys = 0
        for _, group in itertools.groupby(rows, lambda i: prompts[i]):
            for count, i in enumerate(group):
                prompt = 0 if count else shared[i]
                tokens += prompt + own[i]
                keys += prompt + lengths[i]
                yield Size(tokens, keys)

    return Rows(order, lengths, sizes, shared=True)
