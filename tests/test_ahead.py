"""Generations ahead of the training: whose turn it is, how old the weights may be, and when they may change."""

from types import SimpleNamespace

import pytest
import torch
from trl.trainer.utils import RepeatSampler

from r1dist.config import GRPORun, Rollout
from r1dist.errors import UserError
from r1dist.parse import build
from r1dist.rollout.protocol import Request, RolloutsLost
from r1dist.rollout.protocol import Rollout as Made
from r1dist.train.backend import EngineBackend
from r1dist.train.clock import PhaseClock
from r1dist.train.order import SeededOrder

GENERATIONS = 12


class Flight:
    """Rollouts that land when the test says so, or when they are waited for."""

    def __init__(self, rollouts, lost=False):
        self.rollouts, self.lost = dict(enumerate(rollouts)), lost
        self.landed = self.cancelled = self.down = False

    def land(self):
        self.down = True

    def arrived(self):
        if self.down and not self.landed:
            self.landed = True
            yield from ([] if self.lost else self.rollouts.items())

    def __iter__(self):
        self.land()
        yield from self.arrived()
        if self.lost:
            raise RolloutsLost("nobody is left")

    def cancel(self):
        self.cancelled = True


class Engine:
    def __init__(self):
        self.version, self.flights, self.log = -1, [], []
        self.lost = False

    def sync_weights(self, version):
        assert all(flight.landed or flight.cancelled for flight in self.flights), "in the middle of a sample"
        self.version = version
        self.log.append(("sync", version))

    def depart(self, requests, sampling):
        assert all(flight.landed or flight.cancelled for flight in self.flights), "two at once"
        self.log.append(("begin", requests[0].seed, self.version))
        made = [Made(request, [1], [-1.0], "stop", self.version) for request in requests]
        self.flights.append(Flight(made, self.lost))
        return self.flights[-1]

    def metrics(self):
        return {}


class Trainer:
    """What `EngineBackend` asks of a trainer; one generation to a step."""

    num_generations = 2
    sampling = None
    resampling = False

    def __init__(self):
        self.generation = 0
        self.clock = PhaseClock()
        self.model = SimpleNamespace(training=True)
        self.notes, self.begun = [], []

    @property
    def state(self):
        return SimpleNamespace(global_step=self.generation)

    @property
    def generation_rows(self):
        return self.rows_of(self.generation)

    def rows_of(self, generation):
        return None if generation >= GENERATIONS else [{"prompt": generation}] * 2

    def prompt_ids_of(self, rows):
        return [[row["prompt"]] for row in rows]

    def step_of(self, generation):
        return generation

    def requests(self, prompts, rows, num_generations, step):
        return [Request(ids, ids[0], i, 100 * step + i) for i, ids in enumerate(prompts)]

    def begin_rewards(self, step, row, rollout):
        assert rollout.request.prompt_id == step == row["prompt"]
        self.begun.append(rollout.request.seed)

    def note(self, name, value):
        self.notes.append((name, value))

    def note_memory(self, phase):
        pass


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("r1dist.train.backend.gather_object", lambda values: values)


def run(staleness, lands, generations=GENERATIONS):
    """Train `generations`; `lands(step)` says how many generations ahead land while it trains on one."""
    trainer, engine = Trainer(), Engine()
    backend = EngineBackend(trainer, engine, staleness)
    ages = []
    for step in range(generations):
        trainer.generation = step
        backend.sync_weights()
        backend.generate(trainer.prompt_ids_of(trainer.generation_rows), None, 2, PhaseClock().phase("generate"))
        assert [rollout.request.seed for rollout in trainer.generated] == [100 * step, 100 * step + 1]
        ages.append(step - trainer.generated[0].policy_version)
        for _ in range(lands(step)):
            engine.flights[-1].land()
            backend.look()
    assert sorted(trainer.begun)[: 2 * generations] == [100 * g + i for g in range(generations) for i in range(2)]
    assert len(set(trainer.begun)) == len(trainer.begun)
    assert ages == [value for name, value in trainer.notes if name == "rollout/staleness"]
    return ages, engine


@pytest.mark.parametrize("lands", [0, 1, 2], ids=["servers are slow", "as fast", "servers are fast"])
def test_one_generation_ahead_is_made_with_the_weights_before(lands):
    ages, engine = run(1, lambda step: lands)
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


def test_nothing_is_begun_beyond_the_end():
    _, engine = run(3, lambda step: 9)
    assert sum(entry[0] == "begin" for entry in engine.log) == GENERATIONS


def test_other_prompts_than_expected_are_asked_for_anew():
    trainer, engine = Trainer(), Engine()
    backend = EngineBackend(trainer, engine, 1)
    for step in (0, 5):  # as after an epoch's end in the middle of a step
        trainer.generation = step
        backend.generate([[step]] * 2, None, 2, PhaseClock().phase("generate"))
        assert trainer.generated[0].policy_version == step
    assert engine.flights[1].cancelled


def test_lost_rollouts_are_told_when_it_is_their_turn():
    trainer, engine = Trainer(), Engine()
    backend = EngineBackend(trainer, engine, 1)
    engine.lost = True
    with pytest.raises(RolloutsLost, match="nobody is left"):
        backend.generate([[0]] * 2, None, 2, PhaseClock().phase("generate"))
    engine.lost = False
    backend = EngineBackend(trainer, engine, 1)
    backend.generate([[0]] * 2, None, 2, PhaseClock().phase("generate"))
    flight = engine.flights[-1]
    flight.lost = True
    flight.land()
    backend.look()
    trainer.generation = 1
    with pytest.raises(RolloutsLost, match="nobody is left"):
        backend.generate([[1]] * 2, None, 2, PhaseClock().phase("generate"))


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_knows_the_rows_to_come(shuffle):
    theirs = RepeatSampler(range(23), mini_repeat_count=4, batch_size=3, repeat_count=2, shuffle=shuffle, seed=5)
    order, expected = SeededOrder(theirs), []
    for epoch in range(3):
        order.set_epoch(epoch)
        indices = iter(order)  # as a data loader that has not begun yet
        known = [order.rows_of(generation, 12) for generation in range(7 * epoch, 7 * epoch + 7)]
        order.rows_of(7 * epoch + 7, 12)
        indices = list(indices)
        expected = [indices[i : i + 12] for i in range(0, len(indices), 24)]
        assert known == expected and order.epoch == epoch


def test_what_cannot_be_ahead_is_refused(small_grpo):
    with pytest.raises(UserError, match=r"max_staleness.*\n.*rollout.engine: vllm"):
        build(GRPORun, {**small_grpo, "rollout": {"max_staleness": 1}}, "test")
    with pytest.raises(UserError, match="sleep"):
        build(GRPORun, {**small_grpo, "rollout": {"engine": "vllm", "max_staleness": 1, "sleep": True}}, "test")
    assert build(
        GRPORun, {**small_grpo, "rollout": {"engine": "vllm", "max_staleness": 1}}, "test"
    ).rollout == Rollout(engine="vllm", max_staleness=1)
