"""`report.html`: what a recipe did, stage by stage, on one page that needs no network."""

from html import escape
from pathlib import Path

from ..files import METRICS, greedy_answers, read_lines
from . import svg
from .table import percent

CURVES = {"reward": "mean reward", "completions/mean_length": "mean length, tokens"}
PROMPTS_OF_EACH_KIND = 3

STYLE = """
:root { --ink: #1c2430; --faint: #aab4c0; --line: #2b6cb0; --card: #f6f8fa; --back: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dde3ea; --faint: #55606d; --line: #7ab3ef; --card: #1d242c; --back: #12171d }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  max-width: 1100px; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .9rem } th, td { padding: .35rem .7rem; text-align: right;
  border-bottom: 1px solid var(--faint); white-space: nowrap }
td.words { white-space: normal } th:first-child, td:first-child { text-align: left }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 1rem }
figure { margin: 0; background: var(--card); padding: .7rem; border-radius: 8px; min-width: 0 }
figure svg { width: 100%; height: auto } figcaption { font-size: .85rem }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) } svg .name { font-weight: 600; font-size: 13px }
svg .caption { font-size: 11.5px }
details { margin: .6rem 0; border: 1px solid var(--faint); border-radius: 8px; padding: .5rem .8rem }
summary { cursor: pointer }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: .8rem }
.samples h4 { margin: .6rem 0 .2rem } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font: 13px/1.45 ui-monospace, monospace } .thought { opacity: .6 }
"""


def write_page(folder: Path, summary: dict, edges: list[tuple[str, str]]) -> Path:
    """Write `report.html` into the pipeline's `folder` and return its path.

    Args:
        summary: What `summary.json` holds.
        edges: (from, to) by the stages' names.
    """
    stages = summary["stages"]
    there = {stage["name"] for stage in stages}
    nodes = _in_order([(stage["name"], _in_a_line(stage)) for stage in stages], edges)
    parts = [
        "<h2>What was done</h2><div class='scroll'>",
        svg.graph(nodes, [edge for edge in edges if set(edge) <= there]),
        "</div>",
        _goals(summary["goals"]),
        "<h2>What came of it</h2>",
        _tables(stages),
        _comparisons(stages),
        _curves(folder, stages),
        _data(stages),
        _samples(folder, stages),
    ]
    title = f"{folder.name}, seed {summary['seed']}"
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _in_order(nodes: list[tuple[str, str]], edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each node after all that lead to it."""
    ordered: list[tuple[str, str]] = []
    waiting = list(nodes)
    while waiting:
        left = {name for name, _ in waiting}
        free = next(node for node in waiting if not any(a in left and b == node[0] for a, b in edges))
        ordered.append(free)
        waiting.remove(free)
    return ordered


def _in_a_line(stage: dict) -> str:
    if "eval" in stage:
        return f"{percent(stage['eval']['accuracy'])} right, language {percent(stage['eval']['language'])}"
    if "data" in stage:
        return f"{stage['data']['rows']} rows"
    return f"{percent(stage['scores']['accuracy'])} right, held out" if "scores" in stage else stage["kind"]


def _goals(goals: list[dict]) -> str:
    rows = ""
    for goal in goals:
        note = f"<br><small>{escape(goal['note'])}</small>" if "note" in goal else ""
        state = "met" if goal["met"] else "<b>missed</b>"
        rows += f"<tr><td class='words'>{escape(goal['text'])}{note}</td><td>{state}</td></tr>"
    return f"<h2>What each stage is there for</h2><table>{rows}</table>" if rows else ""


def _tables(stages: list[dict]) -> str:
    head = ("stage", "accuracy", "95 %", "format", "language", "tokens", "sampled", "seconds")
    rows = []
    for stage in (s for s in stages if "eval" in s):
        greedy = stage["eval"]
        interval = " to ".join(percent(bound) for bound in greedy["ci95"])
        shares = (percent(greedy["accuracy"]), interval, percent(greedy["format"]), percent(greedy["language"]))
        rest = (f"{greedy['mean_tokens']:.1f}", percent(stage["sampled"]["accuracy"]), f"{stage['seconds']:.0f}")
        rows.append((stage["name"], *shares, *rest))
    shown = _table(head, rows)
    asked = [stage for stage in stages if stage.get("requests")]
    if asked:
        head = ("stage", "harmless answered", "unsafe declined", "as the reference", "helpfulness", "safety")
        rows = []
        for stage in asked:
            scores = stage["requests"]
            shares = (percent(scores[name]) for name in ("answered", "declined", "as_reference"))
            rows.append((stage["name"], *shares, _number(scores["helpfulness"]), _number(scores["safety"])))
        shown += "<h2>Requests</h2>" + _table(head, rows)
    return shown


def _comparisons(stages: list[dict]) -> str:
    rated = [stage for stage in stages if "eval" in stage]
    accuracy = [(s["name"], s["eval"]["accuracy"], s["eval"]["ci95"]) for s in rated]
    spoke = [stage["sampled"] | {"name": stage["name"]} for stage in rated if stage["sampled"]["language"] is not None]
    language = [(scores["name"], scores["language"], scores["language_ci95"]) for scores in spoke]
    charts = svg.dots(accuracy, "Greedy accuracy on unseen problems, with 95 % intervals") if accuracy else ""
    sampled = [(s["name"], s["sampled"]["accuracy"], s["sampled"]["ci95"]) for s in rated]
    charts += svg.dots(sampled, "Sampled accuracy on the same problems, with 95 % intervals") if sampled else ""
    charts += svg.dots(language, "Share of words in the target language, in the thinking, sampled") if language else ""
    return f"<h2>Stage against stage</h2><div class='charts'>{charts}</div>"


def _curves(folder: Path, stages: list[dict]) -> str:
    charts = ""
    for stage in stages:
        path = folder / stage["name"] / METRICS
        lines = list(read_lines(path)) if path.exists() else []
        for key, label in CURVES.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            charts += svg.curve(points, f"{stage['name']}: {label}") if len(points) > 1 else ""
    return f"<h2>While it learnt</h2><div class='charts'>{charts}</div>" if charts else ""


def _data(stages: list[dict]) -> str:
    shown = ""
    for stage in (s for s in stages if "data" in s):
        rows = []
        for name, tally in stage["data"]["generators"].items():
            dropped = ", ".join(
                f"{count} {why}" for why, count in sorted(tally["dropped"].items(), key=lambda i: -i[1])
            )
            drawn = f"{tally['prompts']} prompts" if "pass_rates" in tally else str(tally["samples"])
            rows.append((name, drawn, str(tally["kept"]), dropped or "none"))
        rows += [(source, "", str(count), "taken as it is") for source, count in stage["data"]["mixed"].items()]
        shown += f"<h3>{escape(stage['name'])}</h3>" + _table(("generator", "samples", "kept", "dropped"), rows)
    return f"<h2>Data that was made</h2>{shown}" if shown else ""


def _samples(folder: Path, stages: list[dict]) -> str:
    by_prompt: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for stage in stages:
        for row in greedy_answers(folder / "evaluations" / f"{stage['name']}.json"):
            by_prompt.setdefault((row["kind"], row["problem"]), []).append((stage["name"], row["text"]))
    taken: dict[str, int] = {}
    shown = ""
    for (kind, problem), texts in by_prompt.items():
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] > PROMPTS_OF_EACH_KIND:
            continue
        columns = "".join(f"<div><h4>{escape(name)}</h4><pre>{_marked(text)}</pre></div>" for name, text in texts)
        state = "open" if not shown else ""
        shown += f"<details {state}><summary>{escape(problem)}</summary><div class='samples'>{columns}</div></details>"
    return f"<h2>The same prompt, stage by stage</h2>{shown}" if shown else ""


def _marked(text: str) -> str:
    thought, closed, rest = text.partition("</think>")
    if not closed:
        return escape(text)
    return f"<span class='thought'>{escape(thought + closed)}</span>{escape(rest)}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f"<div class='scroll'><table><tr>{titles}</tr>{lines}</table></div>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
