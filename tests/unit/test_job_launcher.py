"""The commands that launch/job.py starts, as the launchers that get them read them."""

import pytest
from conftest import ROOT, write_yaml

from r1dist.cluster.allocation import Cluster
from r1dist.cluster.job_launcher import JobLauncher
from r1dist.config import EvaluateRun, SampleRun
from r1dist.config.loader import parse
from r1dist.errors import UserError

HERE = Cluster(None, ("localhost",), ("127.0.0.1",))
TWO_NODES = Cluster("7", ("n1", "n2"), ("10.0.0.1", "10.0.0.2"))
SAMPLE = {
    "generators": [
        {"name": "only", "model": {"path": "Qwen/Qwen2.5-7B"}, "data": {"sources": [{"path": "tiny", "limit": 8}]}}
    ],
    "placement": {"gpus_per_node": 8, "gpu_gib": 80},
}


def planned(tmp_path, cluster: Cluster, *arguments: str) -> list[str]:
    """The words of the command that samples."""
    file = write_yaml(tmp_path / "sample.yaml", {**SAMPLE, "output_dir": str(tmp_path / "out")})
    job = JobLauncher("sample", ["--config", str(file), *arguments], cluster, [])
    return job._work(29500)


@pytest.mark.parametrize("cluster", [HERE, TWO_NODES])
def test_the_in_process_engine_samples_in_a_process_for_each_gpu(tmp_path, cluster):
    words = planned(tmp_path, cluster, "--rollout.engine", "transformers")
    script = words.index(str(ROOT / "launch" / "sample.py"))
    assert words[words.index("--nproc_per_node") + 1] == "8" and "torch.distributed.run" in words[:script]
    run = parse(SampleRun, words[script + 1 :])
    assert run.shard == 64 and run.rollout.serve.replicas == 1
    assert (words[0] == "srun") == (cluster is TWO_NODES)


@pytest.mark.parametrize(
    ("cluster", "gib", "servers", "shard"),
    [(HERE, "80", (8, 1), None), (HERE, "16", (4, 2), None), (TWO_NODES, "80", (8, 1), 64)],
)
def test_servers_that_sample_take_every_gpu_of_a_node(tmp_path, cluster, gib, servers, shard):
    words = planned(tmp_path, cluster, "--rollout.engine", "vllm", "--placement.gpu_gib", gib)
    script = words.index(str(ROOT / "launch" / "sample.py"))
    assert "torch.distributed.run" not in words
    run = parse(SampleRun, words[script + 1 :])
    assert (run.rollout.serve.replicas, run.rollout.serve.tensor_parallel) == servers and run.shard == shard
    assert planned(tmp_path, cluster, "--shard", "16").count("--shard") == 1


@pytest.mark.parametrize(("engine", "processes"), [("transformers", 8), ("vllm", 1)])
def test_evaluations_use_every_gpu_of_every_node(tmp_path, engine, processes):
    arguments = ["--model.path", "Qwen/Qwen2.5-7B", "--benchmarks", "gsm8k", "--rollout.engine", engine]
    arguments += ["--placement.gpus_per_node", "8", "--placement.gpu_gib", "80"]
    with pytest.raises(UserError, match="output: name the file for the scores"):
        JobLauncher("evaluate", arguments, TWO_NODES, [])
    output = str(tmp_path / "scores.json")
    job = JobLauncher("evaluate", [*arguments, "--output", output], TWO_NODES, [])
    words = job._work(29500)
    run = parse(EvaluateRun, words[words.index(str(ROOT / "launch" / "evaluate.py")) + 1 :])
    assert run.shard == 64 and run.output == output and run.rollout.serve.replicas == (8 if processes == 1 else 1)
    assert ("torch.distributed.run" in words) == (processes > 1) and job.logs.parent == tmp_path / "scores.samples"


def test_a_training_that_asks_for_cpus_is_placed_on_them(tmp_path, small_grpo, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("r1dist.cluster.allocation.require_usable_gpu", lambda: None)
    file = write_yaml(tmp_path / "grpo.yaml", {**small_grpo, "use_cpu": True})
    job = JobLauncher("grpo", ["--config", str(file)], HERE, [])
    assert job.placement.machines.gpus == 0
