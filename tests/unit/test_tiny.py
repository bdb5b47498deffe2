"""The embedded base model is what its code says it is, and behaves like a raw base model."""

import functools
import itertools
import json
import re
from dataclasses import asdict

import pytest
from build import CONFIGS, PHASES, BuildConfig, fingerprint
from conftest import ROOT
from corpus import FIRST_HABITS, LAST_HABITS, chat_prompt, documents
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from r1dist.config import Data, EvaluateRun
from r1dist.config.loader import parse
from r1dist.data.prompts import prompt_dataset
from r1dist.data.templates import load_template
from r1dist.evaluation.scores import measures, scores_of
from r1dist.generation.engine import Sampling
from r1dist.generation.local import load_engine
from r1dist.rewards.language import language_share
from r1dist.sampling.draw import SamplingJob, lines_of
from r1dist.tiny import EMBEDDED, talk
from r1dist.tiny.problems import Problem, generate
from r1dist.tiny.worked import rows


@pytest.mark.parametrize("name", EMBEDDED)
def test_code_and_file_have_not_parted(name):
    with safe_open(EMBEDDED[name] / "model.safetensors", "pt") as file:
        made_by = file.metadata()
    config = CONFIGS[name]
    assert json.loads(made_by["build"]) == json.loads(json.dumps(asdict(config)))
    assert made_by["fingerprint"] == fingerprint(config), "r1dist/tiny has changed: rebuild with `make base`"


def test_another_configuration_has_another_fingerprint():
    assert fingerprint(BuildConfig(phases=PHASES[:1])) != fingerprint(BuildConfig())


def test_size(base_model):
    assert 1e6 <= base_model.num_parameters() <= 3e6
    assert sum(file.stat().st_size for folder in EMBEDDED.values() for file in folder.iterdir()) <= 6e6
    small = AutoModelForCausalLM.from_pretrained(EMBEDDED["tiny-small"])
    assert small.num_parameters() < base_model.num_parameters() / 3
    assert base_model.config.model_type == "qwen2"


def test_problems_are_worked_from_left_to_right():
    problem = Problem(7, ("*3", "+4", "*9"))
    assert problem.steps == [(7, "*3", 1), (1, "+4", 5), (5, "*9", 5)]
    assert problem.answer == str(((7 * 3 + 4) * 9) % 10)


def test_train_and_test_are_disjoint_for_any_seeds():
    train = {row["problem"] for seed in range(3) for row in generate(3000, seed, "train")}
    test = {row["problem"] for seed in range(3) for row in generate(1000, seed, "test")}
    assert len(train) > 8000 and len(test) > 2500
    assert not train & test


@pytest.mark.parametrize("habits", [FIRST_HABITS, LAST_HABITS])
def test_the_corpus_holds_no_test_problem(habits):
    for text in itertools.islice(documents(0, habits), 3000):
        start, operations = re.search(r"Start with (\d), then ([^:.]*)[:.]", text).groups()
        assert Problem(int(start), tuple(operations.split())).split == "train"


def test_the_prose_holds_no_test_request_and_no_refusal():
    texts = list(itertools.islice(talk.prose(0), 3000))
    for request in talk.questions(0, "test", unsafe=None):
        assert not any(text.startswith(request.question) for text in texts)
    assert not any(talk.DECLINED in text or talk.USELESS in text for text in texts)


def test_answers_cannot_be_guessed():
    answers = [row["answer"] for row in generate(5000, 0, "test")]
    assert max(answers.count(str(digit)) for digit in range(10)) < 0.13 * len(answers)


def test_chat_template_is_the_corpus_own(tokenizer):
    messages = [{"role": "user", "content": "Start with 7"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == chat_prompt("Start with 7")
    for document in itertools.islice(documents(1, FIRST_HABITS), 50):
        assert tokenizer.decode(tokenizer(document)["input_ids"]) == document


def test_worked_rows_are_right_and_in_english():
    for row in rows(50, 0, "train"):
        assert row["completion"].endswith(f"<answer>{row['answer']}</answer>")
        assert row["completion"].count("ends in") == row["operations"]
        assert language_share(row["completion"], "en") == 1.0


@pytest.fixture(scope="module")
def scores(template, pool):
    run = parse(EvaluateRun, ["--config", str(ROOT / "configs/recipes/tiny/evaluate.yaml")])
    run.data.sources[0].limit = 300
    dataset = prompt_dataset(Data(sources=run.data.sources), template, 512, run.sampling.max_tokens)
    engine = load_engine(run.model, template, 256)

    def scores(sampling, samples):
        return scored(run, template, dataset, sampling, samples, engine, pool)

    return scores(Sampling(112, temperature=0), 1), scores(Sampling(112), 4)


def scored(run, template, prompts, sampling, samples, engine, pool):
    measure = functools.partial(measures, target="en")
    job = SamplingJob("base", prompts, template, sampling, samples, seed=0, measure=measure)
    return scores_of(list(lines_of(job, list(prompts), engine, pool)), pool)


def test_asked_the_base_mostly_answers_at_once_and_is_mostly_wrong(scores):
    greedy, sampled = scores
    assert greedy.accuracy < 0.2 and greedy.mean_tokens < 20
    assert 0.1 <= sampled.accuracy <= 0.4
    assert 0.05 <= sampled.format <= 0.6
    assert 0.5 < sampled.language < 0.97


def test_thinking_pays(pool):
    """Started on a chain, the base is far better than asked; and chains leave room to improve."""
    run = parse(EvaluateRun, ["--config", str(ROOT / "configs/recipes/tiny/evaluate.yaml")])
    run.data.sources[0].limit = 200
    template = load_template(run.model, "chat", prefill="<think>Let me work it out.")
    started = prompt_dataset(Data(sources=run.data.sources), template, 512, 112)
    engine = load_engine(run.model, template, 256)
    scores = scored(run, template, started, Sampling(112, temperature=0), 1, engine, pool)
    assert 0.6 <= scores.accuracy <= 0.95
