"""Stages side by side in the terminal."""


def stage_table(stages: list[dict]) -> str:
    """A row for each entry of `summary.json`'s `stages`: greedy scores first, or the rows of its dataset."""
    header = ("stage", "accuracy", "95 % interval", "format", "English", "tokens", "sampled", "seconds")
    rows = [header]
    for stage in stages:
        if "eval" not in stage:
            held_out = percent(stage["scores"]["accuracy"]) if "scores" in stage else "-"
            left = f"{stage['data']['rows']} rows" if "data" in stage else held_out
            rows.append((stage["name"], left, *["-"] * 5, f"{stage['seconds']:.0f}"))
            continue
        scores, sampled = stage["eval"], stage["sampled"]
        low, high = scores["ci95"]
        rows.append(
            (
                stage["name"],
                percent(scores["accuracy"]),
                f"{percent(low)} to {percent(high)}",
                percent(scores["format"]),
                percent(scores["language"]),
                f"{scores['mean_tokens']:.1f}",
                percent(sampled["accuracy"]),
                f"{stage['seconds']:.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:]])


def goals_list(goals: list[dict]) -> str:
    """A line for each entry of `summary.json`'s `goals`."""
    return "\n".join(["", *(f"{'met   ' if goal['met'] else 'MISSED'}  {goal['text']}" for goal in goals)])


def percent(share: float | None) -> str:
    """A share in words; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f} %"
