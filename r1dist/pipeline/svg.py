"""Small charts as SVG text: they need no network, and print."""

from collections.abc import Sequence
from html import escape

INK, FAINT, LINE = "var(--ink)", "var(--faint)", "var(--line)"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 200, 44, 24, 24
NAMES, ROW = 176, 20  # in `dots`: the names' column, and a row's height


def curve(values: Sequence[tuple[float, float]], label: str) -> str:
    """A line through (x, y) points, y from its least to its largest value (or from 0)."""
    xs, ys = [x for x, _ in values], [y for _, y in values]
    low, high = min(0.0, *ys), max(ys)
    high = high if high > low else low + 1
    first, last = min(xs), max(xs)
    span = (last - first) or 1

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - 8) * (x - first) / span
        return f"{across:.1f},{_height(y, low, high):.1f}"

    points = " ".join(place(x, y) for x, y in values)
    axis = _axis([low, (low + high) / 2, high], low, high, lambda y: f"{y:.3g}")
    ends = _text(LEFT, HEIGHT - 6, f"step {first:g}", "start") + _text(WIDTH - 8, HEIGHT - 6, f"{last:g}", "end")
    line = f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="2"/>'
    return _figure(axis + line + ends, label)


def dots(rows: Sequence[tuple[str, float, tuple[float, float] | None]], label: str) -> str:
    """Shares by name, one below the other, each with its interval if there is one, on a scale from 0 to 100 %."""
    high = TOP + ROW * len(rows)

    def across(share: float) -> float:
        return NAMES + (WIDTH - NAMES - 44) * share

    marks = ""
    for tick in (0, 0.5, 1):
        x = across(tick)
        marks += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{high}" stroke="{FAINT}" stroke-width="0.5"/>'
        marks += _text(x, TOP - 8, f"{100 * tick:.0f} %", "middle")
    for number, (name, share, interval) in enumerate(rows):
        y = TOP + ROW * (number + 0.5)
        end = share
        if interval is not None:
            end = interval[1]
            ends = f'x1="{across(interval[0]):.1f}" x2="{across(end):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            marks += f'<line {ends} stroke="{LINE}" stroke-width="2"/>'
        marks += f'<circle cx="{across(share):.1f}" cy="{y:.1f}" r="4.5" fill="{LINE}"/>'
        marks += _text(max(across(share) + 9, across(end) + 5), y + 4, f"{100 * share:.0f}", "start")
        marks += _text(NAMES - 12, y + 4, name, "end")
    return _figure(marks, label, int(high) + 8)


def graph(nodes: Sequence[tuple[str, str]], edges: Sequence[tuple[str, str]]) -> str:
    """Boxes (name, a line of text) in columns, each to the right of all that it comes from."""
    column: dict[str, int] = {}
    for name, _ in nodes:
        column[name] = max((column[a] + 1 for a, b in edges if b == name), default=0)
    row: dict[str, int] = {}
    for name, _ in nodes:
        row[name] = sum(1 for other in row if column[other] == column[name])
    wide, high, gap = 206, 46, 34
    width = (max(column.values()) + 1) * (wide + gap)
    height = (max(row.values()) + 1) * (high + gap)
    where = {
        name: (column[name] * (wide + gap) + 2, row[name] * (high + gap) + 4 + 14 * (column[name] % 2))
        for name, _ in nodes
    }
    drawn = ""
    for start, end in edges:
        (x1, y1), (x2, y2) = where[start], where[end]
        x1, y1, y2 = x1 + wide, y1 + high / 2, y2 + high / 2
        way = f"M{x1},{y1} C{x1 + gap},{y1} {x2 - gap},{y2} {x2},{y2}"
        drawn += f'<path d="{way}" fill="none" stroke="{FAINT}" stroke-width="1.5"/>'
    for name, caption in nodes:
        x, y = where[name]
        drawn += f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="6" fill="var(--card)" stroke="{FAINT}"/>'
        drawn += f'<text x="{x + 10}" y="{y + 19}" class="name">{escape(name)}</text>'
        drawn += f'<text x="{x + 10}" y="{y + 36}" class="caption">{escape(caption)}</text>'
    return f'<svg viewBox="0 0 {width} {height + 16}" width="{width}" role="img" aria-label="The stages">{drawn}</svg>'


def _height(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))


def _axis(ticks: Sequence[float], low: float, high: float, say) -> str:
    lines = ""
    for tick in ticks:
        y = _height(tick, low, high)
        lines += f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}" stroke-width="0.5"/>'
        lines += _text(LEFT - 6, y + 4, say(tick), "end")
    return lines


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(inside: str, label: str, height: int = HEIGHT) -> str:
    picture = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>'
    return f"<figure>{picture}<figcaption>{escape(label)}</figcaption></figure>"
