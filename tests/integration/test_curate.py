"""Samples drawn, judged and chosen: what is kept, and that no kill loses or repeats one."""

import json
import os
import re
import signal
import time

import pytest
from conftest import launch, write_yaml

from r1dist.config import Data, Filters, Generator, Model, Refine, SampleRun, Source
from r1dist.data.sources import load_problems
from r1dist.files import append_lines
from r1dist.rewards.repetition import repetition_share
from r1dist.sampling.filters import Sample, fault, refine, scores
from r1dist.sampling.select import Tally, mixed, select
from r1dist.sampling.shards import claim, shards

GOOD = "<think>1+2 ends in 3. 3*3 ends in 9.</think>\n<answer>9</answer>"
LOOSE = Filters(format=False, max_repetition=None)


def judged(text: str, filters: Filters, tokens: int = 50, finished: bool = True, accuracy: float | None = 1.0):
    sample = Sample(text, tokens, finished, accuracy)
    return fault(sample, text, scores(sample, text, filters), filters)


@pytest.mark.parametrize(
    ("text", "filters", "how", "expected"),
    [
        (GOOD, Filters(), {}, None),
        (GOOD, Filters(), {"accuracy": 0.0}, "wrong answer"),
        (GOOD, Filters(), {"accuracy": None}, "unverifiable"),
        (GOOD, Filters(correct=False), {"accuracy": None}, None),
        (GOOD, Filters(), {"finished": False}, "cut off"),
        (f"Well. {GOOD}", Filters(), {}, "format"),
        (GOOD.replace("ends in 9", "末位是9"), Filters(), {}, "language"),
        (GOOD.replace("ends in 9", "末位是9"), Filters(min_language_share=0.3), {}, None),
        (GOOD.replace("ends in 9", "末位是9"), Filters(language=None), {}, None),
        (GOOD, Filters(language="zh"), {}, "language"),
        (GOOD, Filters(min_tokens=51), {}, "too short"),
        (GOOD, Filters(max_tokens=49), {}, "too long"),
        ("one two three\n\nfour", Filters(format=False, max_paragraph=12), {}, "long paragraph"),
        ("one two three\n\nfour", Filters(format=False, max_paragraph=13), {}, None),
        ("so we go on and on and on it goes, " * 9, Filters(format=False), {}, "repetition"),
        ("see ```x = 1```", LOOSE, {}, "code block"),
        ("see ```x = 1```", Filters(format=False, code_blocks=True), {}, None),
    ],
)
def test_a_fault_is_named(text, filters, how, expected):
    assert judged(text, filters, **how) == expected


def test_refining_keeps_reasoning_and_answer_only():
    how = Refine(filler=[r"Okay, so ", r"Hmm\. ?"])
    assert refine("Sure! <think>Okay, so 2+2. Hmm. 4.</think> So: <answer> 4 </answer> Bye", how) == (
        "<think>2+2. 4.</think>\n<answer>4</answer>"
    )
    for whole in ("<answer>4</answer>", "<think>2+2</think> 4", "<think>a</think><think>b</think><answer>4</answer>"):
        assert refine(whole, how) == whole


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition_share("a b c d", 2) == 0
    assert repetition_share("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
    assert repetition_share("好好好好", 1) == pytest.approx(3 / 4)
    assert repetition_share("a", 2) == 0


def generator(name: str = "only", **fields) -> Generator:
    return Generator(name=name, model=Model(path="tiny"), data=Data(sources=[Source(path="tiny")]), **fields)


def line(prompt_id: int, *texts: str, accuracy: float = 1.0) -> dict:
    samples = [
        {"seed": 7 + i, "text": text, "tokens": 40, "finished": True, "accuracy": accuracy}
        for i, text in enumerate(texts)
    ]
    return {"prompt_id": prompt_id, "problem": f"p{prompt_id}", "answer": "9", "source": "s", "kind": "math"} | {
        "samples": samples
    }


def chosen(tmp_path, run: SampleRun, *lines: dict) -> tuple[list[dict], Tally]:
    journal = tmp_path / "journal.jsonl"
    append_lines(journal, list(lines))
    tally = Tally()
    return list(select(run, run.generators[0], [journal], set(), tally)), tally


def test_rows_come_by_prompt_without_repeats_and_up_to_the_bounds(tmp_path):
    other, third = GOOD.replace("1+2", "0+3"), GOOD.replace("1+2", "2+1")
    run = SampleRun(output_dir="x", generators=[generator(per_prompt=2, share=0.5)], rows=6)
    rows, tally = chosen(
        tmp_path, run, line(2, GOOD, other), line(0, GOOD, GOOD.replace(" ", "  "), other, third), line(1, "no", GOOD)
    )
    assert [(r["provenance"]["prompt_id"], r["provenance"]["sample_index"]) for r in rows] == [(1, 1), (0, 0), (0, 2)]
    assert (tally.prompts, tally.samples, tally.kept) == (3, 8, 3)
    assert tally.dropped == {"seen before": 1, "enough of this prompt": 1, "format": 1, "enough of this generator": 2}
    first = rows[1]
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]
    assert first["messages"][1]["content"] == GOOD and first["messages"][0]["content"] == "p0"
    assert {"generator": "only", "model": "tiny", "seed": 7, "temperature": 1.0, "accuracy": 1.0}.items() <= first[
        "provenance"
    ].items()


def test_rows_is_the_total_and_they_are_of_prompts_that_the_seed_draws(tmp_path):
    def rows_of(seed, rows, shard=30):
        run = SampleRun(output_dir="x", generators=[generator(name) for name in ("a", "b", "c")], rows=rows, seed=seed)
        seen: set[str] = set()
        found = []
        for one in run.generators:
            journals = [tmp_path / f"{one.name}{shard}.{begin}.jsonl" for begin in range(0, 30, shard)]
            for number, journal in enumerate(journals):
                texts = [GOOD.replace("1+2", f"{one.name} {n} 1+2") for n in range(shard)]
                journal.unlink(missing_ok=True)
                append_lines(journal, [line(number * shard + n, text) for n, text in enumerate(texts)])
            tally = Tally()
            found.append([r["provenance"]["prompt_id"] for r in select(run, one, journals, seen, tally)])
        return found, tally

    (first, second, third), tally = rows_of(0, rows=40)
    assert (len(first), len(second), len(third)) == (30, 10, 0) and tally.dropped == {"enough rows": 30}
    assert second != list(range(10)) and len(set(second)) == 10
    assert rows_of(0, rows=40)[0] == [first, second, third] == rows_of(0, rows=40, shard=10)[0]
    assert rows_of(1, rows=40)[0][1] != second
    assert rows_of(0, rows=None)[0] == [list(range(30))] * 3


def test_the_turns_before_a_problem_are_part_of_its_row(tmp_path):
    run = SampleRun(output_dir="x", generators=[generator()])
    earlier = {"earlier": [{"question": "1+0?", "reply": "1"}]}
    (row,), _ = chosen(tmp_path, run, line(0, GOOD) | earlier)
    assert [turn["content"] for turn in row["messages"]] == ["1+0?", "1", "p0", GOOD]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2


def test_mixed_rows_are_taken_as_they_are(tmp_path):
    rows = tmp_path / "talk.jsonl"
    append_lines(rows, [{"q": "Hello", "a": "Hi"}])
    run = SampleRun(
        output_dir="x",
        generators=[generator()],
        mix=[Source(path=str(rows), problem="q", completion="a", kind="talk")],
    )
    (row,) = mixed(run)
    assert row["messages"][-1] == {"role": "assistant", "content": "Hi"}
    assert row["kind"] == "talk" and row["provenance"] is None


@pytest.fixture
def small(tmp_path) -> dict:
    """48 prompts in 6 batches."""
    source = {"path": "tiny", "limit": 48}
    asked = {"prompting": {"prefill": "<think>"}, "sampling": {"samples": 4, "max_tokens": 64}}
    generators = [
        {"name": "direct", "model": {"path": "tiny"}, "data": {"sources": [source]}, "per_prompt": 4, **asked}
    ]
    filters = {"language": None}
    return {
        "output_dir": str(tmp_path / "out"),
        "generators": generators,
        "filters": filters,
        "rollout": {"engine": "transformers", "batch_size": 32},
    }


def test_killed_and_started_again_it_neither_loses_nor_repeats(tmp_path, small, zygote):
    config = write_yaml(tmp_path / "sample.yaml", small)
    done = launch("sample.py", "--config", config, "--output_dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        report["generators"]["direct"]["samples"] == 48 * 4
        and report["rows"] == report["generators"]["direct"]["kept"] > 40
    )
    journal = tmp_path / "out" / "samples" / "direct.jsonl"
    for kills in (1, 2):
        before = journal.stat().st_size if journal.exists() else 0
        log, began = tmp_path / "log", time.monotonic()
        pid = zygote.ask(run="sample.py", argv=["--config", str(config)], env={}, log=str(log))["pid"]
        while not journal.exists() or journal.stat().st_size == before:
            assert time.monotonic() - began < 300, log.read_text()
            time.sleep(0.01)
        if kills == 1:
            os.kill(pid, signal.SIGSTOP)  # or it is done before the second one has begun
            second = launch("sample.py", "--config", config)
            assert second.returncode == 2 and f"process {pid} is at work there" in second.stderr
        os.kill(pid, signal.SIGKILL)
        assert zygote.ask(wait=pid)["code"] == -signal.SIGKILL
        with journal.open("a") as file:
            file.write('{"prompt_id": 4')  # cut off in the middle of a line
    changed = launch("sample.py", "--config", config, "--generators.0.sampling.temperature", "0.5")
    assert changed.returncode == 2 and "generators.0.sampling.temperature was 1.0, is 0.5" in changed.stderr
    done = launch("sample.py", "--config", config)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == report
    assert (tmp_path / "out" / "rows.jsonl").read_text() == (tmp_path / "whole" / "rows.jsonl").read_text()
    ids = [json.loads(text)["prompt_id"] for text in journal.read_text().splitlines()]
    assert sorted(ids) == list(range(48))


def test_a_job_of_two_processes_shares_out_the_prompts(tmp_path, small):
    config = write_yaml(tmp_path / "sample.yaml", {**small, "shard": 12})
    alone = launch("sample.py", "--config", config, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    placed = ("--placement.gpus_per_node", "0", "--placement.processes", "2")
    done = launch("job.py", "sample", "--config", config, *placed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 node, 2 processes each" in done.stdout
    assert (tmp_path / "out" / "rows.jsonl").read_text() == (tmp_path / "alone" / "rows.jsonl").read_text()


def test_when_nothing_is_left_the_filters_say_how_many_they_took(tmp_path, small):
    small["filters"] = {"language": "zh", "min_language_share": 1.0, "min_tokens": 60}
    small["generators"][0]["data"]["sources"][0]["limit"] = 8
    done = launch("sample.py", "--config", write_yaml(tmp_path / "sample.yaml", small))
    assert done.returncode == 2
    assert re.search(r"no sample is left\. direct: 32 samples, dropped \d+ language", done.stderr), done.stderr
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_prompts_are_kept_by_their_pass_rate_of_samples_that_are_drawn_once(tmp_path, small):
    small["generators"][0] |= {"per_prompt": 1, "data": {"sources": [{"path": "tiny", "limit": 16}]}}
    config = write_yaml(tmp_path / "sample.yaml", {**small, "filters": {}})
    reports, drawn = [], []
    for bounds in ("[0, 1]", "[1, 1]"):
        done = launch("sample.py", "--config", config, "--pass_rate", bounds)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
        drawn.append((tmp_path / "out" / "samples" / "direct.jsonl").read_bytes())
    assert drawn[0] == drawn[1]
    first, second = (report["generators"]["direct"] for report in reports)
    assert first["kept"] == first["prompts"] == sum(first["pass_rates"].values()) == 16
    assert first["pass_rates"] == second["pass_rates"]
    assert second["kept"] == second["pass_rates"]["1.0"] < 16
    rows = load_problems([Source(path=str(tmp_path / "out" / "rows.jsonl"), problem="problem", answer="answer")])
    asked = load_problems([Source(path="tiny", limit=16)])
    assert len(rows) == second["kept"] and set(rows["problem"]) < set(asked["problem"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.5}, "a `share` below 1 needs `rows`"),
        ({"prompting": {"examples": "nowhere.jsonl"}}, "there is no file nowhere.jsonl"),
        ({"prompting": {"examples": "configs/recipes/tiny/examples.jsonl", "shots": 9}}, "holds 4; `shots` is 9"),
        ({"name": "a/b"}, "`generators.0.name`"),
    ],
)
def test_a_way_that_cannot_be_gone_is_refused(tmp_path, small, change, message):
    small["generators"][0].update(change)
    done = launch("sample.py", "--config", write_yaml(tmp_path / "sample.yaml", small))
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_shards_are_claimed_once_and_those_of_the_dead_go_on(tmp_path):
    mine, others = (shards(tmp_path, "generator", prompts=5, size=2) for _ in range(2))
    assert [(shard.begin, shard.end, shard.journal.name) for shard in mine] == [
        (0, 2, "generator.00000.jsonl"),
        (2, 4, "generator.00001.jsonl"),
        (4, 5, "generator.00002.jsonl"),
    ]

    def finish(shard, done):
        append_lines(shard.journal, [line(i) for i in range(shard.begin, shard.end) if i not in done])

    claimed = claim(mine)
    with others[0].held() as theirs:
        assert theirs
        append_lines(others[0].journal, [line(0)])
        order = []
        for _ in range(2):
            shard, done = next(claimed)
            with others[1].held() as twice:
                assert twice == (shard.begin != 2)  # what is claimed here cannot be claimed there
            order.append(shard.begin)
            finish(shard, done)
    for shard, done in claimed:  # let go in the middle of its work
        assert done == {0}
        order.append(shard.begin)
        finish(shard, done)
    assert order == [2, 4, 0]
    assert [len(shard.journal.read_text().splitlines()) for shard in mine] == [2, 2, 1]
    assert list(claim(others)) == []
