"""A run that is killed, at any moment and again and again, ends in the weights that it would have come to.

Here at some moments, by one signal; `make chaos` kills each kind of run at the end of every step, and 40 times within.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_yaml
from safetensors.torch import load_file
from small_runs import RUNS, STEPS, Launch, Zygote

from r1dist.errors import EXIT_INTERRUPTED
from r1dist.run.checkpoints import checkpoints, damage, step_of

KILLS = int(os.environ.get("KILLS", "2"))  # within steps, of each kind of run
EVERY = int(os.environ.get("EVERY", "6"))  # steps between two kills at their end
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
PATIENCE = 300  # seconds; it ends a test that hangs


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def finished(zygote: Zygote, name: str, config: Path) -> None:
    script, _, processes = RUNS[name]
    launch = Launch(zygote, script, config, processes)
    assert launch.wait() == [0] * processes, launch.log.read_text()[-3000:]


def killed(zygote: Zygote, name: str, config: Path, moment: Callable[[], bool], delay: float = 0) -> bool:
    """Start the run and kill it `delay` seconds after `moment` is there; false if it had ended by then."""
    script, _, processes = RUNS[name]
    launch = Launch(zygote, script, config, processes)
    began = time.monotonic()
    while not moment() and not launch.ended():
        assert time.monotonic() - began < PATIENCE, launch.log.read_text()[-3000:]
        time.sleep(0.002)
    time.sleep(delay)
    if launch.ended():
        assert launch.wait() == [0] * processes, launch.log.read_text()[-3000:]
        return False
    launch.kill()
    return True


@pytest.fixture(scope="module", params=RUNS)
def whole(request, zygote, tmp_path_factory):
    """The name of a kind of run, its YAML, and the folder of one that nothing disturbed."""
    name = request.param
    folder = tmp_path_factory.mktemp("whole")
    config = write_yaml(folder / "run.yaml", {**RUNS[name][1], "output_dir": str(folder / "run")})
    finished(zygote, name, config)
    shutil.copytree(folder / "run", folder / "whole")
    return name, config, folder / "whole"


@pytest.fixture
def again(whole):
    """The same, with the run's folder empty again."""
    name, config, undisturbed = whole
    shutil.rmtree(config.parent / "run", ignore_errors=True)
    return name, config, undisturbed, config.parent / "run"


def assert_same(run: Path, undisturbed: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    for path in (undisturbed / f"checkpoint-{STEPS}").rglob("*optim*.pt"):
        same(torch.load(run / path.relative_to(undisturbed), weights_only=False), torch.load(path, weights_only=False))
    for path in (undisturbed / "traces").glob("*.jsonl"):
        assert (run / "traces" / path.name).read_text() == path.read_text()
    assert learnt(run) == learnt(undisturbed)
    assert not list(run.glob(".saving*")) and damage(run / f"checkpoint-{STEPS}") is None


def same(one, other) -> None:
    """Bit for bit, through whatever an optimizer's state is made of."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)


def learnt(run: Path) -> list[dict]:
    """What was logged of each step, without the clocks."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds/", "idle/", "memory/", "step_time", "train_", "total_flos")
    return [{key: value for key, value in line.items() if not key.startswith(clocks)} for line in lines]


def test_killed_at_the_end_of_steps(again, zygote):
    name, config, undisturbed, run = again
    for step in range(EVERY - 1 or 1, STEPS + 1, EVERY):
        killed(zygote, name, config, (run / f"checkpoint-{step}").exists)
    finished(zygote, name, config)
    assert_same(run, undisturbed)


def test_killed_within_steps(again, zygote):
    name, config, undisturbed, run = again
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"seed of the moments: {seed}")
    for kill in range(KILLS):
        # Each start is let come some way into the step after its first; one that was at the end begins anew.
        wanted = steps_logged(run) + 1
        was_cut = killed(zygote, name, config, lambda wanted=wanted: steps_logged(run) >= wanted, rng.uniform(0, 1))
        if not was_cut and kill < KILLS - 1:
            assert_same(run, undisturbed)
            shutil.rmtree(run)
    finished(zygote, name, config)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_from_there(again, zygote, number):
    name, config, undisturbed, run = again
    if EVERY > 1 and number != SIGNALS[list(RUNS).index(name) % 3]:
        pytest.skip("each kind of run has one of them; with `make chaos` all")
    script, _, processes = RUNS[name]
    launch = Launch(zygote, script, config, processes, "--save_steps", "100")
    while steps_logged(run) < 5:
        assert not launch.ended(), launch.log.read_text()[-3000:]
        time.sleep(0.002)
    if name.startswith("grpo"):  # the others' steps take hundredths of a second
        time.sleep(random.uniform(0, 0.3))
    launch.send(number)
    assert launch.wait() == [EXIT_INTERRUPTED] * processes, launch.log.read_text()[-3000:]
    said = launch.log.read_text()
    assert number.name in said and "is saved in" in said and "--resume auto continues" in said
    assert json.loads((run / "ended.json").read_text())["code"] == EXIT_INTERRUPTED
    assert max(step_of(checkpoint) for checkpoint in checkpoints(run)) >= 5
    finished(zygote, name, config)
    assert_same(run, undisturbed)


def test_a_finished_run_is_not_trained_any_further(whole, zygote):
    name, config, undisturbed = whole
    run = config.parent / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(undisturbed, run)
    finished(zygote, name, config)
    assert_same(run, undisturbed)


def test_the_reference_was_reset_and_the_order_is_another_in_each_epoch(whole):
    name, _, undisturbed = whole
    if not name.startswith("grpo"):
        pytest.skip("has neither")
    reference = load_file(undisturbed / f"checkpoint-{STEPS}" / "reference.safetensors")
    start = load_file(ROOT / "r1dist/tiny/base/model.safetensors")
    assert any(not torch.equal(reference[key], start[key]) for key in start)
    rows = [json.loads(line) for path in (undisturbed / "traces").glob("*") for line in path.read_text().splitlines()]
    by_epoch = [[row["prompt_id"] for row in rows if row["step"] // 4 == epoch] for epoch in range(3)]
    assert sorted(set(by_epoch[0])) == list(range(8))
    dropped = {
        line["step"]: line["curriculum/dropped"] for line in learnt(undisturbed) if "curriculum/dropped" in line
    }
    assert list(dropped) == [1, 5, 9] and dropped[1] == 0 < dropped[5] < 1
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
