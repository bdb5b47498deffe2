"""Fixtures: the shipped base model, small YAMLs, and launchers run as a user runs them."""

import copy
import functools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run beside each other: threads of two programs that wait for each other's on one core take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]

# DeepSpeed's extension is built anew, for a minute, whenever another environment's paths were built last.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / "build" / "torch_extensions"))
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

sys.path += [str(ROOT / "tools"), str(ROOT / "tools" / "build_tiny")]

# They need root and daemons of their own: `make test-slurm`.
collect_ignore = [] if "CLUSTER_TESTS" in os.environ else ["cluster"]


def pytest_collection_modifyitems(items):
    """The folder of a test is its marker: unit, integration, servers or cluster."""
    for item in items:
        item.add_marker(item.path.relative_to(ROOT / "tests").parts[0])


# A GRPO run of seconds: 32 rollouts of at most 48 tokens a step, from the shipped base model.
SMALL_GRPO = {
    "model": {"path": "tiny"},
    "data": {"sources": [{"path": "tiny", "limit": 256}], "template": "chat"},
    "rollout": {"engine": "transformers", "batch_size": 32},
    "seed": 0,
    "max_steps": 2,
    "learning_rate": 1e-4,
    "num_generations": 8,
    "per_device_train_batch_size": 32,
    "max_completion_length": 48,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


def write_yaml(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def launch(script: str, *arguments: str, accelerate: tuple[str, ...] | None = None) -> subprocess.CompletedProcess:
    """Run `launch/<script>` from the project's root, plainly or under `accelerate launch <accelerate>`."""
    launcher = [] if accelerate is None else ["-m", "accelerate.commands.launch", *accelerate]
    return _run([*launcher, f"launch/{script}", *map(str, arguments)])


def torchrun(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run `launch/<script>` in two processes without DeepSpeed."""
    return _run(["-m", "torch.distributed.run", "--nproc_per_node", "2", f"launch/{script}", *map(str, arguments)])


def _run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([python(), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def python() -> str:
    """What stands in for Python and starts a launcher in a moment: see zygote.py. The launcher ends with it, and gets
    its signals, but has another process id, and is no child of it."""
    return str(zygote_of_session().python)


def launched(recursive: bool = False) -> list[psutil.Process]:
    """What `python()` has started and what that has started in the same way; `recursive`: and in any other."""
    return psutil.Process(zygote_of_session().process.pid).children(recursive)


def kill_launched() -> None:
    for process in launched(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended by itself a moment ago
            process.kill()


@functools.cache
def zygote_of_session():
    from small_runs import Zygote

    return Zygote()


def metrics(folder: Path) -> list[dict]:
    """The logged steps of a run; the last line, the summary of the whole training, is left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train_runtime" not in line]


@pytest.fixture
def small_grpo(tmp_path) -> dict:
    return {**copy.deepcopy(SMALL_GRPO), "output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def pool():
    """The worker processes that verify answers, but those of a task: reasoning-gym takes long to import."""
    from r1dist.config import Verify
    from r1dist.rewards import VERIFIERS
    from r1dist.rewards.pool import Pool

    with Pool({name: VERIFIERS[name] for name in VERIFIERS.keys() - {"task"}}, Verify(workers=2)) as pool:
        yield pool


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from r1dist.tiny import BASE_DIR

    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture(scope="session")
def template():
    """The shipped base model's chat template."""
    from r1dist.config import Model
    from r1dist.data.templates import load_template

    return load_template(Model(path="tiny"), "chat")


@pytest.fixture(scope="session")
def base_model():
    from transformers import AutoModelForCausalLM

    from r1dist.tiny import BASE_DIR

    return AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="float32").eval()


@pytest.fixture(scope="session")
def zygote():
    """Starts launchers in a moment."""
    return zygote_of_session()


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub, which the client asks with a token that may write."""
    from huggingface_hub import constants
    from stub_hub import StubHub

    from r1dist.publish import licences

    with StubHub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        licences._licence.cache_clear()
        yield stub
        licences._licence.cache_clear()


@pytest.fixture
def namespaces():
    """Two machines, as far as the network goes."""
    from machines import Namespaces

    namespaces = Namespaces()
    yield namespaces
    namespaces.remove()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A SLURM of two nodes."""
    from machines import Slurm

    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
