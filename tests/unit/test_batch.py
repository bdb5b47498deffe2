"""Micro-batches: each rollout once, within the budget, as cheap as can be, on every rank as many."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations, groupby, pairwise

import pytest
import torch

from r1dist.data.length_groups import by_length, by_prompt
from r1dist.rl.batch import MicroBatching, RolloutBatch, build_micro_batches, collate, concatenate

PAD = 362


def rollouts(prompts: list[int], completions: list[int], first: int = 0, counts: list[bool] | None = None):
    """A batch of rollouts of those lengths; rollout i has the advantage `first` + i, and values that name it."""
    generator = torch.Generator().manual_seed(first)

    def tokens(lengths):
        return [torch.randint(0, 300, (n,), generator=generator) for n in lengths]

    def values():
        return [-4 * torch.rand(n, generator=generator) for n in completions]

    rows = len(prompts)
    return RolloutBatch(
        rollout_ids=[(0, i, 0) for i in range(first, first + rows)],
        prompt_ids=tokens(prompts),
        completion_ids=tokens(completions),
        sampler_logprobs=values(),
        counts=counts or [True] * rows,
        advantages=torch.arange(first, first + rows).float(),
        policy_versions=[0] * rows,
        rewards={"accuracy": [None] * rows},
        prompts=["p"] * rows,
        texts=[str(i) for i in range(rows)],
        old_logprobs=values(),
        reference_logprobs=values(),
    )


def drawn(chance: random.Random, rows: int, first: int) -> RolloutBatch:
    """Of up to four prompts."""
    prompts, completions = ([chance.randint(1, 60) for _ in range(n)] for n in (4, rows))
    batch = rollouts(prompts, [1] * 4).prompt_ids
    found = rollouts([1] * rows, completions, first=first)
    found.prompt_ids = [chance.choice(batch) for _ in range(rows)]
    return found


@pytest.mark.parametrize("draw", range(60))
def test_each_rollout_is_trained_on_once_and_the_work_is_even(draw):
    """Any lengths, any budget, any number of ranks, packed or padded, with shared prompts or not, regrouped or not."""
    chance = random.Random(draw)
    ranks, accumulation, rows, steps = (chance.choice(range(1, n)) for n in (5, 5, 6, 3))
    kind, regroup = chance.choice(["padded", "packed", "sharing"]), chance.random() < 0.75
    packed, sharing = kind == "packed", kind == "sharing"
    budget = chance.choice([None, chance.randint(1, 400)])
    micro_steps = steps * accumulation
    local = [drawn(chance, rows * micro_steps, 1000 * rank) for rank in range(ranks)]

    def gather(values: list) -> list:
        """The other ranks' values, which this process computes itself."""
        (mine,) = values
        if isinstance(mine, RolloutBatch):
            window = (mine.advantages[0].item() % 1000) // rows
            return [b.select([int(window) * rows + i for i in range(len(mine))]) for b in local]
        if isinstance(mine, list):
            return gathered_counts
        return [b.loss_tokens for b in local]

    gathered_counts = [[1] * micro_steps for _ in range(ranks)]
    if not regroup and budget is not None:
        gathered_counts = [
            [MicroBatching(PAD, budget, packed, sharing).rows(b.select(range(i * rows, (i + 1) * rows)))
             .groups_needed(budget) for i in range(micro_steps)]
            for b in local
        ]  # fmt: skip
    found = [
        build_micro_batches(
            b, micro_steps, accumulation, MicroBatching(PAD, budget, packed, sharing, regroup, r, ranks, gather)
        )
        for r, b in enumerate(local)
    ]
    assert all(len(on_rank) == micro_steps and all(on_rank) for on_rank in found)
    forwards = [[len(batches) for batches in on_rank] for on_rank in found]
    assert all(counts == forwards[0] for counts in forwards)
    for step in range(steps):
        window = slice(step * accumulation, (step + 1) * accumulation)
        batches = [b for on_rank in found for batches in on_rank[window] for b in batches]
        names = Counter(name for b in batches for name in b.advantages.tolist())
        expected = [b.advantages[window.start * rows : window.stop * rows].tolist() for b in local]
        assert names == Counter(name for on_rank in expected for name in on_rank)
        for b in batches:
            lengths = b.attention_mask.sum(1).tolist()
            cost = sum(lengths) if packed else max(lengths) * len(lengths)
            if b.shared is not None:
                cost = b.shared.input_ids.numel()
                assert sharing and cost <= sum(lengths) - len(lengths)
            assert budget is None or len(lengths) == 1 or cost <= budget
    if not regroup:
        for on_rank, b in zip(found, local, strict=True):
            for i, batches in enumerate(on_rank):
                own = b.select(range(i * rows, (i + 1) * rows))
                assert sorted(own.advantages.tolist()) == sorted(n for m in batches for n in m.advantages.tolist())
                assert all(m.micro_step_tokens == own.loss_tokens for m in batches)


def cheapest(order: list[int], bins: int, cost: Callable[[list[int]], int]) -> int:
    """The costliest group's cost, the least over every way to cut `order`."""
    return min(
        max(cost(order[a:b]) for a, b in pairwise((0, *cuts, len(order))))
        for cuts in combinations(range(1, len(order)), bins - 1)
    )


@pytest.mark.parametrize("draw", range(50))
@pytest.mark.parametrize("packed", [False, True])
def test_groups_are_as_cheap_as_can_be(packed, draw):
    """Against every way to cut the sorted rows."""
    chance = random.Random(draw)
    lengths = [chance.randint(1, 40) for _ in range(chance.randint(1, 8))]
    bins = chance.randint(1, len(lengths))

    def cost(group):
        widths = [lengths[i] for i in group]
        return sum(widths) if packed else len(widths) * max(widths)

    groups = by_length(lengths, packed).partition(bins)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths))) and len(groups) == bins
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    assert max(map(cost, groups)) == cheapest(order, bins, cost)


@pytest.mark.parametrize("draw", range(50))
def test_so_are_those_that_share_prompts(draw):
    """A prompt's tokens once in each group, and an eighth for each time that attention repeats one."""
    chance = random.Random(draw)
    rows, common = chance.randint(1, 8), [chance.randint(0, 40) for _ in range(3)]
    prompts, own = [chance.randrange(3) for _ in range(rows)], [chance.randint(1, 40) for _ in range(rows)]
    bins = chance.randint(1, rows)

    def cost(group):
        members = Counter(prompts[i] for i in group)
        tokens = sum(common[p] for p in members) + sum(own[i] for i in group)
        return tokens + sum(common[prompts[i]] for i in group) // 8

    divided = by_prompt(prompts, [common[p] for p in prompts], own)
    runs = [prompt for prompt, _ in groupby(prompts[i] for i in divided.order)]
    assert sorted(divided.order) == list(range(rows)) and len(runs) == len(set(runs))
    groups = divided.partition(bins)
    assert [i for group in groups for i in group] == divided.order and len(groups) == bins
    assert max(map(cost, groups)) == cheapest(divided.order, bins, cost)


def unpadded(batch) -> list[tuple]:
    """Each row of a micro-batch without its padding."""
    split = batch.input_ids.size(1) - batch.mask.size(1)
    found = []
    for row in range(len(batch.advantages)):
        real, counted = batch.attention_mask[row].bool(), batch.mask[row].bool()
        values = (batch.sampler_logprobs, batch.old_logprobs, batch.reference_logprobs)
        prompt = batch.input_ids[row, :split][real[:split]].tolist()
        completion = batch.input_ids[row, split:][counted].tolist()
        found.append((batch.advantages[row].item(), prompt, completion, *(v[row][counted].tolist() for v in values)))
    return found


def test_a_micro_batch_holds_its_rollouts_and_no_more_padding_than_it_needs():
    whole = rollouts([5, 17, 9, 30], [40, 3, 1, 22])
    batch = collate(whole, PAD)
    assert batch.input_ids.shape == (4, 70) and batch.mask.shape == (4, 40)
    assert (batch.input_ids[~batch.attention_mask.bool()] == PAD).all()
    for place, row in enumerate(unpadded(batch)):
        values = (whole.sampler_logprobs, whole.old_logprobs, whole.reference_logprobs)
        assert row[0] == place and row[1] == whole.prompt_ids[place].tolist()
        assert row[2] == whole.completion_ids[place].tolist()
        assert row[3:] == tuple(v[place].tolist() for v in values)


def test_a_rollout_that_does_not_count_is_neither_attended_to_nor_trained_on():
    batch = collate(rollouts([5, 7], [1, 4], counts=[False, True]), PAD)
    assert batch.mask.tolist() == [[0] * 4, [1] * 4]
    assert batch.attention_mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_selecting_and_concatenating_keep_every_field_with_its_rollout():
    a, b = rollouts([1, 2], [3, 4]), rollouts([5], [6], first=2)
    joined = concatenate([a, b])
    assert [len(ids) for ids in joined.prompt_ids] == [1, 2, 5] and joined.rewards == {"accuracy": [None] * 3}
    back = joined.select([2, 0])
    assert back.advantages.tolist() == [2.0, 0.0] and back.rollout_ids == [(0, 2, 0), (0, 0, 0)]
    assert torch.equal(back.old_logprobs[0], b.old_logprobs[0]) and torch.equal(back.prompt_ids[1], a.prompt_ids[0])
