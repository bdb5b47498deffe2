"""Evaluation by a real vLLM server: what a kill changes, and what training does not notice."""

import json
import subprocess
import time

import pytest
from conftest import GSM8K, ROOT, kill_launched, launch, metrics, python, write_yaml
from small_runs import served

from r1dist.files import greedy_answers, samples_folder


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """The endpoints file of a server with the weights that it loaded, until the last test here."""
    path = tmp_path_factory.mktemp("serve") / "endpoints.json"
    with served(path, "--max_model_len", "512", "--max-num-seqs", "64"):
        yield path


def test_an_evaluation_by_servers_is_that_in_process(serving, tmp_path):
    texts = {}
    servers = ("--rollout.engine", "vllm", "--rollout.servers", serving)
    for engine in (servers, ("--rollout.engine", "transformers")):
        output = tmp_path / f"{engine[1]}.json"
        done = launch("evaluate.py", *engine, "--data.sources.0.limit", "24", "--output", output)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sampled"]["problems"] == 24
        texts[engine[1]] = [row["text"] for row in greedy_answers(output)]
    assert len(texts["vllm"]) == 24
    # Greedy completions of the two may part where two tokens are equally likely up to rounding.
    assert sum(a == b for a, b in zip(*texts.values(), strict=True)) >= 22


@pytest.mark.skipif(not GSM8K.exists(), reason="the benchmarks' files are not beside this checkout")
def test_benchmarks_by_servers_killed_twice_are_those_undisturbed(serving, tmp_path):
    files = {"gsm8k": GSM8K / "test.jsonl", "math500": GSM8K.parent / "math500" / "test.jsonl"}
    tree = {
        "model": {"path": "tiny"},
        "benchmarks": [{"name": name, "path": str(path), "limit": 60} for name, path in files.items()],
        "sampling": {"samples": 3, "max_tokens": 24},
        "rollout": {"engine": "vllm", "servers": str(serving)},
    }
    config = write_yaml(tmp_path / "evaluate.yaml", tree)

    def lines(output) -> int:
        return sum(path.read_text().count("\n") for path in samples_folder(output).glob("*.jsonl"))

    undisturbed, killed = tmp_path / "undisturbed.json", tmp_path / "killed.json"
    done = launch("evaluate.py", "--config", config, "--output", undisturbed)
    assert done.returncode == 0, done.stderr
    for number in (10, 70):
        process = subprocess.Popen([python(), "launch/evaluate.py", "--config", config, "--output", killed], cwd=ROOT)
        while lines(killed) < number:
            assert process.poll() is None
            time.sleep(0.01)
        kill_launched()
        process.wait()
    assert lines(killed) < lines(undisturbed)
    done = launch("evaluate.py", "--config", config, "--output", killed)
    assert done.returncode == 0, done.stderr
    for path in samples_folder(undisturbed).glob("*.jsonl"):
        both = [sorted(folder.read_text().splitlines()) for folder in (path, samples_folder(killed) / path.name)]
        assert both[0] == both[1]
    assert json.loads(killed.read_text()) == json.loads(undisturbed.read_text())


def test_an_evaluation_during_training_by_servers_leaves_the_weights(serving, small_grpo, tmp_path):
    rollout = {"engine": "vllm", "servers": str(serving), "transport": "shm"}
    tree = {**small_grpo, "rollout": rollout, "max_completion_length": 24}
    problems = [{"name": "tiny", "sources": [{"path": "tiny", "split": "test", "limit": 4}]}]
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "data": {**tree["data"], "eval": problems}}
    weights = {}
    for name, fields in (("with", evaluated), ("without", {})):
        config = write_yaml(tmp_path / f"{name}.yaml", {**tree, **fields, "output_dir": str(tmp_path / name)})
        done = launch("grpo.py", "--config", config)
        assert done.returncode == 0, done.stderr
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["with"] == weights["without"]
    assert sum("eval/tiny/accuracy" in line for line in metrics(tmp_path / "with")) == 2
