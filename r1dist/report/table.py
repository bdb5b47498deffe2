"""Stages side by side in the terminal."""


def stage_table(stages: list[dict]) -> str:
    """A row for each entry of `summary.json`'s `stages`, greedy scores first."""
    header = ("stage", "accuracy", "95 % interval", "format", "English", "tokens", "sampled", "seconds")
    rows = [header]
    for stage in stages:
        scores, sampled = stage["eval"], stage["sampled"]
        low, high = scores["ci95"]
        rows.append(
            (
                stage["name"],
                _percent(scores["accuracy"]),
                f"{_percent(low)} to {_percent(high)}",
                _percent(scores["format"]),
                _percent(scores["language"]),
                f"{scores['mean_tokens']:.1f}",
                _percent(sampled["accuracy"]),
                f"{stage['seconds']:.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:]])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
