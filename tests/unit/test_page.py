"""The page at the end of a run: whole, readable without a network, and safe against what models write."""

import html.parser
import json
import re

from r1dist.files import samples_folder
from r1dist.pipeline.page import write_page

SCORES = {"accuracy": 0.5, "ci95": [0.4, 0.6], "format": 1.0, "language": 0.25, "language_ci95": [0.2, 0.3]}
SCORES |= {"mean_tokens": 12.5}
REQUESTS = {"answered": 0.5, "declined": None, "as_reference": 0.1, "helpfulness": 1.25, "safety": None}


class Balanced(html.parser.HTMLParser):
    """Fails where an element closes that was not the last to open."""

    VOID = ("meta", "line", "circle", "rect", "path", "polyline", "br")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_has_every_stage_and_loads_nothing(tmp_path):
    rated = {"eval": SCORES, "sampled": SCORES, "seconds": 3}
    tally = {"samples": 9, "kept": 4, "dropped": {"language": 3, "cut off": 2}}
    kept_prompts = {"prompts": 7, "samples": 28, "kept": 2, "dropped": {"too easy": 5}, "pass_rates": {"0.5": 2}}
    data = {"rows": 4, "generators": {"few": tally, "sometimes": kept_prompts}, "mixed": {"talk": 2}}
    stages = [
        {"name": "base", "kind": "base", **rated},
        {"name": "last", "kind": "grpo", **rated, "requests": REQUESTS},
        {"name": "cold", "kind": "sample", "seconds": 1, "data": data},
        {"name": "judge", "kind": "reward_model", "seconds": 1, "scores": {"accuracy": 0.9}},
    ]
    (tmp_path / "last").mkdir()
    lines = [{"step": s, "reward": s / 2, "completions/mean_length": 9} for s in (1, 2, 3)]
    (tmp_path / "last" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluations").mkdir()
    for name in ("base", "last"):
        sample = {"text": f"<think>{name}</think><script>alert(1)</script>"}
        row = {"prompt_id": 0, "problem": "1 < 2?", "answer": None, "kind": "math", "samples": [sample]}
        samples = samples_folder(tmp_path / "evaluations" / f"{name}.json")
        samples.mkdir()
        (samples / "data-greedy.jsonl").write_text(json.dumps(row) + "\n")
    edges = [("base", "cold"), ("cold", "last"), ("judge", "last"), ("base", "absent")]
    goals = [{"stage": "last", "text": "last < base", "met": False, "note": "Too <small>."}]
    text = write_page(tmp_path, {"seed": 5, "stages": stages, "goals": goals}, edges).read_text()
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    for stage in stages:
        assert text.count(f">{stage['name']}<") >= 1
    assert "<td>7 prompts</td>" in text and "5 too easy" in text
    assert "3 language, 2 cut off" in text and "last: mean reward" in text and "90.0 % right, held out" in text
    assert "last &lt; base<br><small>Too &lt;small&gt;.</small>" in text and "<b>missed</b>" in text
    assert "<script" not in text and "&lt;script&gt;" in text and "1 &lt; 2?" in text
    assert not re.search(r"(?:src|href)=|https?://|@import|url\(", text)
