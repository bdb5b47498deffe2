"""Other people's harnesses on the endpoint of launch/serve.py: they find what our evaluation finds.

They live in an environment of their own, which `make harnesses` makes.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, launch, write_yaml
from small_runs import served

from r1dist.generation.vllm.endpoints import read
from r1dist.tiny.problems import generate

HARNESSES = ROOT / ".venv-harnesses" / "bin"
PROBLEMS, MAX_TOKENS = 200, 24
NEAR_TIES = 3
"""Problems on which two greedy answers may differ: a batch of other sizes rounds otherwise."""

pytestmark = pytest.mark.skipif(not HARNESSES.exists(), reason="`make harnesses` has not been called")

LM_EVAL = {
    "task": "digits",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{problem}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": MAX_TOKENS},
    "filter_list": [
        {
            "name": "last number",
            "filter": [
                {"function": "regex", "regex_pattern": "(-?[0-9]+)", "group_select": -1},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def digits(path: str) -> Task:
    rows = json_dataset(path, FieldSpec(input="problem", target="answer"))
    return Task(dataset=rows, solver=generate(), scorer=match(numeric=True))
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = ({"problem": row["problem"], "answer": row["answer"]} for row in generate(PROBLEMS, 0, "test"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "endpoints.json"
    with served(path, "--max_model_len", "512", "--max-num-seqs", "64", "--served-model-name", "tiny"):
        yield path


@pytest.fixture(scope="module")
def own(serving, problems) -> float:
    """What launch/evaluate.py finds."""
    source = {"path": str(problems), "problem": "problem", "answer": "answer"}
    tree = {
        "model": {"path": "tiny"},
        "data": {"sources": [source], "template": "chat"},
        "modes": ["greedy"],
        "sampling": {"max_tokens": MAX_TOKENS},
        "rollout": {"engine": "vllm", "servers": str(serving)},
    }
    done = launch("evaluate.py", "--config", write_yaml(problems.with_name("evaluate.yaml"), tree))
    assert done.returncode == 0, done.stderr
    accuracy = json.loads(done.stdout)["greedy"]["accuracy"]
    assert 0.02 < accuracy < 0.5  # that it can be told from answering nothing, and from any answer being right
    return accuracy


def ask(folder: Path, tool: str, *words: object, **environment: str) -> None:
    """Run `tool` in `folder`, where it writes."""
    command = [HARNESSES / tool, *words]
    done = subprocess.run(
        [*map(str, command)], env={**os.environ, **environment}, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lm_evaluation_harness_agrees(serving, problems, own, tmp_path):
    endpoints = read(serving)
    write_yaml(tmp_path / "digits.yaml", {**LM_EVAL, "dataset_kwargs": {"data_files": {"test": str(problems)}}})
    url = f"{endpoints.servers[0].url}/v1/chat/completions"
    ask(
        tmp_path, "lm_eval", "--model", "local-chat-completions", "--tasks", "digits", "--include_path", tmp_path,
        "--model_args", f"base_url={url},model=tiny,num_concurrent=16,eos_string=<|im_end|>",
        "--apply_chat_template", "--output_path", tmp_path / "results",
        OPENAI_API_KEY=endpoints.token,
    )  # fmt: skip
    (path,) = (tmp_path / "results").rglob("*.json")
    found = json.loads(path.read_text())["results"]["digits"]["exact_match,last number"]
    assert abs(found - own) <= NEAR_TIES / PROBLEMS


def test_inspect_agrees(serving, problems, own, tmp_path):
    endpoints = read(serving)
    (tmp_path / "digits.py").write_text(INSPECT)
    ask(
        tmp_path, "inspect", "eval", "digits.py", "-T", f"path={problems}", "--model", "openai-api/server/tiny",
        "--temperature", 0, "--max-tokens", MAX_TOKENS, "--max-connections", 16,
        "--display", "none", "--log-format", "json", "--log-dir", tmp_path / "results",
        SERVER_BASE_URL=f"{endpoints.servers[0].url}/v1", SERVER_API_KEY=endpoints.token,
    )  # fmt: skip
    (path,) = (tmp_path / "results").glob("*.json")
    (scores,) = json.loads(path.read_text())["results"]["scores"]
    assert abs(scores["metrics"]["accuracy"]["value"] - own) <= NEAR_TIES / PROBLEMS
