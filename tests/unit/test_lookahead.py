"""Generations ahead of the training: which is next, how old its weights may be, and when weights may change."""

import pytest
import torch
from trl.trainer.utils import RepeatSampler

from r1dist.config import GRPORun, Rollout
from r1dist.config.loader import build
from r1dist.data.order import PromptOrder
from r1dist.errors import UserError
from r1dist.generation.engine import Request, RolloutsLost
from r1dist.generation.engine import Rollout as Made
from r1dist.generation.lookahead import Generation
from r1dist.generation.source import GenerationSource
from r1dist.run.clock import PhaseClock
from r1dist.run.reporting import Reporting

GENERATIONS = 12


class Handle:
    """Rollouts that arrive when the test says so, or when they are waited for."""

    def __init__(self, rollouts, lost=False):
        self.rollouts, self.lost = dict(enumerate(rollouts)), lost
        self.done = self.cancelled = self.finished = False

    def finish(self):
        self.finished = True

    def arrived(self):
        if self.finished and not self.done:
            self.done = True
            yield from ([] if self.lost else self.rollouts.items())

    def __iter__(self):
        self.finish()
        yield from self.arrived()
        if self.lost:
            raise RolloutsLost("no server is left")

    def cancel(self):
        self.cancelled = True


class Engine:
    def __init__(self):
        self.version, self.handles, self.log = -1, [], []
        self.lost = False

    def sync_weights(self, version):
        assert all(handle.done or handle.cancelled for handle in self.handles), "in the middle of a generation"
        self.version = version
        self.log.append(("sync", version))

    def submit(self, requests, sampling):
        assert all(handle.done or handle.cancelled for handle in self.handles), "two at once"
        self.log.append(("submit", requests[0].seed, self.version))
        made = [Made(request, [1], [-1.0], "stop", self.version) for request in requests]
        self.handles.append(Handle(made, self.lost))
        return self.handles[-1]

    def metrics(self):
        return {}

    def close(self):
        pass


def plan(number):
    """One generation to an optimizer step, of two rollouts."""
    if number >= GENERATIONS:
        return None
    return Generation(number, number, [{}, {}], [Request([number], number, i, 100 * number + i) for i in range(2)])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for module in ("lookahead", "source"):
        monkeypatch.setattr(f"r1dist.generation.{module}.gather_object", lambda values: values)


def source_of(staleness, engine):
    notes, arrived = [], []
    reporting = Reporting(lambda name, value: notes.append((name, value)), lambda: None, PhaseClock())

    def receive(generation, place, rollout):
        assert rollout.request is generation.requests[place]
        arrived.append(rollout.request.seed)

    return GenerationSource(engine, None, staleness, plan, receive, reporting), notes, arrived


def run(staleness, finish, generations=GENERATIONS):
    """Train `generations`; `finish(step)` says how many generations ahead are finished while it trains on one."""
    engine = Engine()
    source, notes, arrived = source_of(staleness, engine)
    ages = []
    for step in range(generations):
        rollouts = source.take(step).rollouts
        assert [rollouts[place].request.seed for place in range(2)] == [100 * step, 100 * step + 1]
        ages.append(step - rollouts[0].policy_version)
        for _ in range(finish(step)):
            engine.handles[-1].finish()
            source.poll(step)
    assert sorted(arrived)[: 2 * generations] == [100 * g + i for g in range(generations) for i in range(2)]
    assert len(set(arrived)) == len(arrived)
    assert ages == [value for name, value in notes if name == "rollout/staleness"]
    return ages, engine


@pytest.mark.parametrize("finish", [0, 1, 2], ids=["servers are slow", "as fast", "servers are fast"])
def test_one_generation_ahead_is_made_with_the_weights_before(finish):
    ages, engine = run(1, lambda step: finish)
    assert ages == [0] + [1] * (GENERATIONS - 1)
    assert [entry for entry in engine.log if entry[0] == "sync"] == [("sync", step) for step in range(GENERATIONS)]


def test_fast_servers_go_as_far_ahead_as_they_may():
    ages, _ = run(4, lambda step: 9)
    assert max(ages) == 4 and min(ages[1:]) >= 1


def test_slow_servers_leave_larger_bounds_unused():
    ages, _ = run(4, lambda step: 0)
    assert ages == [0] + [1] * (GENERATIONS - 1)


@pytest.mark.parametrize("staleness", [1, 2, 3, 5])
def test_no_rollout_is_older_than_it_may_be(staleness):
    draw = torch.Generator().manual_seed(staleness)
    ages, _ = run(staleness, lambda step: int(torch.randint(0, 4, (), generator=draw)))
    assert max(ages) <= staleness


def test_nothing_is_submitted_beyond_the_end():
    _, engine = run(3, lambda step: 9)
    assert sum(entry[0] == "submit" for entry in engine.log) == GENERATIONS


def test_another_generation_than_expected_is_asked_anew():
    engine = Engine()
    source, _, _ = source_of(1, engine)
    for step in (0, 5):
        assert source.take(step).rollouts[0].policy_version == step
    assert engine.handles[1].cancelled


@pytest.mark.parametrize("staleness", [1, 4])
def test_a_run_that_resumes_with_its_rollouts_submits_nothing_before_weights_are_synced(staleness):
    engine = Engine()
    source, _, _ = source_of(staleness, engine)
    source.poll(1)  # generation 1 came with the checkpoint
    assert engine.log == []
    assert source.take(2).rollouts[0].policy_version == 2


def test_lost_rollouts_raise_when_their_generation_is_taken():
    engine = Engine()
    engine.lost = True
    with pytest.raises(RolloutsLost, match="no server is left"):
        source_of(1, engine)[0].take(0)
    engine.lost = False
    source, _, _ = source_of(1, engine)
    source.take(0)
    engine.handles[-1].lost = True
    engine.handles[-1].finish()
    source.poll(0)
    with pytest.raises(RolloutsLost, match="no server is left"):
        source.take(1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_knows_the_generations_to_come(shuffle):
    sampler = RepeatSampler(range(23), mini_repeat_count=4, batch_size=3, repeat_count=2, shuffle=shuffle, seed=5)
    order = PromptOrder(sampler)
    for epoch in range(3):
        order.set_epoch(epoch)
        known = [order.generation(number) for number in range(7 * epoch, 7 * epoch + 7)]
        order.generation(7 * epoch + 7)
        indices = list(order)
        assert known == [indices[i : i + 12] for i in range(0, len(indices), 24)]


def test_the_first_epoch_is_in_trls_order():
    ours, of_trl = (RepeatSampler(range(23), 4, 3, 2, seed=5) for _ in range(2))
    assert list(PromptOrder(ours)) == list(of_trl)


def test_what_cannot_be_ahead_is_refused(small_grpo):
    with pytest.raises(UserError, match=r"max_staleness.*\n.*rollout.engine: vllm"):
        build(GRPORun, {**small_grpo, "rollout": {"engine": "transformers", "max_staleness": 1}}, "test")
    with pytest.raises(UserError, match="sleep"):
        build(GRPORun, {**small_grpo, "rollout": {"engine": "vllm", "max_staleness": 1, "sleep": True}}, "test")
    assert build(
        GRPORun, {**small_grpo, "rollout": {"engine": "vllm", "max_staleness": 1}}, "test"
    ).rollout == Rollout(engine="vllm", max_staleness=1)
