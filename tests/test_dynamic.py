"""Groups whose rewards are all alike give way to other prompts', each rank's to its own."""

from types import SimpleNamespace

import pytest
import torch

from r1dist.config import GRPORun
from r1dist.errors import UserError
from r1dist.parse import build, check_groups
from r1dist.train.dynamic import Resampler, alike, others

SIZE, PROMPTS = 2, 12


class Trainer:
    """One rank; a group of prompt p teaches something if p is odd."""

    num_generations = SIZE
    generation = 3

    def __init__(self):
        self.args = SimpleNamespace(world_size=1, process_index=0, seed=0)
        self.state = SimpleNamespace(global_step=3)
        self.grouping = SimpleNamespace(pad_id=0)
        self.accelerator = SimpleNamespace(gather=lambda tensor: tensor)
        self.train_dataset = Rows([{"prompt_id": p} for p in range(PROMPTS)])
        self.notes, self.asked = {}, []

    def note(self, name, value):
        self.notes[name] = value

    def scored(self, rows):
        self.asked.append([row["prompt_id"] for row in rows[::SIZE]])
        prompts = torch.tensor([row["prompt_id"] for row in rows])
        lengths = prompts % 5 + 1
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        sign = torch.tensor([1.0, -1.0]).repeat(len(rows) // SIZE)
        return {
            "prompt_ids": prompts[:, None] + 100,
            "prompt_mask": torch.ones(len(rows), 1, dtype=torch.long),
            "completion_ids": (prompts[:, None] + 200) * mask,
            "completion_mask": mask,
            "advantages": sign * (prompts % 2),
            "num_items_in_batch": mask.sum(),
        }


class Rows(list):
    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr("r1dist.train.dynamic.gather_object", lambda values: values)


def filled(prompts, times):
    trainer = Trainer()
    rows = [{"prompt_id": p} for p in prompts for _ in range(SIZE)]
    return trainer, Resampler(trainer, times).fill(rows, trainer.scored(rows), trainer.scored)


def test_groups_without_a_difference_are_replaced_and_the_others_kept():
    trainer, batch = filled([0, 1, 2, 3], times=9)
    prompts = (batch["prompt_ids"][:, 0] - 100).tolist()
    assert prompts[2:4] == [1, 1] and prompts[6:8] == [3, 3]
    assert all(p % 2 for p in prompts) and len(prompts) == 8
    assert all(prompts[i] == prompts[i + 1] for i in range(0, 8, SIZE)) and len(set(prompts)) == 4
    assert batch["completion_mask"].sum(1).tolist() == [p % 5 + 1 for p in prompts]
    assert batch["num_items_in_batch"] == sum(p % 5 + 1 for p in prompts)
    assert not alike([{"advantages": value} for value in batch["advantages"]], SIZE)
    later = [p for asked in trainer.asked[1:] for p in asked]
    assert len(set(later)) == len(later) and not set(later) & {0, 1, 2, 3}
    assert trainer.notes == {"dynamic/alike": 0.5, "dynamic/left": 0.0, "dynamic/extra": len(later) * SIZE / 8}


def test_only_as_often_as_allowed_and_only_as_many_as_wanted():
    trainer, _ = filled([0, 2, 4, 6], times=1)
    assert [len(asked) for asked in trainer.asked] == [4, 4]
    useful = sum(p % 2 for p in trainer.asked[1])
    assert trainer.notes["dynamic/left"] == (4 - useful) / 4 and 0 < useful < 4
    trainer, _ = filled([1, 3, 5, 8], times=5)
    assert all(len(asked) == 1 for asked in trainer.asked[1:])


def test_nothing_happens_where_all_differ_or_no_prompt_is_left():
    trainer, _ = filled([1, 3, 5], times=5)
    assert len(trainer.asked) == 1 and trainer.notes["dynamic/extra"] == 0
    trainer, batch = filled(list(range(0, PROMPTS)), times=5)
    assert len(trainer.asked) == 1 and trainer.notes["dynamic/left"] == 0.5
    assert batch["prompt_ids"][0, 0] == 100


def test_the_draw_is_the_seeds():
    ids = list(range(50))
    assert others(ids, {1, 2}, 5, "a") == others(ids, {1, 2}, 5, "a") != others(ids, {1, 2}, 5, "b")
    assert not {1, 2} & set(others(ids, {1, 2}, 48, "a")) and len(others(ids, {1, 2}, 60, "a")) == 48


def test_groups_that_straddle_processes_are_refused(small_grpo):
    tree = {**small_grpo, "train": {"dynamic_sampling": 1}, "per_device_train_batch_size": 4}
    tree |= {"gradient_accumulation_steps": 1, "generation_batch_size": 32}
    with pytest.raises(UserError, match="dynamic_sampling replaces whole groups"):
        check_groups(build(GRPORun, tree, "test"))
