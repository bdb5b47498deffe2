"""reasoning-gym's tasks: rows that no two splits share, and answers judged by the task's own scorer."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from r1dist.config import GRPORun, Reward, Source, Verify
from r1dist.config.loader import as_tree, build
from r1dist.config.tree import changed_on_resume
from r1dist.data.gym import TEST_SHARE, rows, split_of
from r1dist.data.sources import load_problems
from r1dist.errors import UserError
from r1dist.rewards import VERIFIERS, Rewards, verifiers_of
from r1dist.rewards.golds import check_golds
from r1dist.rewards.pool import Pool
from r1dist.rewards.task import accuracy, task

pytest.importorskip("reasoning_gym", reason="needs `pip install -e '.[gym]'`")

SHORT = {"max_terms": 2, "max_digits": 2}
# What an answer that is code would do if a scorer evaluated it; beside it, what shows that it did.
CODE = "[open({path!r}, 'w')]"
FORMULA = "exec(\"open({path!r}, 'w')\")"


def source(name: str = "chain_sum", config: dict | None = None, **fields) -> Source:
    return Source(path="reasoning_gym", task=name, config=config, **fields)


def answered(answer: str) -> str:
    return f"<think>so</think>\n<answer>{answer}</answer>"


def test_no_question_is_in_both_splits_or_twice_whatever_the_seed():
    drawn = {split: [rows(source(config=SHORT, limit=60, seed=s, split=split)) for s in (0, 1)]
             for split in ("train", "test")}  # fmt: skip
    questions = {split: [[row["problem"] for row in part] for part in parts] for split, parts in drawn.items()}
    for split, parts in questions.items():
        assert all(
            len(set(part)) == 60 and {split_of(question, TEST_SHARE) for question in part} == {split} for part in parts
        )
        assert parts[0][1:] != parts[1][:-1]  # seeds that are neighbours do not share their items
    assert rows(source(config=SHORT, limit=20)) == drawn["train"][0][:20]


def test_other_processes_make_the_same_rows_and_import_the_package_late():
    names = ("knights_knaves", "list_functions", "pool_matrix")  # of NumPy's types; of two generators of the process
    code = (
        "import json, sys\nfrom r1dist.config.loader import build\nfrom r1dist.data.gym import rows\n"
        "from r1dist.config import Source\nimport r1dist.rewards\nassert 'reasoning_gym' not in sys.modules\n"
        f"print(json.dumps([rows(Source(path='reasoning_gym', task=name, limit=30)) for name in {names}]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [rows(source(name, limit=30)) for name in names]


def test_rows_that_would_differ_between_processes_and_too_few_questions_are_refused(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    with pytest.raises(UserError, match="Start the command with `PYTHONHASHSEED=0`"):
        rows(source("ransom_note", limit=1))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(rows(source("ransom_note", limit=1))) == 1
    digits = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    with pytest.raises(UserError, match=r"`limit` is 500, but \d+ items had 1\d\d distinct questions of the split"):
        rows(source(config=digits))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "`data.sources.0`: `path: reasoning_gym` needs `task`"),
        (
            {"task": "chain_sums"},
            "`chain_sums` is not a task of reasoning-gym; did you mean `chain_sum`?\nThere are ab,",
        ),
        ({"task": "coin_flip"}, "task `coin_flip` cannot be used: its scorer gives full marks to a part"),
        (
            {"task": "chain_sum", "config": {"max_term": 3}},
            "`config.max_term` is not a field of task `chain_sum`; did you mean `max_terms`?\nThere are allow",
        ),
        ({"task": "chain_sum", "config": {"max_terms": "few"}}, "`config.max_terms`: Input should be a valid integer"),
        ({"task": "chain_sum", "config": {"min_terms": 9}}, "refuses it: max_terms must be >= min_terms; got"),
        ({"task": "chain_sum", "config": {"size": 9}}, "`config.size` is not set here; use `limit` of the source."),
        ({"task": "chain_sum", "split": "dev"}, "reasoning_gym has no split `dev`; it has train, test."),
        ({"path": "tiny", "task": "chain_sum"}, "`task` and `config` are of `path: reasoning_gym`, not of tiny."),
    ],
)
def test_what_cannot_be_is_refused_with_its_mend(small_grpo, fields, message):
    small_grpo["data"]["sources"] = [{"path": "reasoning_gym", **fields}]
    with pytest.raises(UserError) as error:
        build(GRPORun, small_grpo, "run.yaml")
    assert str(error.value).startswith("run.yaml: ") and message in str(error.value)


def test_the_reward_needs_a_task_and_the_task_its_package(small_grpo, monkeypatch):
    with pytest.raises(UserError, match=r"`rewards.task` is for rows of a task"):
        build(GRPORun, {**small_grpo, "rewards": {"task": 1}}, "run.yaml")
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    small_grpo["data"]["sources"] = [{"path": "reasoning_gym", "task": "chain_sum"}]
    with pytest.raises(UserError, match=r"`pip install -e '.\[gym\]'` adds it"):
        build(GRPORun, small_grpo, "run.yaml")


def test_another_config_is_another_run(small_grpo):
    def tree(**config):
        small_grpo["data"]["sources"] = [{"path": "reasoning_gym", "task": "chain_sum", "config": config}]
        return as_tree(build(GRPORun, small_grpo, "run.yaml"))

    assert changed_on_resume(GRPORun, tree(max_terms=2), tree(max_terms=2)) == {}
    assert changed_on_resume(GRPORun, tree(max_terms=2), tree(max_terms=3)) == {
        "data.sources.0.config.max_terms": (2, 3)
    }


def test_the_scorer_of_the_task_decides():
    row, other = rows(source(config=SHORT, limit=2))
    right = row["answer"]
    assert task(answered(f" +{right}.0\n"), row) == accuracy(answered(right), row) == 1
    assert 0 < task(answered(f"{right} or so"), row) < 1 and accuracy(answered(f"{right} or so"), row) == 0
    assert task("", row) == task(answered("none"), row) == 0
    assert task(answered(right), {**row, "entry": None}) is None
    assert accuracy(answered("1/2"), {"answer": "0.5", "entry": None}) == accuracy(answered("2"), {"answer": "2"}) == 1
    for name in ("arc_agi", "gsm_symbolic", "knights_knaves", "tsumego"):  # tuples, fractions, NumPy's, no `validate`
        assert all(task(answered(row["answer"]), row) == 1 for row in rows(source(name, limit=3)))
    assert task(answered(other["answer"]), row) < 1


def test_a_scorer_that_raises_costs_the_answer_and_one_that_always_raises_the_row():
    row = rows(source("prime_factorization", limit=1))[0]
    assert task(answered("nan"), row) == 0
    assert task(answered("2"), {**row, "entry": row["entry"].replace("'answer'", "'nothing'")}) is None


@pytest.mark.parametrize(
    ("name", "code"),
    [("n_queens", CODE), ("spiral_matrix", CODE), ("countdown", FORMULA), ("polynomial_multiplication", FORMULA)],
)
def test_what_a_model_writes_is_not_run(name, code, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    row = rows(source(name, limit=1))[0]
    assert task(answered(row["answer"]), row) == 1
    assert task(answered(code.format(path=str(tmp_path / "ran"))), row) < 0.1
    assert not any(tmp_path.iterdir())


def test_what_a_scorer_takes_for_a_distance_of_nothing_is_wrong():
    assert task(answered("nan"), rows(source("complex_arithmetic", limit=1))[0]) == 0


def test_mixed_rows_in_the_workers():
    sources = [Source(path="tiny", limit=2), source(config=SHORT, limit=2), source("rush_hour", limit=1)]
    dataset = load_problems(sources)
    assert dataset["answer"][-1] is None
    texts = [answered(answer) for answer in dataset["answer"]]
    rewards = {"task": Reward(), "accuracy": Reward()}
    # All tests share a fork server: it may have begun without reasoning-gym, or begins here and needs all for them.
    with Pool(VERIFIERS, Verify(workers=1, seconds=120)) as pool:
        check_golds("accuracy", dataset, pool)
        scorers = Rewards(rewards, pool, dataset).scorers
        assert scorers["task"](texts, list(dataset)) == [None, None, 1, 1, 0.01]
        assert scorers["accuracy"](texts, list(dataset)) == [1, 1, 1, 1, 0]
        with pytest.raises(UserError, match="no row is of a task; set `path: reasoning_gym` of the source"):
            check_golds("task", dataset.select([0, 1]), pool)
    assert verifiers_of({"task"}, []).keys() == verifiers_of((), sources).keys() == {"accuracy", "task"}
