"""Verification in workers: what one item does costs that item alone, and an outage is nobody's zero."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT
from machines import until
from verifiers import VERIFIERS, slow

from r1dist.config import Reward, Verify
from r1dist.errors import VerifiersBroken
from r1dist.rewards import VERIFIERS as REAL
from r1dist.rewards import Rewards
from r1dist.rewards.pool import Pool
from r1dist.run.stopping import Watchdog


@pytest.fixture(scope="module")
def obedient():
    with Pool(VERIFIERS, Verify(workers=2, seconds=1, memory_mib=256)) as pool:
        pool.scores("obey", ["fine"] * 2, [{}] * 2)  # up
        yield pool


def items(count: int) -> tuple[list[str], list[dict]]:
    rng = random.Random(count)
    return [str(rng.random()) for _ in range(count)], [{"answer": str(rng.randrange(10))} for _ in range(count)]


def test_scores_do_not_depend_on_the_number_of_workers():
    texts, rows = items(2000)
    found = []
    for workers in (1, 4):
        with Pool(VERIFIERS, Verify(workers=workers)) as pool:
            found.append(pool.scores("digest", texts, rows))
    assert found[0] == found[1] == [VERIFIERS["digest"](*pair) for pair in zip(texts, rows, strict=True)]


@pytest.mark.parametrize("order", ["sleep", "eat", "die"])
def test_a_bad_item_is_worth_nothing_and_costs_its_own_limit(obedient, order):
    began = time.monotonic()
    texts = ["fine", order, *["fine"] * 50]
    assert obedient.scores("obey", texts, [{}] * 52) == [1.0, 0.0, *[1.0] * 50]
    assert obedient.scores("obey", [order], [{"unscorable": True}]) == [None]
    assert time.monotonic() - began < 300  # far below what it would have slept
    assert obedient.counts["overran"] >= 2


def test_a_spare_is_there_before_a_worker_is_given_up_and_nobody_misses_one_that_was_killed():
    with Pool(VERIFIERS, Verify(workers=1, seconds=4)) as pool:
        for kill in (False, True):
            assert pool.scores("obey", ["fine"], [{}]) == [1.0]
            known = set(workers_of_this_process())
            slow = pool.submit("obey", "sleep", {})
            until(lambda known=known: set(workers_of_this_process()) - known, 60, "a spare")
            assert pool.counts["overran"] == kill
            if kill:
                (set(workers_of_this_process()) - known).pop().kill()
            assert slow.result(60) == 0.0
        assert pool.counts["overran"] == 2 and not pool.counts["broken"]
    assert not set(workers_of_this_process()) - known


def test_the_others_go_on_beside_it(obedient):
    slow = obedient.submit("obey", "sleep", {})
    began = time.monotonic()
    assert obedient.scores("obey", ["fine"] * 100, [{}] * 100) == [1.0] * 100
    assert not slow.done() or time.monotonic() - began > 1
    assert slow.result() == 0.0


def test_an_item_whose_worker_somebody_killed_is_asked_again(obedient, tmp_path):
    died = obedient.counts["died"]
    assert obedient.scores("obey", [f"die once {tmp_path / 'mark'}"], [{}]) == [1.0]
    assert obedient.counts["died"] == died + 1


def test_workers_killed_at_random_change_no_score():
    texts, rows = items(4000)
    expected = [VERIFIERS["digest"](*pair) for pair in zip(texts, rows, strict=True)]
    rng, over, killed, scored = random.Random(), threading.Event(), [], []

    def scores(pool):
        futures = [pool.submit("digest", *pair) for pair in zip(texts, rows, strict=True)]
        for future in futures:
            future.add_done_callback(scored.append)
        return [future.result() for future in futures]

    def kill():
        scored_before = 0
        while not over.wait(rng.uniform(0.02, 0.2)):
            # On a machine so slow that a start takes longer than the time between two kills none would ever start.
            if len(scored) == scored_before:
                continue
            scored_before = len(scored)
            # A worker may end between the listing and the kill.
            with contextlib.suppress(psutil.NoSuchProcess):
                if workers := workers_of_this_process():
                    rng.choice(workers).kill()
                    killed.append(1)

    with Pool(VERIFIERS, Verify(workers=3)) as pool:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            found = [scores(pool) for _ in range(3)]
        finally:
            over.set()
            killer.join()
        assert pool.counts["died"] > 2
    assert len(killed) > 3 and found == [expected] * 3


def workers_of_this_process() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    """A child of the fork server; the fork server itself and the resource tracker are children of this process."""
    try:
        return process.ppid() != os.getpid() and process.parent().ppid() == os.getpid()
    except psutil.NoSuchProcess:
        return False


def test_a_bug_in_a_verifier_is_not_hidden(obedient):
    with pytest.raises(ZeroDivisionError, match="a bug"):
        obedient.scores("obey", ["raise"], [{}])
    assert obedient.scores("obey", ["fine"], [{}]) == [1.0]


def test_what_is_down_is_waited_for(tmp_path):
    with Pool(VERIFIERS, Verify(workers=2, retry_timeout=60)) as pool:
        future = pool.submit("obey", f"wait for {tmp_path / 'sandbox'}", {})
        time.sleep(2)
        assert not future.done()
        (tmp_path / "sandbox").touch()
        assert future.result(timeout=120) == 1.0 and pool.counts["broken"] >= 1


def test_past_its_limit_every_item_is_an_error_and_none_is_a_zero(tmp_path):
    with Pool(VERIFIERS, Verify(workers=2, retry_timeout=3)) as pool:
        began = time.monotonic()
        futures = [pool.submit("obey", f"wait for {tmp_path / 'sandbox'}", {}) for _ in range(40)]
        errors = [future.exception() for future in futures]
        assert time.monotonic() - began < 120
        assert all(re.fullmatch(r"the sandbox is down. \(tried for \d+ s\)", str(error)) for error in errors)
        assert all(isinstance(error, VerifiersBroken) for error in errors)


def test_only_what_will_be_asked_for_begins(pool):
    row = {"answer": "2", "kind": "math", "prompt_id": 1, "tokens": 1, "group_tokens": [1]}
    rewards = Rewards({"accuracy": Reward(kinds=["math"], from_step=5), "format": Reward()}, pool)
    rewards.begin((0, 1, 0), 4, "<answer>2</answer>", row)
    rewards.begin((0, 1, 1), 5, "<answer>2</answer>", {**row, "kind": "talk"})
    assert not rewards._pending
    rewards.begin((0, 1, 2), 5, "<answer>2</answer>", row)
    assert len(rewards._pending) == 1
    assert rewards.score([(0, 1, 2)], 5, ["<answer>2</answer>"], [row])["accuracy"] == [1.0] and not rewards._pending


def test_waiting_for_verification_is_a_sign_of_life(tmp_path):
    """8 answers of half a second on one worker, and a watchdog that allows 1.5 s."""
    with Pool({"accuracy": slow}, Verify(workers=1)) as pool:
        rewards = Rewards({"accuracy": Reward()}, pool)
        pool.scores("accuracy", [""], [{}])  # the worker is up
        ids = [(0, n, 0) for n in range(8)]
        for rollout_id in ids:
            rewards.begin(rollout_id, 0, "x", {"kind": "math"})
        stop = SimpleNamespace(request=lambda number: pytest.fail("the watchdog ended a healthy run"))
        watchdog = Watchdog(1.5, tmp_path, 0, stop)
        with watchdog.watching():
            assert rewards.wait(ids, watchdog.heartbeat) is None
    assert not (tmp_path / "stacks-rank0.txt").exists()


def test_no_worker_outlives_a_killed_trainer():
    code = (
        "import sys, time; sys.path.insert(0, 'tests')\n"
        "from verifiers import VERIFIERS; from r1dist.config import Verify; from r1dist.rewards.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool(VERIFIERS, Verify(workers=2)); pool.scores('obey', ['fine'] * 9, [{}] * 9)\n"
        "    pool.submit('obey', 'sleep', {}); print('up', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_real_answers_by_one_and_by_four_workers():
    rng = random.Random(0)
    texts = [
        f"<think>so</think><answer>{rng.choice(['1/2', '0.5', '2', '', 'x^2', '{1,2}'])}</answer>"
        for _ in range(1_000)
    ]
    rows = [{"answer": rng.choice(["0.5", "2", "x^2", "{2,1}", "it depends on what you mean by that"])} for _ in texts]
    found = []
    for workers in (1, 4):
        with Pool(REAL, Verify(workers=workers)) as pool:
            found.append(pool.scores("accuracy", texts, rows))
    assert found[0] == found[1] and {0.0, 1.0, None} == set(found[0])
