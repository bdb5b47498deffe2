"""The rollout pipeline without a trainer: rewards belong to their rollouts, dynamic sampling replaces groups."""

import random

import pytest
import trl
from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from r1dist.config import GRPORun, Reward
from r1dist.config.loader import build
from r1dist.data.order import PromptOrder
from r1dist.data.templates import Template
from r1dist.errors import RewardFailed, UserError, VerifiersBroken
from r1dist.generation.engine import Rollout
from r1dist.rewards import Rewards
from r1dist.rl.prompts import Prompts
from r1dist.rl.rollouts import RolloutPipeline
from r1dist.run.clock import PhaseClock
from r1dist.run.reporting import Reporting
from r1dist.run.schedule import GenerationSchedule

GROUP, PROMPTS, EOS = 2, 12, 360


class Engine:
    """Draws 1 to 6 tokens by the seed, and hands them out in any order."""

    def __init__(self):
        self.synced, self.asked, self.ended = [], [], 0

    def sync_weights(self, version):
        self.synced.append(version)

    def stream(self, requests, sampling):
        self.asked.append([request.prompt_id for request in requests[::GROUP]])
        for place in random.Random(0).sample(range(len(requests)), len(requests)):
            draw = random.Random(requests[place].seed)
            ids = [draw.randrange(10, 300) for _ in range(draw.randint(1, 5))]
            ends = draw.random() < 0.7
            ids, reason = ([*ids, EOS], "stop") if ends else (ids, "length")
            yield place, Rollout(requests[place], ids, [-1.0] * len(ids), reason, self.synced[-1])

    def end_generation(self):
        self.ended += 1

    def metrics(self):
        return {}

    def close(self):
        pass


class Scored(Rewards):
    """`parity`: rollouts of a prompt with an odd id differ, those of an even one are all paid 0.1."""

    def __init__(self, pool):
        super().__init__(
            {"format": Reward(), "overlong": Reward(parameters={"max_tokens": 9, "cache_tokens": 1})}, pool
        )
        self.begun, self.rewards = [], {"parity": Reward()}

    def begin(self, rollout_id, step, text, row):
        self.begun.append((rollout_id, text))

    def score(self, rollout_ids, step, texts, rows, heartbeat):
        for rollout_id, text, row in zip(rollout_ids, texts, rows, strict=True):
            assert row["prompt_id"] == rollout_id[1] and text == dict(self.begun)[rollout_id]
            assert len(row["group_tokens"]) == GROUP and row["tokens"] in row["group_tokens"]
        return {"parity": [0.1 + (prompt % 2) * index for _, prompt, index in rollout_ids]}


def pipeline_of(template, rewards, prompts=4, times=0, accumulation=1, dataset=PROMPTS, **fields):
    """Over `dataset` prompts, `prompts` of them to a generation, in their order; `accumulation` micro-steps a step."""
    rows = [{"prompt": f"p{p}", "prompt_ids": [p + 1], "prompt_id": p, "problem": f"p{p}"} for p in range(dataset)]
    order = PromptOrder(RepeatSampler(range(dataset), GROUP, prompts, 1, shuffle=False))
    schedule = GenerationSchedule(accumulation, 1, order.generations)
    source = Prompts(Dataset.from_list(rows), order, schedule, 100, GROUP, prompts * GROUP, 0, 0, 1)
    notes, beats, traces = [], [], []
    reporting = Reporting(lambda name, value: notes.append((name, value)), lambda: beats.append(1), PhaseClock())
    config = trl.GRPOConfig("unused", use_cpu=True, bf16=False, max_completion_length=6, num_generations=GROUP,
                            per_device_train_batch_size=GROUP, **fields)  # fmt: skip

    class Traces:
        def write(self, rows):
            traces.extend(rows)

    engine = Engine()
    pipeline = RolloutPipeline(engine, source, rewards, template, config, times, 0, reporting, Traces())
    return pipeline, engine, notes, traces


def last(notes) -> dict:
    return dict(notes)


def test_everything_belongs_to_its_rollout(template, pool):
    """Tokens, text, rewards, advantage and trace row, although rollouts arrive in any order."""
    rewards = Rewards(
        {"accuracy": Reward(), "overlong": Reward(parameters={"max_tokens": 6, "cache_tokens": 6})}, pool
    )
    pipeline, engine, notes, traces = pipeline_of(template, rewards)
    rows = pipeline.prompts.dataset.add_column("answer", ["1"] * PROMPTS).add_column("kind", ["math"] * PROMPTS)
    object.__setattr__(pipeline.prompts, "dataset", rows)
    batch = pipeline.next_batch(0)
    assert batch.rollout_ids == [(0, prompt, index) for prompt in range(4) for index in range(GROUP)]
    assert engine.synced == [0] and engine.ended == 1
    for place, (_, prompt, index) in enumerate(batch.rollout_ids):
        ids = batch.completion_ids[place].tolist()
        assert batch.prompt_ids[place].tolist() == [prompt + 1]
        assert batch.texts[place] == template.decode(ids)
        assert batch.rewards["overlong"][place] == pytest.approx(-len(ids) / 6)
        row = traces[place]
        assert (row.prompt_id, row.sample_index, row.completion_tokens) == (prompt, index, len(ids))
        assert row.text == batch.texts[place] and row.advantage == batch.advantages[place].item()
        assert row.rewards == {name: scores[place] for name, scores in batch.rewards.items()}
    assert last(notes)["completions/mean_length"] == pytest.approx(sum(map(len, batch.completion_ids)) / 8)
    assert pipeline.take_tokens_generated() == sum(batch.lengths) and pipeline.take_tokens_generated() == 0
    assert pipeline.next_batch(1).policy_versions == [1] * 8 and engine.synced == [0, 1]


def test_each_completion_is_decoded_once(template, pool, monkeypatch):
    decoded = []

    def decode(ids):
        decoded.append(ids)
        return Template.decode(template, ids)

    monkeypatch.setattr(template, "decode", decode)
    pipeline, *_ = pipeline_of(template, Scored(pool))
    assert len(decoded) == 0 and len(pipeline.next_batch(0)) == 8 == len(decoded)


def test_rollouts_that_were_cut_off_may_count_for_nothing(template, pool):
    whole, masked = (
        pipeline_of(template, Scored(pool), mask_truncated_completions=on)[0].next_batch(0) for on in (False, True)
    )
    cut = [ids[-1] != EOS for ids in whole.completion_ids]
    assert any(cut) and whole.counts == [True] * 8 and masked.counts == [not x for x in cut]
    assert [len(ids) for ids in masked.completion_ids] == [
        1 if x else len(ids) for x, ids in zip(cut, whole.completion_ids, strict=True)
    ]
    assert masked.loss_tokens == sum(len(ids) for x, ids in zip(cut, whole.completion_ids, strict=True) if not x)


def test_groups_of_equal_rewards_are_replaced_and_the_others_kept(template, pool):
    """All rewards of a group are 0.1, whose float32 mean is another number."""
    pipeline, engine, notes, traces = pipeline_of(template, Scored(pool), times=9)
    batch = pipeline.next_batch(0)
    prompts = [prompt for _, prompt, _ in batch.rollout_ids]
    assert prompts[2:4] == [1, 1] and prompts[6:8] == [3, 3]
    assert all(p % 2 for p in prompts) and len(set(prompts)) == 4 and prompts[::2] == prompts[1::2]
    assert all(batch.prompt_ids[place].tolist() == [p + 1] for place, p in enumerate(prompts))
    later = [p for asked in engine.asked[1:] for p in asked]
    assert len(set(later)) == len(later) and not set(later) & {0, 1, 2, 3}
    found = {name: value for name, value in notes if name.startswith("dynamic_sampling/")}
    expected = {"zero_variance": 0.5, "remaining": 0.0, "added": len(later) * GROUP / 8}
    assert found == {f"dynamic_sampling/{name}": value for name, value in expected.items()}
    assert len(traces) == 8 + len(later) * GROUP and engine.ended == 1


def test_only_as_often_as_allowed_and_only_as_many_as_are_lacking(template, pool):
    pipeline, engine, notes, _ = pipeline_of(template, Scored(pool), prompts=3, times=1)
    pipeline.next_batch(0)  # prompts 0, 1, 2
    assert [len(asked) for asked in engine.asked] == [3, 2]
    useful = sum(p % 2 for p in engine.asked[1])
    assert last(notes)["dynamic_sampling/remaining"] == pytest.approx((2 - useful) / 3)


def test_nothing_happens_where_no_prompt_is_left(template, pool):
    pipeline, engine, notes, _ = pipeline_of(template, Scored(pool), prompts=4, dataset=4, times=5)
    batch = pipeline.next_batch(0)
    assert len(engine.asked) == 1 and last(notes)["dynamic_sampling/remaining"] == 0.5
    assert batch.rollout_ids[0] == (0, 0, 0)


def test_no_prompt_of_the_optimizer_step_is_drawn_again(template, pool):
    """Two generations to a step: in both, the same prompt would have the same seeds."""
    pipeline, engine, *_ = pipeline_of(template, Scored(pool), prompts=3, times=9, accumulation=2)
    first, second = pipeline.next_batch(0), pipeline.next_batch(1)
    ids = [{(prompt, index) for _, prompt, index in batch.rollout_ids} for batch in (first, second)]
    assert not ids[0] & ids[1] and all(prompt % 2 for prompt, _ in ids[0])
    asked = [p for prompts in engine.asked for p in prompts]
    assert len(asked) == len(set(asked))


def test_resumed_within_a_step_the_same_prompts_are_drawn(template, pool):
    """Those of the first generation that were of no use, too, are drawn no more."""
    given = dict(prompts=3, times=2, accumulation=2, dataset=40)
    whole, _, *_ = pipeline_of(template, Scored(pool), **given)
    kept = {prompt for _, prompt, _ in whole.next_batch(0).rollout_ids}
    resumed, *_ = pipeline_of(template, Scored(pool), **given)
    resumed.used = whole.used
    assert whole.used[0] > kept | {0, 1, 2, 3, 4, 5}
    assert resumed.next_batch(1).rollout_ids == whole.next_batch(1).rollout_ids


def test_other_prompts_are_drawn_by_the_seed(template, pool):
    prompts = pipeline_of(template, Scored(pool))[0].prompts

    def drawn(used, groups, attempt):
        return [row["prompt_id"] for row in prompts.unused(used, groups, 0, attempt)][::GROUP]

    assert drawn({1, 2}, 5, 0) == drawn({1, 2}, 5, 0) != drawn({1, 2}, 5, 1)
    assert sorted(drawn({1, 2}, 40, 0)) == [0, *range(3, PROMPTS)]


def test_groups_that_lie_on_two_processes_are_refused(small_grpo):
    tree = {**small_grpo, "train": {"dynamic_sampling": 1}, "per_device_train_batch_size": 4}
    tree |= {"gradient_accumulation_steps": 1, "generation_batch_size": 32}
    with pytest.raises(UserError, match="dynamic_sampling replaces whole groups"):
        build(GRPORun, tree, "test", processes=8)


@pytest.mark.parametrize("failure", [RewardFailed, VerifiersBroken])
def test_a_reward_that_fails_on_another_rank_stops_this_one(failure, template, pool, monkeypatch):
    pipeline, *_ = pipeline_of(template, Scored(pool))
    elsewhere = (failure("rewards.own.py:f failed"), [])
    monkeypatch.setattr(
        "r1dist.rl.rollouts.gather_object", lambda part: [*part, *([elsewhere] if type(part[0]) is tuple else [])]
    )
    with pytest.raises(failure, match=r"own.py:f failed"):
        pipeline.next_batch(0)
