"""The first optimizer steps of small runs are those that were recorded before the trainer was rewritten."""

import json

import numpy
import pytest
from step_records import FOLDER, SETTINGS, record

# float32 sums in another order, in forwards of other shapes: the recorded ones hold a prompt once for each rollout. A
# loss is a difference of terms of size 1. A divergence is more sensitive to rounding, and so is the gradient of a
# policy that has moved far: in `servers` its norm differs by 1e-6 at the first step, by 1.4e-5 at the fifth.
RELATIVE, ABSOLUTE = 1e-5, 2e-7
SENSITIVE = {"kl": 1e-4, "grad_norm": 5e-5}


@pytest.mark.parametrize("name", SETTINGS)
def test_rollouts_are_identical_and_losses_too(tmp_path, name):
    if "vllm" in name:
        pytest.importorskip("vllm")
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    found = record(name, tmp_path)
    assert [row[:4] for row in found["rollouts"]] == [row[:4] for row in expected["rollouts"]]
    for row, before in zip(found["rollouts"], expected["rollouts"], strict=True):
        rewards = {name: None if score is None else float(numpy.float32(score)) for name, score in row[4].items()}
        assert rewards == before[4]
        assert row[5] == pytest.approx(before[5], rel=RELATIVE, abs=ABSOLUTE)  # the last bit depends on the processor
    assert len(found["steps"]) == len(expected["steps"])
    for step, before in zip(found["steps"], expected["steps"], strict=True):
        assert step.keys() == before.keys()
        for field in before:
            within = SENSITIVE.get(field, RELATIVE)
            assert step[field] == pytest.approx(before[field], rel=within, abs=ABSOLUTE), field
