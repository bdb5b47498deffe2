"""What is wrong with the data of a run is said before a model is loaded and before anything is written."""

import json
import logging
import subprocess
import sys

import pytest
import trl
from conftest import ROOT, SMALL_GRPO
from datasets import Dataset

from r1dist.config import GRPORun, Reward, RewardModelRun, SampleRun, SFTRun
from r1dist.config.loader import build
from r1dist.errors import UserError
from r1dist.files import RUN_FILE
from r1dist.reward_models import train as reward_models
from r1dist.rewards import golds
from r1dist.rewards.golds import check_golds, check_golds_of
from r1dist.rl import train as rl
from r1dist.run.setup import check_rows, run_folder
from r1dist.sampling import run as sampling
from r1dist.sft import train as sft

PAIRS = {"loss": "pairwise", "sources": [{"path": "tiny_pairs", "limit": 3}]}
SMALL = {"model": {"path": "tiny"}, "per_device_train_batch_size": 4, "max_steps": 1, "report_to": "none"}
UNREADABLE = "see the appendix of the second volume"


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def grpo(**fields) -> GRPORun:
    return build(GRPORun, {**SMALL_GRPO, "output_dir": "x", **fields}, "test")


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, 4),
        ({"num_generations": 4}, 8),
        ({"gradient_accumulation_steps": 4}, 16),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 1}, 16),
        ({"steps_per_generation": 2}, 8),
        ({"generation_batch_size": 96, "gradient_accumulation_steps": 3}, 12),
    ],
)
def test_grpo_needs_the_prompts_of_a_step(fields, needed):
    run = grpo(**fields)
    check_rows(run, needed)
    with pytest.raises(UserError, match=f"{needed - 1} rows are left; one step needs {needed} prompts") as error:
        check_rows(run, needed - 1)
    assert f"at least {needed} rows" in str(error.value) and len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("run_class", "more"), [(SFTRun, {"data": {"sources": [{"path": "tiny"}]}}), (RewardModelRun, PAIRS)]
)
def test_other_trainers_need_a_batch_where_the_last_is_dropped(run_class, more):
    check_rows(build(run_class, {**SMALL, **more, "output_dir": "x"}, "test"), 1)
    run = build(run_class, {**SMALL, **more, "output_dir": "x", "dataloader_drop_last": True}, "test")
    check_rows(run, 4)
    with pytest.raises(
        UserError, match="3 rows are left; with `dataloader_drop_last` one batch of all processes needs 4"
    ):
        check_rows(run, 3)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_count_as_the_blocks_that_trl_makes(strategy):
    lengths = [7, 3, 5, 2, 9, 1, 4] * 300
    config = trl.SFTConfig("x", use_cpu=True, bf16=False, max_length=10, packing=True, packing_strategy=strategy)
    rows = Dataset.from_dict({"input_ids": [list(range(n)) for n in lengths]})
    assert sft.packed_blocks(lengths, config) == len(trl.pack_dataset(rows, 10, strategy))


def refused(monkeypatch, module, start, run, message):
    monkeypatch.setattr(module, "set_up_process", lambda **_: None)
    with pytest.raises(UserError, match=message) as error:
        start(run)
    assert len(str(error.value).splitlines()) <= 2


def test_each_launcher_refuses_too_few_rows_before_it_writes(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    tree = {"output_dir": str(folder)}
    short = {"sources": [{"path": "tiny", "limit": 3}]}
    message = "3 rows are left; one step needs 4 prompts"
    refused(monkeypatch, rl, rl.train, grpo(**tree, data=short), message)
    tree |= {**SMALL, "dataloader_drop_last": True}
    run = build(SFTRun, {**tree, "data": short}, "test")
    refused(
        monkeypatch,
        sft,
        sft.train,
        run,
        "3 rows are left, packed into 1 blocks of `max_length` 1024 tokens; .* needs 4",
    )
    run = build(RewardModelRun, {**tree, **PAIRS}, "test")
    refused(monkeypatch, reward_models, reward_models.train, run, "^sources: 3 rows are left; .* needs 4")
    assert not folder.exists()


def test_rows_that_are_left_out_do_not_count(tmp_path, monkeypatch):
    rows = [{"q": "?", "a": "1"}] * 3 + [{"q": "?", "a": None}] * 2
    data = {"sources": [{"path": jsonl(tmp_path / "rows.jsonl", rows), "problem": "q", "answer": "a"}]}
    refused(monkeypatch, rl, rl.train, grpo(output_dir=str(tmp_path / "run"), data=data), "3 rows are left")


def rows_of(**columns) -> Dataset:
    return Dataset.from_dict({"entry": [None] * len(next(iter(columns.values()))), **columns})


def test_golds_of_which_none_parses_are_refused_and_some_are_counted(pool, caplog, monkeypatch):
    def check(*answers):
        check_golds("accuracy", rows_of(answer=answers), pool)

    for golds_of_rows in ((UNREADABLE, None), ([UNREADABLE, "n/a"], ["tbd"])):
        with pytest.raises(UserError, match=r"data.sources: no gold answer parses"):
            check(*golds_of_rows)
    with caplog.at_level(logging.WARNING):
        check(UNREADABLE, "7", UNREADABLE, "8", "7")
    assert "2 of 5 rows cannot be scored by `accuracy`" in caplog.text
    check(["n/a", "7"], ["tbd"])
    monkeypatch.setattr(golds, "LOOKED_AT", 2)
    check("n/a", "7", "tbd", "todo")  # only the second part has one that parses
    assert "3 of 4 rows cannot" in caplog.text
    check("1", "n/a", "n/a", "n/a")
    assert "1 of 2 rows that were looked at, of 4, cannot" in caplog.text
    with pytest.raises(UserError, match="no gold answer parses"):
        check("n/a", "tbd", "todo")


def test_only_rows_that_a_reward_is_for_need_a_gold_answer(pool):
    def rows(*pairs):
        return rows_of(kind=[kind for kind, _ in pairs], answer=[answer for _, answer in pairs])

    check_golds_of({"format": Reward()}, rows(("math", "n/a")), pool)
    for name in ({"accuracy": Reward(kinds=["math"])}, {"length": Reward(kinds=["math"])}):
        check_golds_of(name, rows(("math", "7"), ("talk", "n/a")), pool)
        with pytest.raises(UserError, match="no gold answer parses"):
            check_golds_of(name, rows(("math", "n/a"), ("talk", "7")), pool)
        with pytest.raises(UserError, match=r"kinds: no row is of kind math; there are talk"):
            check_golds_of(name, rows(("talk", "7")), pool)


def test_programs_need_tests(pool):
    def check(*tests, language="python"):
        rows = rows_of(kind=["code"] * len(tests), tests=list(tests), language=[language] * len(tests))
        check_golds_of({"code": Reward()}, rows, pool)

    check('[{"stdin": "1", "stdout": "2"}]', None)
    for bad in ({"tests": None}, {"tests": "[]"}, {"tests": '[{"stdin": "1", "stdout": "2"}]', "language": "cobol"}):
        with pytest.raises(UserError, match=r"no row has tests that can be run; set `tests` and `language`"):
            check(bad["tests"], language=bad.get("language"))


def test_grpo_and_sampling_refuse_unreadable_golds_before_they_write(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "rows.jsonl", [{"q": f"{n}?", "a": UNREADABLE} for n in range(8)])
    data = {"sources": [{"path": path, "problem": "q", "answer": "a"}]}
    folder = str(tmp_path / "run")
    refused(monkeypatch, rl, rl.train, grpo(output_dir=folder, data=data, rewards={"accuracy": 1}), "no gold answer")
    generators = [{"name": "one", "model": {"path": "tiny"}, "data": data, "sampling": {"max_tokens": 64}}]
    run = build(SampleRun, {"output_dir": folder, "generators": generators}, "test")
    refused(monkeypatch, sampling, sampling.sample, run, "generators.0.data.sources: no gold answer parses")
    assert not (tmp_path / "run").exists()


def test_what_is_read_at_the_end_is_looked_at_in_the_beginning(tmp_path, monkeypatch):
    bad = [{"path": jsonl(tmp_path / "rows.jsonl", [{"q": "?"}]), "problem": "q"}]
    tree = {**SMALL, **PAIRS, "output_dir": str(tmp_path / "run"), "holdout": bad}
    run = build(RewardModelRun, tree, "test")
    refused(monkeypatch, reward_models, reward_models.train, run, "^holdout: .*needs `chosen`")
    talk = {"data": {"sources": [{"path": "tiny_talk", "limit": 4}]}, "holdout": bad, "eval_strategy": "steps"}
    run = build(SFTRun, {**SMALL, **talk, "output_dir": str(tmp_path / "run")}, "test")
    refused(monkeypatch, sft, sft.train, run, "^holdout: .*needs `completion`")
    source = {"path": "tiny", "limit": 4}
    generators = [{"name": "one", "model": {"path": "tiny"}, "data": {"sources": [source]}}]
    run = build(SampleRun, {"output_dir": str(tmp_path / "run"), "generators": generators, "mix": bad}, "test")
    refused(monkeypatch, sampling, sampling.sample, run, "needs `completion`")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_data_that_changed_between_two_starts_is_noticed(tmp_path, kind):
    def write(answer):
        rows = [{"problem": "?", "completion": answer}]
        if kind == "saved":
            Dataset.from_list(rows).save_to_disk(tmp_path / "data")
        else:
            (tmp_path / "data").mkdir(exist_ok=True)
            jsonl(tmp_path / "data" / "train.jsonl", rows)

    write("1")
    path = str(tmp_path / "data" / "train.jsonl" if kind == "file" else tmp_path / "data")
    fields = {"data": {"sources": [{"path": path}]}, "output_dir": str(tmp_path / "run"), "resume": "auto"}
    run = build(SFTRun, {**SMALL, **fields}, "test")

    def start():
        with run_folder(run, "sft"):
            pass

    start()
    start()
    if kind != "file":
        (tmp_path / "data" / "cache-1.arrow").write_text("of `datasets`")
        start()
    write("2")
    with pytest.raises(
        UserError, match=r"holds a run with other data: .*data.* \(`data.sources.0.path`\) has changed"
    ):
        start()
    record = json.loads((tmp_path / "run" / RUN_FILE).read_text())
    del record["data"]  # as earlier versions left it
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(record))
    start()


def test_samples_of_other_data_are_not_continued(tmp_path):
    examples, mix = tmp_path / "examples.jsonl", tmp_path / "mix.jsonl"
    for file in (examples, mix):
        file.write_text('{"problem": "1+1?", "completion": "2"}\n')
    generator = {"name": "one", "model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}}
    generator["prompting"] = {"examples": str(examples), "shots": 1}
    further = {"mix": [{"path": str(mix), "problem": "problem", "completion": "completion"}]}
    folder = tmp_path / "run"
    run = build(SampleRun, {"output_dir": str(folder), "generators": [generator], **further}, "test")
    sampling._begin(run, folder)
    chosen = sampling._settings(run)
    mix.write_text("")  # may change: it is no part of the samples
    sampling._begin(run, folder)
    assert sampling._settings(run) != chosen
    examples.write_text('{"problem": "1+1?", "completion": "3"}\n')
    with pytest.raises(UserError, match=r"\(`generators.0.prompting.examples`\) has changed"):
        sampling._begin(run, folder)


READ = """
import sys
from r1dist.config import Source
from r1dist.data.sources import load_problems
print(load_problems([Source(path=sys.argv[1], problem="q", answer="a", answer_format="boxed")])["answer"])
"""


def test_an_edit_of_a_reader_reaches_rows_that_are_cached(tmp_path):
    package = tmp_path / "r1dist"
    for name in ("__init__.py", "errors.py", "files.py", "config", "data", "tiny"):
        there = [ROOT / "r1dist" / name, *(ROOT / "r1dist" / name).glob("*.py")]
        for file in (file for file in there if file.is_file()):
            copy = package / file.relative_to(ROOT / "r1dist")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    rows = jsonl(tmp_path / "rows.jsonl", [{"q": "?", "a": "\\boxed{7}"}] * 3)
    env = {"PATH": "", "PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}

    def read():
        done = subprocess.run(
            [sys.executable, "-c", READ, rows], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert read() == "Column(['7', '7', '7'])"
    formats = package / "data" / "formats.py"
    edited = formats.read_text().replace("return answer.strip()", "return answer.strip() + '!'")
    assert edited != formats.read_text()
    formats.write_text(edited)
    assert read() == "Column(['7!', '7!', '7!'])"
