"""What the benches print, and the page of their figures; no bench runs here."""

import json

import pytest
import varlen_stand_in
from conftest import ROOT
from transformers import Qwen2Config

SPELT_OUT = ("staleness", "rewards", "rollout", "sync", "checkpoint", "sample", "decontaminate", "scale", "first_run",
             "real", "decode")  # fmt: skip
"""Benches that name each figure in their source; others put the names together."""


@pytest.fixture(autouse=True)
def bench_path(monkeypatch):
    """Benches import each other plainly."""
    monkeypatch.syspath_prepend(ROOT / "bench")


@pytest.fixture
def folder(tmp_path):
    """A page and results of two benches, one of them from two machines."""
    (tmp_path / "results").mkdir()
    (tmp_path / "page.md").write_text(
        "Before.\n\n<!-- figures: python bench/page.py -->\nold\n<!-- end of figures -->\n\nAfter.\n"
    )
    ratio = {"value": 0.95, "aim": 0.9, "better": "higher", "rounds": [0.94, 0.95, 0.96]}
    put(tmp_path, "sample-large", "sample", "large", throughput_ratio=ratio)
    put(tmp_path, "sample-small", "sample", "small", throughput_ratio={"value": 0.8, "aim": 0.9, "better": "higher"})
    put(tmp_path, "sync-small", "sync", "small", shm_share={"value": 0.06, "aim": 0.05, "better": "lower"})
    return tmp_path


def put(folder, file: str, bench: str, machine: str, **aims) -> None:
    text = json.dumps({"bench": bench, "machine": machine, "aims": aims})
    (folder / "results" / f"{file}.json").write_text(text)


def written(folder) -> str:
    import page

    page.main(folder / "results", folder / "page.md")
    return (folder / "page.md").read_text()


def rows(text: str, bench: str) -> list[list[str]]:
    """A bench's rows, without the bench's name and the phrase."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [[row[1], *row[3:]] for row in found if row[0] == f"`{bench}`"]


def test_page_has_a_row_for_each_figure(folder):
    text = written(folder)
    assert text.startswith("Before.\n") and text.endswith("\n\nAfter.\n") and "old" not in text
    assert rows(text, "sample") == [
        ["`throughput_ratio`", "0.95", "0.94, 0.95, 0.96", "≥ 0.9", "yes", "large"],
        ["`throughput_ratio`", "0.8", "", "≥ 0.9", "no", "small"],
        ["`evaluation_ratio`", "not run", "", "≥ 0.9", "", ""],
    ]
    assert rows(text, "sync") == [["`shm_share`", "0.06", "", "≤ 0.05", "no", "small"]]
    assert rows(text, "checkpoint") == [["`save_ratio`", "not run", "", "≤ 1.1", "", ""]]


def test_a_figure_at_its_aim_has_reached_it(folder):
    put(folder, "sync-small", "sync", "small", shm_share={"value": 0.05, "aim": 0.05, "better": "lower"})
    put(folder, "sample-small", "sample", "small", throughput_ratio={"value": 0.9, "aim": 0.9, "better": "higher"})
    text = written(folder)
    assert [rows(text, bench)[place][4] for bench, place in (("sync", 0), ("sample", 1))] == ["yes", "yes"]


def test_a_result_s_own_table_stands_below(folder):
    own = [["rollouts", "accuracy"], ["one behind", "75.0%"]]
    (folder / "results" / "staleness-small.json").write_text(
        json.dumps({"bench": "staleness", "machine": "small", "aims": {}, "table": own})
    )
    below = written(folder).partition("`staleness`, small:\n\n")[2]
    assert below.startswith(
        "| rollouts | accuracy |\n| --- | --- |\n| one behind | 75.0% |\n\n<!-- end of figures -->"
    )


def test_page_is_the_same_when_written_again(folder):
    assert written(folder) == written(folder)


def test_unknown_figure_is_refused_and_the_page_kept(folder):
    put(folder, "sync-large", "sync", "large", speed={"value": 1, "aim": 1, "better": "higher"})
    before = (folder / "page.md").read_text()
    with pytest.raises(SystemExit, match=r"sync-large\.json: .*the figure speed of sync"):
        written(folder)
    assert (folder / "page.md").read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        '{"bench": "sync", ',
        "[]",
        '{"bench": "sync", "aims": {}}',
        '{"bench": "sync", "machine": "m", "aims": {"shm_share": {"value": 1, "better": "lower"}}}',
        '{"bench": "sync", "machine": "m", "aims": {"shm_share": {"value": 1, "aim": 1, "better": "more"}}}',
    ],
)
def test_damaged_file_is_named(folder, text):
    (folder / "results" / "sync-large.json").write_text(text)
    with pytest.raises(SystemExit, match=r"sync-large\.json: not a bench's result") as refused:
        written(folder)
    assert "\n" not in str(refused.value)


def test_page_without_its_markers_is_refused(folder):
    (folder / "page.md").write_text("Before.\n")
    with pytest.raises(SystemExit, match=r"page\.md: .*missing"):
        written(folder)


def test_known_figures_are_those_that_benches_measure():
    import page

    for bench in SPELT_OUT:
        source = (ROOT / "bench" / f"{bench}.py").read_text()
        for name in page.AIMS[bench]:
            assert f'"{name}"' in source, (bench, name)


def test_median_of_the_rounds_counts():
    from result import aim

    assert aim([3, 1.23456, 2], 1.5, "higher") == {
        "value": 2, "aim": 1.5, "better": "higher", "rounds": [3, 1.235, 2]
    }  # fmt: skip
    assert aim(0.5, 1, "lower") == {"value": 0.5, "aim": 1, "better": "lower"}


def test_result_is_one_line(capsys):
    from result import aim, show

    show("sync", {"shm_share": aim(0.01, 0.05, "lower")}, sizes={"1M": 2})
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found.pop("machine")
    assert found == {"bench": "sync", "aims": {"shm_share": aim(0.01, 0.05, "lower")}, "sizes": {"1M": 2}}


@pytest.mark.parametrize("kernel", ["sdpa", varlen_stand_in.NAME])
def test_rollouts_with_shared_prompts_have_the_logprobs_of_padded_ones(kernel, monkeypatch):
    """`gpu_check`'s comparison, on a small model."""
    import gpu_attention

    varlen_stand_in.install(monkeypatch)
    config = Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         initializer_range=0.3)  # fmt: skip
    found = gpu_attention.compare_attention(kernel, 2048, 1, config, "cpu")
    assert 1800 <= found["tokens"] <= 2048
    assert 0 < found["shared"]["mean_diff"] < 1.5 * found["padded"]["mean_diff"]


def test_checks_tell_what_passed_what_failed_and_what_has_not_run():
    import gpu_check

    run = {"finished": True, "steps": 8, "largest_logp_diff": 0.003}
    training = {"8192": {"estimated_gib": 11.0, "peak_gib": 10.0}, "16384": {"estimated_gib": 12.0, "peak_gib": 10.0}}
    attention = {"shared": {"attention": "flash_attention_2", "mean_diff": 0.02}, "padded": {"mean_diff": 0.01}}
    parts = {"rollouts": {"runs": {"nccl": None, "ipc": run, "shm": {**run, "largest_logp_diff": None}}},
             "training": training, "attention": attention, "step": {"ratio": 1.2}}  # fmt: skip
    assert {what: passed for what, passed, _ in gpu_check.checks(parts)} == {
        "rollouts, nccl": None, "rollouts, ipc": True, "logprobs, ipc": True, "rollouts, shm": True,
        "logprobs, shm": False, "flash_attention_2, shared prompts": False, "memory, 8192 tokens to a forward": True,
        "memory, 16384 tokens to a forward": False, "whole step beside TRL": True,
    }  # fmt: skip
    assert not list(gpu_check.checks({}))


def test_the_page_of_results_has_what_the_runs_files_say(tmp_path):
    import real_results

    scores = {"accuracy": 0.25, "ci95": [0.2, 0.3], "format": 0.5, "language": None, "mean_tokens": 21.4}
    stage = {"name": "r1_zero", "kind": "grpo", "seconds": 60.0, "eval": scores, "sampled": scores}
    goal = {"stage": "r1_zero", "text": "r1_zero: sampled format 50.0 %, at least 90.0 %", "met": False}
    (tmp_path / "summary.json").write_text(json.dumps({"seed": 1, "stages": [stage], "goals": [goal]}))
    (tmp_path / "r1_zero").mkdir()
    step = {"step": 1, "rewards/accuracy/mean": 0.125, "rewards/format/mean": 0.5, "reward": 0.625, "loss": 0.0}
    step |= {"completions/mean_length": 20.0, "step_time": 30.0, "seconds/generate": 10.4, "seconds/train": 19.4}
    (tmp_path / "r1_zero/metrics.jsonl").write_text(json.dumps(step) + "\n")
    (tmp_path / "evaluations").mkdir()
    answer = {"prompt_id": 0, "problem": "1 + 1 =", "answer": "2", "kind": "math"}
    (tmp_path / "evaluations/r1_zero.samples").mkdir()
    (tmp_path / "evaluations/r1_zero.samples/data-greedy.jsonl").write_text(
        json.dumps({**answer, "samples": [{"text": "<answer>2</answer>"}]}) + "\n"
    )
    (tmp_path / "transfer").mkdir()
    few = {"problems": 60, **scores}
    (tmp_path / "transfer/svamp-r1_zero.json").write_text(json.dumps({"greedy": few, "sampled": few}))
    found = real_results.collect(tmp_path)
    assert found["stages"][0]["curves"]["accuracy"] == [0.125]
    text = real_results.page([found])
    assert "| R1-Zero: RL only, the same prompt | 25.0 % (20.0 % to 30.0 %) | 25.0 % | 50.0 % | - | 21 | 60 |" in text
    percents = "25.0 % (20.0 % to 30.0 %)"
    assert f"| svamp | R1-Zero: RL only, the same prompt | {percents} | {percents} | 60 |" in text
    assert "- missed: r1_zero: sampled format 50.0 %, at least 90.0 %" in text
    assert "1 steps. Seconds by phase: generate 10, train 19." in text and "1 + 1 =\n<answer>2</answer>" in text
    real_results.draw([found], tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
