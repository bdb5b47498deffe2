"""Prompts kept by their pass rate: which they are, and that GRPO reads of them what was asked."""

import json

import pytest

from r1dist.config import Data, Filters, Generator, GRPORun, Model, SampleRun, Sampling, Source
from r1dist.config.loader import build
from r1dist.data import gym
from r1dist.data.prompts import prompt_dataset
from r1dist.data.sources import load_problems
from r1dist.data.templates import load_template
from r1dist.errors import UserError
from r1dist.files import append_lines
from r1dist.generation.engine import Rollout
from r1dist.rewards import verifiers_of
from r1dist.rewards.task import accuracy
from r1dist.sampling.draw import lines_of
from r1dist.sampling.run import sampling_job
from r1dist.sampling.select_prompts import PromptTally, select_prompts

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "1+0?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "  and twice that? "},
]
TESTS = [{"stdin": "1", "stdout": "2"}]
CARRIED = ("problem", "earlier", "system", "answer", "tests", "language", "entry")
KEPT = {field: field for field in ("problem", "answer", "tests", "language", "entry")}
GENERATOR = {"name": "policy", "model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}}


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(tmp_path, count: int, same: int = 0) -> Source:
    rows = [{"q": f"{n}+1?" if n >= same else "0+1?", "a": str(n + 1)} for n in range(count)]
    return Source(path=jsonl(tmp_path / "numbered.jsonl", rows), problem="q", answer="a")


def line(prompt_id: int, problem: str, *accuracies: float | None) -> dict:
    samples = [{"seed": 0, "text": "", "tokens": 5, "finished": True, "accuracy": score} for score in accuracies]
    return {"prompt_id": prompt_id, "problem": problem, "samples": samples}  # as the first journals had it


def kept(tmp_path, sources, scores, **fields) -> tuple[list[dict], PromptTally]:
    """The rows and counts of prompts whose samples have `scores`."""
    generator = Generator(name="policy", model=Model(path="tiny"), data=Data(sources=sources))
    run = SampleRun(output_dir="x", generators=[generator], **{"pass_rate": [0.2, 0.8], **fields})
    prompts = prompt_dataset(generator.data, load_template(generator.model, "chat"), 4096, 8)
    journal = tmp_path / "policy.jsonl"
    journal.unlink(missing_ok=True)
    append_lines(journal, [line(n, prompts[n]["problem"], *given) for n, given in reversed(list(enumerate(scores)))])
    tally = PromptTally()
    return list(select_prompts(run, generator, [journal], prompts, set(), tally)), tally


@pytest.mark.parametrize("listed", [False, True])
def test_what_was_asked_is_what_grpo_reads(tmp_path, listed):
    rows = [
        {"q": "1+1?", "a": "2", "t": TESTS, "l": "python", "s": "Think."},
        {"q": "2+2?", "a": "4", "t": None, "l": None, "s": None},
        {"q": "3+3?", "a": "6", "t": None, "l": None, "s": None},
    ]
    if listed:
        rows = [{**row, "a": [row["a"], "0"]} for row in rows]
    sources = [
        Source(path=jsonl(tmp_path / "a.jsonl", rows), problem="q", answer="a", tests="t", language="l", system="s"),
        Source(path=jsonl(tmp_path / "b.jsonl", [{"p": TURNS, "a": 2}]), problem="p", answer="a", kind="more"),
        Source(path="reasoning_gym", task="chain_sum", limit=2),
        Source(path="reasoning_gym", task="rush_hour", limit=1),  # a task without an answer
    ]
    asked = load_problems(sources)
    found, _ = kept(tmp_path, sources, [[0, 1], [1, 1], [1, 0], [0.0, 1.0], [0, 1], [1, 1], [0, 1]])
    source = Source(path=jsonl(tmp_path / "rows.jsonl", found), **KEPT)
    read = load_problems([source])
    expected = [asked[place] for place in (0, 2, 3, 4, 6)]
    assert [{name: row[name] for name in CARRIED} for row in read] == [
        {name: row[name] for name in CARRIED} for row in expected
    ]
    assert [row["kind"] for row in found] == ["math", "math", "more", "math", "math"]
    assert [row["source"] for row in found] == [row["source"] for row in expected]
    gold = read[3]["answer"][0] if listed else read[3]["answer"]
    assert accuracy(f"<answer>{gold}</answer>", read[3]) == 1 and accuracy("<answer>x</answer>", read[3]) == 0
    assert "task" in verifiers_of((), [source])


def test_prompts_are_counted_by_why_they_were_dropped(tmp_path):
    scores = [[0] * 5, [1, 0, 0, 0, 0], [1] * 4 + [0], [1] * 5, [None] * 5, [1, None, 0, 0, 0], [1, 0, 0, 0, 1]]
    rows, tally = kept(tmp_path, [numbered(tmp_path, 7, same=3)], scores)
    assert [row["provenance"]["prompt_id"] for row in rows] == [1, 5, 6]
    assert [row["pass_rate"] for row in rows] == [0.2, 0.25, 0.4]
    assert (tally.prompts, tally.samples, tally.tokens, tally.kept) == (7, 35, 175, 3)
    assert tally.dropped == {"too hard": 1, "seen before": 1, "too easy": 1, "unscorable": 1}
    assert list(tally.pass_rates.items()) == [("0.0", 1), ("0.2", 1), ("0.25", 1), ("0.4", 1), ("0.8", 1), ("1.0", 1)]


def test_rows_bounds_the_prompts_which_the_seed_draws(tmp_path):
    def ids(**fields):
        rows, tally = kept(tmp_path, [numbered(tmp_path, 20)], [[0, 1]] * 20, **fields)
        return [row["provenance"]["prompt_id"] for row in rows], tally.dropped

    assert ids() == (list(range(20)), {})
    first, dropped = ids(rows=5, seed=1)
    assert len(set(first)) == 5 and first != sorted(first) and dropped == {"enough of this generator": 15}
    assert ids(rows=5, seed=1)[0] == first != ids(rows=5, seed=2)[0]


def test_samples_of_other_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"`policy` was asked other prompts .* its sources have changed"):
        generator = Generator(name="policy", model=Model(path="tiny"), data=Data(sources=[numbered(tmp_path, 2)]))
        run = SampleRun(output_dir="x", generators=[generator], pass_rate=[0, 1])
        prompts = prompt_dataset(generator.data, load_template(generator.model, "chat"), 4096, 8)
        append_lines(tmp_path / "policy.jsonl", [line(0, "other?", 1)])
        list(select_prompts(run, generator, [tmp_path / "policy.jsonl"], prompts, set(), PromptTally()))


class Writer:
    """An engine whose samples of a prompt are these texts."""

    def __init__(self, template, texts: list[str]):
        self.replies = [template.tokenizer(text)["input_ids"] for text in texts]

    def stream(self, requests, sampling):
        for place, request in enumerate(requests):
            ids = self.replies[request.sample_index]
            yield place, Rollout(request, ids, [0.0] * len(ids), "stop", 0)


def test_programs_are_right_by_their_tests(tmp_path, pool):
    row = {"q": "Print twice the number.", "t": [*TESTS, {"stdin": "3", "stdout": "6"}], "l": "python"}
    source = Source(path=jsonl(tmp_path / "rows.jsonl", [row]), problem="q", tests="t", language="l", kind="code")
    asked = {"data": Data(sources=[source]), "sampling": Sampling(max_tokens=64)}
    generator = Generator(name="policy", model=Model(path="tiny"), **asked)
    run = SampleRun(output_dir="x", generators=[generator], pass_rate=[0.2, 0.8])
    job = sampling_job(run, 0)
    programs = ["print(2 * int(input()))", "print(2)", "print(", "n = int(input())\nprint(n + n)"]
    engine = Writer(job.template, [f"```python\n{program}\n```" for program in programs])
    append_lines(tmp_path / "policy.jsonl", list(lines_of(job, list(job.prompts), engine, pool)))
    (found,) = select_prompts(run, generator, [tmp_path / "policy.jsonl"], job.prompts, set(), PromptTally())
    assert found["pass_rate"] == 0.5 and json.loads(found["tests"]) == row["t"]


@pytest.mark.parametrize(
    ("fields", "generator", "message"),
    [
        ({"pass_rate": [0.8, 0.2]}, {}, "`pass_rate` is [0.8, 0.2]; it is [least, most]"),
        ({"pass_rate": [0.2, 1.2]}, {}, "both from 0 to 1"),
        ({"pass_rate": [0.2]}, {}, "`pass_rate`"),
        ({}, {"sampling": {"samples": 1}}, "rates are 0 or 1 here.\nRaise `generators.0.sampling.samples`"),
        ({"pass_rate": [0.4, 0.45]}, {}, "rates are multiples of 1/4 here"),
        ({}, {"sampling": {"temperature": 0}}, "Raise `generators.0.sampling.temperature`, which is 0"),
        ({"filters": {"format": False}}, {}, "the rows are prompts, and `filters` is of samples"),
        ({"mix": [{"path": "tiny_talk"}]}, {}, "`mix` is of samples"),
        ({}, {"refine": {}}, "`generators.0.refine` is of samples"),
        ({}, {"per_prompt": 2}, "`generators.0.per_prompt` is of samples"),
    ],
)
def test_a_filter_that_could_keep_nothing_or_ignore_a_field_is_refused(fields, generator, message):
    tree = {"output_dir": "x", "generators": [{**GENERATOR, **generator}], "pass_rate": [0.2, 0.8], **fields}
    with pytest.raises(UserError) as error:
        build(SampleRun, tree, "run.yaml")
    assert message in str(error.value) and str(error.value).startswith("run.yaml: ")
    assert len(str(error.value).splitlines()) <= 2


def test_what_may_be_asked_for():
    hard = {**GENERATOR, "sampling": {"samples": 1}}
    tree = {"output_dir": "x", "generators": [hard], "filters": {"language": "en"}, "rows": 5}
    assert build(SampleRun, {**tree, "pass_rate": [0, 0.5]}, "run.yaml").filters == Filters()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("print(1)", "an `entry` that is none"),
        ("{'task': 'chain_sum'}", "an `entry` that is none"),
        ("{'task': 'coin_flip', 'config': {}, 'item': {}}", "cannot be used: task `coin_flip` cannot be used"),
        ("{'task': 'chain_sum', 'config': {'max_term': 1}, 'item': {}}", "`config.max_term` is not a field"),
    ],
)
def test_an_entry_that_is_none_leaves_its_row_out(tmp_path, entry, message):
    path = jsonl(tmp_path / "rows.jsonl", [{"problem": "?", "entry": entry}])
    with pytest.raises(UserError, match="1 of 1 rows cannot be used") as error:
        load_problems([Source(path=path, problem="problem", entry="entry", kind="other")])
    assert message in str(error.value)


@pytest.mark.parametrize("path", ["someone/rows", "reasoning_gym", "rows.parquet"])
def test_an_entry_is_of_files_that_were_made_here(small_grpo, path):
    source = {"path": path, "entry": "entry", **({"task": "chain_sum"} if path == "reasoning_gym" else {})}
    with pytest.raises(UserError, match=r"`data.sources.0`: `entry` is of "):
        build(GRPORun, {**small_grpo, "data": {"sources": [source]}}, "run.yaml")


def test_an_entry_as_it_was_generated_is_one():
    (row,) = gym.rows(Source(path="reasoning_gym", task="chain_sum", limit=1))
    assert gym.checked_entry(row["entry"]) == row["entry"] and gym.checked_entry(None) is None
