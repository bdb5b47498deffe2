"""The wheel, installed where no checkout is beside it: a checkout's launchers find their own folders."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL_GRPO, metrics, write_yaml

from r1dist.cluster.shapes import KNOWN_SHAPES

LAUNCHERS = {
    "r1_zero": "grpo", "reasoning_rl": "grpo", "final_rl": "grpo", "small_r1_zero": "grpo", "sft": "sft",
    "distill": "sft", "reward": "reward_model", "cold_start": "sample", "rejection_sampling": "sample",
    "evaluate": "evaluate", "pipeline": "pipeline",
}  # fmt: skip
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# All of them in one process: most of a launch is its imports.
DRIVER = """
import contextlib, io, json, runpy, sys, traceback
results = []
for words in json.load(sys.stdin):
    sys.argv, code = words, 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = traceback.format_exc()
    results.append([words, code, out.getvalue(), err.getvalue()])
import r1dist
print(json.dumps([r1dist.__file__, results]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a checkout has besides the package, launch/ and configs/, and the shapes of models that recipes name."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for recipe in folder.glob("configs/recipes/*/*.yaml"):
        named = set(re.findall(r"\bpath: ([\w./-]+)", recipe.read_text()))
        size = "7B" if recipe.parent.name == "qwen2.5-7b" else "0.5B"
        for path in named - KNOWN_SHAPES.keys():
            if path.startswith(("runs/", "models/")) or re.search(r"-\d+(\.\d+)?[BM]\b", path):
                KNOWN_SHAPES[f"Qwen/Qwen2.5-{size}"].save_pretrained(folder / path)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment with the wheel, which takes all other packages from this one."""
    source, wheels, env = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "env"))
    shutil.copytree(ROOT / "r1dist", source / "r1dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, "wheel", str(source), *options], check=True)
    venv.create(env, symlinks=True, with_pip=False)
    python = env / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", *wheels.glob("*.whl")]
    subprocess.run(install, env=ENVIRONMENT, check=True)
    installed = next(env.glob("lib/python*/site-packages"))
    (installed / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def documented() -> list[list[str]]:
    """The README's commands for one GPU that need no model of an earlier one."""
    part = (ROOT / "README.md").read_text().partition("\n## Quickstart: one GPU")[2].partition("\n## ")[0]
    lines = re.findall(r"^(?:python|accelerate launch) (launch/[^#\n]*)", part, re.MULTILINE)
    assert len(lines) >= 3
    commands = [shlex.split(line) for line in lines if "runs/" not in line]
    return [words if "--dry_run" in words else [*words, "--dry_run"] for words in commands]


def test_every_launcher_and_recipe_can_be_planned(python, checkout):
    words = []
    for recipe in sorted(checkout.glob("configs/recipes/*/*.yaml")):
        script = next(script for name, script in LAUNCHERS.items() if recipe.stem.startswith(name))
        words.append([f"launch/{script}.py", "--config", str(recipe.relative_to(checkout)), "--dry_run"])
        if script in ("grpo", "sft", "reward_model", "sample"):
            words.append(["launch/job.py", script, *words[-1][1:]])
            placed = "--placement.gpus_per_node=8", "--placement.gpu_gib=80"
            words.append([*words[-1], *placed])
            words.append([*words[-2], *placed, "--placement.nodes=2"])
    words += [[f"launch/{name}.py", "--dry_run"] for name in ("grpo", "sft", "reward_model", "sample", "evaluate")]
    words += [["launch/pipeline.py", "--dry_run", "--launcher", "job"], ["launch/job.py", "pipeline", "--dry_run"]]
    words += [["launch/pipeline.py", "--dry_run", "--slurm", kind] for kind in ("job", "chain")]
    words.append(["launch/serve.py", "--model.path", "tiny", "--endpoints", "none.json", "--dry_run"])
    words += [["launch/check.py"], *documented()]
    done = subprocess.run(
        [python, "-c", DRIVER], cwd=checkout, env=ENVIRONMENT, input=json.dumps(words), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package, results = json.loads(done.stdout)
    assert Path(package).is_relative_to(python.parents[1])
    failed = [f"{code}: {' '.join(words)}\n{err}" for words, code, _, err in results if code]
    assert not failed, "\n".join(failed)
    for words, _, out, _ in results:
        named = {word for word in out.split() if word.startswith("/") and word.endswith((".py", ".yaml", ".slurm"))}
        assert all(Path(word).exists() for word in named), (words, named)
        planned = words[0] in ("launch/job.py", "launch/pipeline.py")
        assert not planned or named, words  # the commands that it would start


def test_the_command_needs_no_checkout(python, tmp_path):
    """In an empty folder the recipes are those of the wheel, by their names, and DeepSpeed finds its file."""
    words = ["pipeline", "--config", "tiny/pipeline", "--until", "r1_zero", "--dry_run"]
    done = command(python, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    named = {Path(word) for word in done.stdout.split() if word.endswith((".py", ".yaml", ".json")) and word[0] == "/"}
    assert {path.name for path in named} >= {"grpo.py", "r1_zero.yaml", "zero2_cpu.yaml", "zero2.json"}
    assert all(path.exists() and path.is_relative_to(python.parents[1]) for path in named)
    absent = command(python, tmp_path, "grpo", "--config", "tiny/r1_zer")
    assert absent.returncode == 2 and "no recipe of that name; did you mean `tiny/r1_zero`?" in absent.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_by_job_trains_without_a_checkout(python, tmp_path):
    tree = {**SMALL_GRPO, "max_steps": 1, "output_dir": "run", "placement": {"gpus_per_node": 0}}
    write_yaml(tmp_path / "grpo.yaml", tree)
    done = command(python, tmp_path, "job", "grpo", "--config", "grpo.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "model.safetensors").exists()
    assert yaml.safe_load((tmp_path / "run" / "run.json").read_text())["launcher"] == "grpo"


def command(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`r1dist *words`, typed in `folder`."""
    script = [python.with_name("r1dist"), *words]
    return subprocess.run(script, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
