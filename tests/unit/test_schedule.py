"""Generations and optimizer steps against a simulation of transformers' and TRL's loops, micro-step by micro-step."""

import pytest

from r1dist.run.schedule import GenerationSchedule


def simulate(accumulation: int, micro_steps: int, per_epoch: int, epochs: int = 3):
    """(first micro-step of each optimizer step, optimizer step of each generation)."""
    starts, steps_of, step, micro_step = [], [], 0, 0
    for _ in range(epochs):
        in_epoch = per_epoch * micro_steps
        for begin in range(0, in_epoch, accumulation):  # an epoch's last step takes what is left
            starts.append(micro_step)
            for _ in range(min(accumulation, in_epoch - begin)):
                if micro_step % micro_steps == 0:
                    steps_of.append(step)
                micro_step += 1
            step += 1
    return starts, steps_of


@pytest.mark.parametrize("per_epoch", [1, 2, 5, 7])
@pytest.mark.parametrize(("accumulation", "micro_steps"), [(1, 1), (4, 4), (1, 4), (2, 6), (4, 1), (4, 2), (6, 2)])
def test_every_count(accumulation, micro_steps, per_epoch):
    schedule = GenerationSchedule(accumulation, micro_steps, per_epoch)
    starts, steps_of = simulate(accumulation, micro_steps, per_epoch)
    assert [schedule.micro_step_at(step) for step in range(len(starts))] == starts
    assert [schedule.step_of(generation) for generation in range(len(steps_of))] == steps_of
    for step in range(len(starts)):
        assert list(schedule.generations_of(step)) == [g for g, own in enumerate(steps_of) if own == step]
