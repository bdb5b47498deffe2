"""Placement is a pure decision: tables of machines and config, and what comes of them."""

import pytest

from r1dist.cluster.placement import GIB, Load, Machines, place
from r1dist.config import PlacementConfig
from r1dist.errors import UserError

# 7.6 billion parameters, in the round: 16 bytes each of training states, 12 of them sharded by ZeRO 1 and so on.
SEVEN = 7_600_000_000


def peak(processes: int, stage: int) -> int:
    shard = (1, 1, 1) if stage == 0 else (1, 1, processes) if stage == 1 else (1, processes, processes)
    weights, gradients, optimizer = shard if stage < 3 else (processes,) * 3
    return SEVEN * 2 // weights + SEVEN * 2 // gradients + SEVEN * 12 // optimizer + 20 * GIB


RL = Load(trains=True, serves=True, peak=peak, served=2 * SEVEN, heads=28, rows=64)
SMALL = Load(trains=True, serves=True, served=GIB, heads=14)
SFT = Load(trains=True, serves=False, peak=peak)
SAMPLING = Load(trains=False, serves=True, served=2 * SEVEN, heads=28)
IN_PROCESS = Load(trains=False, serves=False, in_process=True, served=2 * SEVEN, heads=28)


def decided(machines: Machines, load: Load, **config) -> tuple:
    p = place(machines, load, PlacementConfig(**config))
    return p.train_nodes, p.processes, p.zero_stage, p.serve_nodes, p.replicas, p.tensor_parallel, p.transport


@pytest.mark.parametrize(
    ("machines", "load", "config", "expected"),
    [
        # one GPU: shared; no sharding over one process
        (Machines(1, 1, 24), SMALL, {}, (1, 1, 0, 0, 1, 1, "ipc")),
        # one node: split in half, one server to a GPU
        (Machines(1, 8, 80), RL, {}, (1, 4, 1, 0, 4, 1, "nccl")),
        (Machines(1, 8, 80), RL, {"serve": 2}, (1, 6, 1, 0, 2, 1, "nccl")),
        (Machines(1, 8, 80), RL, {"zero_stage": 3}, (1, 4, 3, 0, 4, 1, "nccl")),
        # training does not fit on half of them, so fewer serve: 7.6e9 * 16 / 5 bytes and 20 GiB are 42.6 of 44.2 GiB
        (Machines(1, 8, 48), RL, {}, (1, 5, 3, 0, 3, 1, "nccl")),
        (Machines(2, 8, 48), RL, {}, (1, 8, 3, 1, 8, 1, "nccl")),
        # whole nodes
        (Machines(40, 8, 80), RL, {}, (20, 8, 1, 20, 8, 1, "nccl")),
        (Machines(3, 8, 80), RL, {"serve": 2}, (1, 8, 1, 2, 8, 1, "nccl")),
        (Machines(2, 0), SMALL, {}, (1, 1, 0, 1, 1, 1, "shm")),
        (Machines(3, 0), SMALL, {"serve": 1, "processes": 2}, (2, 2, 2, 1, 1, 1, "shm")),
        (Machines(1, 0), SMALL, {}, (1, 1, 0, 0, 1, 1, "shm")),
        # nobody serves
        (Machines(2, 8, 80), SFT, {}, (2, 8, 1, 0, 0, 1, None)),
        (Machines(2, 0), SFT, {}, (2, 1, 2, 0, 0, 1, None)),
        # nobody trains
        (Machines(4, 8, 80), SAMPLING, {}, (0, 1, 0, 4, 8, 1, None)),
        (Machines(1, 8, 16), SAMPLING, {}, (0, 1, 0, 1, 4, 2, None)),
        (Machines(1, 0), SAMPLING, {}, (0, 1, 0, 1, 1, 1, None)),
        (Machines(2, 8, 80), IN_PROCESS, {}, (0, 8, 0, 2, 0, 1, None)),
        (Machines(2, 0), IN_PROCESS, {"processes": 3}, (0, 3, 0, 2, 0, 1, None)),
    ],
)
def test_decisions(machines, load, config, expected):
    assert decided(machines, load, **config) == expected


def test_large_weights_span_gpus_that_divide_the_heads():
    load = Load(trains=True, serves=True, served=70 * GIB, heads=64)
    assert place(Machines(2, 8, 80), load, PlacementConfig()).tensor_parallel == 2
    nine = Load(trains=True, serves=True, served=130 * GIB, heads=9)  # 2 and 6 do not divide 9
    assert place(Machines(2, 6, 80), nine, PlacementConfig()).tensor_parallel == 3


def test_the_first_gpus_train_and_the_last_serve():
    placement = place(Machines(1, 8, 80), RL, PlacementConfig(serve=3))
    assert placement.devices == "5,6,7" and placement.processes == 5


@pytest.mark.parametrize(
    ("machines", "load", "config", "message"),
    [
        (Machines(2, 8, 80), RL, {"serve": 2}, "placement.serve: 2 of 2 nodes would leave none to train; at most 1."),
        (Machines(1, 8, 80), RL, {"serve": 8}, "8 of 8 GPUs cannot be servers of 1; the nearest is 7."),
        (Machines(1, 2, 24), RL, {}, "64 GPUs with ZeRO-3 would do"),
        (
            Machines(1, 8, 48),
            RL,
            {"zero_stage": 2},
            "2 takes 48.3 GiB on each GPU, and 44.2 can be used; the nearest is 3.",
        ),
        (Machines(1, 1, 24), SMALL, {"zero_stage": 2}, "there is one; use 0."),
        (Machines(2, 8, 80), SFT, {"zero_stage": 0}, "1 is the nearest"),
        (Machines(2, 8, 80), SFT, {"serve": 1}, "no servers of its own"),
        (Machines(2, 8, 80), SFT, {"processes": 4}, "one for each GPU that trains, here 8"),
        (Machines(1, 8, 80), SAMPLING, {"serve": 4}, "placement.serve: nothing is trained here"),
        (Machines(1, 8, 80), IN_PROCESS, {"processes": 4}, "every GPU samples; leave it out."),
        (Machines(2, 0), SFT, {"zero_stage": 1}, "on CPUs it is 2 or 3; the nearest is 2."),
        (Machines(1, 8, 80), Load(True, True, shares=True, heads=28), {}, "Use 7 GPUs"),
        (Machines(2, 8, 80), Load(True, True, shares=True), {}, "whole nodes serve and none is shared"),
        (Machines(1, 0), Load(True, True, shares=True), {}, "there is no GPU; leave them out"),
        (Machines(1, 8, 80), Load(True, True, heads=28, tensor_parallel=3), {}, "the nearest is 2."),
        (Machines(2, 8, 80), Load(True, True, heads=28, tensor_parallel=8), {}, "and 28 heads; the nearest is 4."),
        (Machines(1, 1, 24), Load(True, True, served=20 * GIB), {}, "weights take 20.0 GiB, too much"),
        (Machines(1, 8, 80), Load(True, True, transport="ipc"), {}, "here `nccl` would do"),
    ],
)
def test_an_impossible_placement_is_refused_with_the_nearest_possible(machines, load, config, message):
    with pytest.raises(UserError) as refused:
        place(machines, load, PlacementConfig(**config))
    assert message in str(refused.value)


def test_the_table_gives_each_decision_with_its_reason():
    table = place(Machines(2, 8, 80), RL, PlacementConfig()).table()
    assert table.splitlines()[0] == "Placement on 2 nodes with 8 GPUs of 80 GiB:"
    assert "1 node, 8 processes each" in table and "whole nodes, the first ones" in table
    assert "512 rows" in table and "nccl" in table
    for sleeps, how in ((True, "they take turns (rollout.sleep)"), (False, "both keep their memory")):
        load = Load(True, True, served=GIB, sleeps=sleeps)
        assert how in place(Machines(1, 1, 24), load, PlacementConfig()).table()
