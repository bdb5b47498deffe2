"""docs/own_reward.md: its example runs as it stands, and a function that fails ends the run as the page says."""

import json
import re

from conftest import ROOT, launch, metrics

PAGE = (ROOT / "docs" / "own_reward.md").read_text(encoding="utf-8")
RAISES = "def raises(completion, row):\n    return row['no such column']\n"


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_pages_example_runs_and_a_function_that_fails_ends_the_run(tmp_path):
    functions, config = tmp_path / "own_rewards.py", tmp_path / "own_reward.yaml"
    functions.write_text(block("python") + RAISES)
    config.write_text(block("yaml").replace("own_rewards.py", str(functions)))
    words = ["--config", config, "--output_dir", tmp_path / "run"]
    refused = launch("grpo.py", *words, f"--rewards.{functions}:conciseness.mots", "3", "--dry_run")
    assert refused.returncode == 2 and "it takes no `mots`; did you mean `most`?" in refused.stderr

    done = launch("grpo.py", *words, f"--rewards.{functions}:conciseness.most", "30")
    assert done.returncode == 0, done.stderr
    first, second = metrics(tmp_path / "run")
    for name, least, most in (("conciseness", 0.5, 1), ("variety", 0, 0.75), ("ends_with_answer", 0, 1)):
        assert least <= first[f"rewards/{name}/mean"] <= most and second[f"rewards/{name}/unscored"] == 0
    traces = [json.loads(line) for line in (tmp_path / "run/traces/rank0.jsonl").read_text().splitlines()]
    assert len(traces) == 2 * 16
    for row in traces:
        assert row["rewards"]["conciseness"] == min(1.0, 30 / row["completion_tokens"])
        group = [one["text"] for one in traces if (one["step"], one["prompt_id"]) == (row["step"], row["prompt_id"])]
        assert row["rewards"]["variety"] == 1 - group.count(row["text"]) / 4

    failing = launch("grpo.py", *words[:3], tmp_path / "failing", f"--rewards.{functions}:raises", "1")
    assert failing.returncode == 3
    assert re.search(r"own_rewards.py:raises, row of prompt_id \d+: KeyError: 'no such column'", failing.stderr)
    assert json.loads((tmp_path / "failing/ended.json").read_text())["code"] == 3
