"""Rows in groups of similar length, which spares padding."""


def groups_needed(lengths: list[int], budget: int | None, packed: bool) -> int:
    """How many groups keep within `budget` tokens each, a longer row alone in one."""
    return 1 if budget is None else len(_filled(lengths, budget, packed))


def partition(lengths: list[int], bins: int, packed: bool, budget: int | None = None) -> list[list[int]]:
    """The rows in `bins` groups of similar length, the longest first; the costliest is as cheap as it can be.

    Args:
        lengths: Tokens of each row.
        packed: A group costs the sum of its lengths; otherwise as many columns for each row as the longest has.
        budget: Longer rows are alone. There are enough `bins` for the others to stay within it.

    Raises `ValueError` if there are fewer rows than `bins`.
    """
    if len(lengths) < bins:
        raise ValueError(f"{len(lengths)} rows do not fill {bins} micro-batches")
    if budget is not None and max(lengths) > budget:
        alone = sorted((i for i, length in enumerate(lengths) if length > budget), key=lambda i: (-lengths[i], i))
        others = [i for i, length in enumerate(lengths) if length <= budget]
        groups = partition([lengths[i] for i in others], bins - len(alone), packed) if others else []
        return [*([i] for i in alone), *([others[i] for i in group] for group in groups)]
    low, high = max(lengths), max(lengths) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, middle, packed)) <= bins else (middle + 1, high)
    groups = _filled(lengths, low, packed)
    while len(groups) < bins:
        widest = max(range(len(groups)), key=lambda i: (len(groups[i]) > 1, _cost(groups[i], lengths, packed)))
        half = (len(groups[widest]) + 1) // 2
        groups[widest : widest + 1] = [groups[widest][:half], groups[widest][half:]]
    return groups


def _filled(lengths: list[int], bound: int, packed: bool) -> list[list[int]]:
    """Rows from the longest to the shortest in as few groups as cost at most `bound` each."""
    groups: list[list[int]] = []
    cost = bound + 1
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost += lengths[row] if packed or not groups else lengths[groups[-1][0]]
        if cost > bound:
            groups.append([])
            cost = lengths[row]
        groups[-1].append(row)
    return groups


def _cost(group: list[int], lengths: list[int], packed: bool) -> int:
    return sum(lengths[i] for i in group) if packed else len(group) * lengths[group[0]]
