"""Sources mixed by weight: in which shares, that the same run has the same rows, and what is refused."""

import json
import logging
from collections import Counter
from collections.abc import Iterable

import pytest

from r1dist.config import Data, EvaluateRun, GRPORun, Model, RewardModelRun, SampleRun, SFTRun, Source
from r1dist.config.loader import as_tree, build
from r1dist.config.tree import changed_on_resume
from r1dist.data.prompts import completion_dataset, prompt_dataset
from r1dist.data.sources import load_conversations, load_problems
from r1dist.data.templates import load_template
from r1dist.errors import UserError
from r1dist.rl import train as rl
from r1dist.sampling.run import sampling_job
from r1dist.sampling.select import mixed
from r1dist.sft import train as sft

TALK = {"problem": "problem", "completion": "answer"}


def source(tmp_path, name: str, numbers: Iterable[int], file: str | None = None, **fields) -> dict:
    path = tmp_path / f"{file or name}.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{name}{n}", "answer": str(n)}) + "\n" for n in numbers))
    return {"path": str(path), "problem": "problem", "answer": "answer", **fields}


def sources(tmp_path, *shapes: tuple[str, int, float | None]) -> list[dict]:
    return [source(tmp_path, name, range(count), weight=weight) for name, count, weight in shapes]


def problems(given: list[dict], *arguments) -> list[str]:
    return list(load_problems([Source(**one) for one in given], *arguments)["problem"])


def test_shares_are_those_of_the_weights_until_the_first_source_ends(tmp_path, caplog):
    given = sources(tmp_path, ("a", 3000, 3), ("b", 400, 1))
    with caplog.at_level(logging.INFO):
        found = problems(given, 0)
    counts = Counter(name[0] for name in found)
    assert counts["b"] == 400 and found[-1] == "b399" and 3 * 400 * 0.85 < counts["a"] < 3 * 400 * 1.15
    for name in "ab":  # each in its own order, none twice
        assert [one for one in found if one[0] == name] == [f"{name}{n}" for n in range(counts[name])]
    assert f"{counts['a']} from the 3000 of {tmp_path}/a.jsonl, 400 from the 400 of" in caplog.text


def test_with_all_exhausted_each_row_is_used_and_the_small_begin_again(tmp_path):
    given = sources(tmp_path, ("a", 300, 1), ("b", 20, 1))
    found = Counter(problems(given, 0, "all_exhausted"))
    assert len(found) == 320 and all(found[f"a{n}"] == 1 for n in range(300))
    assert 300 * 0.8 < sum(found[f"b{n}"] for n in range(20)) < 300 * 1.2


def test_a_mixture_is_a_function_of_the_seed(tmp_path):
    given = sources(tmp_path, ("a", 50, 2), ("b", 50, 1))
    first = problems(given, 1)
    assert problems(given, 1) == first != problems(given, 2)
    doubled = [{**one, "weight": 2 * one["weight"]} for one in given]
    assert problems(doubled, 1) == first


def test_without_weights_one_comes_after_another(tmp_path):
    given = sources(tmp_path, ("a", 3, None), ("b", 2, None))
    assert problems(given, 0) == problems(given, 1) == ["a0", "a1", "a2", "b0", "b1"]


def test_prompts_have_an_id_each_also_those_that_come_again(tmp_path):
    given = sources(tmp_path, ("a", 30, 1), ("b", 5, 1))
    data = Data(sources=given, stopping_strategy="all_exhausted")
    template = load_template(Model(path="tiny"), "chat")
    rows = prompt_dataset(data, template, 512, 8, seed=3)
    assert rows["problem"] == problems(given, 3, "all_exhausted")
    assert rows["prompt_id"] == list(range(len(rows))) and len(set(rows["problem"])) == 35 < len(rows)
    talk = Data(sources=[{**one, **TALK} for one in given])
    lengths = completion_dataset(talk, template, None, seed=3)["length"]
    assert len(lengths) == len(load_conversations(talk.sources, 3)) != len(load_conversations(talk.sources, 4))


def test_shares_are_of_what_decontamination_leaves(tmp_path, template):
    given = sources(tmp_path, ("a", 60, 1), ("b", 20, 1))
    kept = [source(tmp_path, "a", range(40, 60), "kept", weight=1), given[1]]
    against = [source(tmp_path, "a", range(40), "tests")]
    data = Data(sources=given, stopping_strategy="all_exhausted", decontaminate={"against": against})
    dropped: list[dict] = []
    rows = prompt_dataset(data, template, 512, 8, seed=3, contaminated=dropped)
    assert rows["problem"] == problems(kept, 3, "all_exhausted")
    assert [row["problem"] for row in dropped] == [f"a{n}" for n in range(40)]
    talk = Data(sources=[{**one, **TALK} for one in given], decontaminate={"against": against})
    taught = len(completion_dataset(talk, template, None, seed=3))
    assert taught == len(load_conversations([Source(**{**one, **TALK}) for one in kept], 3))


def test_a_source_with_a_weight_keeps_a_row(tmp_path, template):
    given = sources(tmp_path, ("a", 3, 1), ("b", 3, 1))
    against = {"against": [{**given[1], "weight": None}]}
    with pytest.raises(UserError, match=r"data.decontaminate: no row of .*b.jsonl is left, which has a `weight`"):
        prompt_dataset(Data(sources=given, decontaminate=against), template, 512, 8)
    whole = [{**one, "weight": None} for one in given]
    assert len(prompt_dataset(Data(sources=whole, decontaminate=against), template, 512, 8)) == 3


def test_launchers_mix_by_the_seed_of_the_run(tmp_path, small_grpo, monkeypatch):
    given = sources(tmp_path, ("a", 30, 1), ("b", 30, 1))

    def asked(*arguments):
        raise InterruptedError(arguments[-2])

    trees = {"prompt_dataset": (rl, rl.train, GRPORun, {}), "completion_dataset": (sft, sft.train, SFTRun, TALK)}
    shared = {name: small_grpo[name] for name in ("model", "output_dir")} | {"use_cpu": True, "seed": 7}
    for function, (module, train, run_class, fields) in trees.items():
        monkeypatch.setattr(module, function, asked)
        monkeypatch.setattr(module, "set_up_process", lambda **_: None)
        tree = {**shared, "data": {"sources": [{**one, **fields} for one in given]}}
        with pytest.raises(InterruptedError, match="7"):
            train(build(run_class, tree, "run.yaml"))
    generator = {**GENERATOR, "data": {"sources": given}, "sampling": {"max_tokens": 8}}
    run = build(SampleRun, {"output_dir": "x", "generators": [generator], "seed": 7}, "run.yaml")
    assert sampling_job(run, 0).prompts["problem"] == problems(given, 7) != problems(given, 0)


def test_what_sampling_adds_may_be_mixed(tmp_path):
    mix = [{**one, **TALK} for one in sources(tmp_path, ("a", 40, 1), ("b", 10, 1))]
    generator = {"name": "one", "model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}}
    run = build(SampleRun, {"output_dir": "x", "generators": [generator], "mix": mix, "seed": 5}, "run.yaml")
    asked = [row["messages"][0]["content"] for row in mixed(run)]
    assert asked == [row["messages"][0]["content"] for row in load_conversations(run.mix, 5)] and len(asked) < 50


def test_other_weights_are_another_run(tmp_path, small_grpo):
    def tree(weight: float | None):
        data = {"sources": sources(tmp_path, ("a", 3, weight), ("b", 3, weight and 1))}
        return as_tree(build(GRPORun, {**small_grpo, "data": data}, "run.yaml"))

    assert changed_on_resume(GRPORun, tree(2), tree(3)) == {"data.sources.0.weight": (2, 3)}
    before = tree(None)
    del before["data"]["stopping_strategy"]
    for one in before["data"]["sources"]:
        del one["weight"]
    assert changed_on_resume(GRPORun, before, tree(None)) == {}


TINY = {"path": "tiny"}
WEIGHTED = {"path": "tiny", "weight": 1}
MODEL = {"model": {"path": "tiny"}}
GENERATOR = {"name": "one", **MODEL, "data": {"sources": [TINY]}}


@pytest.mark.parametrize(
    ("run_class", "fields", "message"),
    [
        (GRPORun, {"data": {"sources": [WEIGHTED, TINY]}}, "`data.sources.1` has no `weight`, but others"),
        (SFTRun, {"data": {"sources": [TINY, WEIGHTED]}}, "`data.sources.0` has no `weight`"),
        (SampleRun, {"generators": [GENERATOR], "mix": [WEIGHTED, TINY]}, "`mix.1` has no `weight`"),
        (GRPORun, {"data": {"sources": [{**TINY, "weight": 0}]}}, "`data.sources.0.weight`"),
        (GRPORun, {"data": {"sources": [{**TINY, "weight": ".inf"}]}}, "`data.sources.0.weight`"),
        (EvaluateRun, {"data": {"sources": [WEIGHTED]}}, "`data.sources.0.weight`: these rows are not mixed"),
        (
            EvaluateRun,
            {"data": {"sources": [TINY]}, "requests": {"sources": [WEIGHTED]}},
            "`requests.sources.0.weight`: these rows are not mixed",
        ),
        (
            EvaluateRun,
            {"benchmarks": [{"name": "mine", "sources": [WEIGHTED]}]},
            "`benchmarks.0.sources.0.weight`: these rows are not mixed",
        ),
        (
            EvaluateRun,
            {"data": {"sources": [TINY], "stopping_strategy": "all_exhausted"}},
            "`data.stopping_strategy` is not a field",
        ),
        (
            SFTRun,
            {"data": {"sources": [TINY], "decontaminate": {"against": [WEIGHTED]}}},
            "`data.decontaminate.against.0.weight`: these rows are not mixed",
        ),
        (RewardModelRun, {"loss": "pairwise", "sources": [WEIGHTED]}, "`sources.0.weight`: these rows are not mixed"),
        (
            GRPORun,
            {"data": {"sources": [TINY], "stopping_strategy": "all_exhausted"}},
            "`data.stopping_strategy` is of sources with a `weight`",
        ),
        (GRPORun, {"data": {"sources": [WEIGHTED], "stopping_strategy": "never"}}, "`data.stopping_strategy`"),
    ],
)
def test_weights_that_would_mean_nothing_are_refused(run_class, fields, message):
    output = {} if run_class is EvaluateRun else {"output_dir": "x"}
    model = {} if run_class is SampleRun else MODEL
    with pytest.raises(UserError) as error:
        build(run_class, {**model, **output, **fields}, "run.yaml")
    assert message in str(error.value) and str(error.value).startswith("run.yaml: ")
    assert len(str(error.value).splitlines()) <= 2
