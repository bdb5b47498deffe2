"""Which server makes which group, and what becomes of a group whose server fails. No server is needed."""

import asyncio
import time
from collections import Counter

import pytest

from r1dist.generation.engine import Request, RolloutsLost, sample_seed
from r1dist.generation.vllm import dispatch
from r1dist.generation.vllm.client import Completion, RequestRefused, ServerError
from r1dist.generation.vllm.dispatch import Dispatcher, ServerState, groups_of

VERSION = "run-3"


def requests(prompts: int, samples: int) -> list[Request]:
    return [Request([7, p], p, i, sample_seed(0, 3, p, i)) for p in range(prompts) for i in range(samples)]


def servers(*names: str) -> dict[str, ServerState]:
    return {name: ServerState(name, client=name, version=VERSION) for name in names}


def collect(dispatcher: Dispatcher, asked: list[Request]) -> list[int]:
    async def run() -> list[int]:
        places = []
        async for group, completions in dispatcher.run(groups_of(asked), VERSION):
            assert len(completions) == len(group.requests)
            places += group.places
        return places

    return asyncio.run(run())


def answer(group) -> list[Completion]:
    return [Completion([1], [0.0], "stop") for _ in group.requests]


def test_groups_hold_what_one_request_can_ask_for():
    asked = requests(3, 4)
    whole = groups_of(asked)
    assert [group.places for group in whole] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(r.seed == group.requests[0].seed + i for group in whole for i, r in enumerate(group.requests))
    assert [len(group.requests) for group in groups_of(asked[2:7])] == [2, 3]  # a rank's share may cut a group
    assert [len(group.requests) for group in groups_of([asked[0], asked[2]])] == [1, 1]  # seeds not in a row


def test_groups_go_to_the_least_loaded_server_and_no_server_gets_too_much():
    loads, peak, made = Counter(), Counter(), Counter()

    async def ask(client, group):
        loads[client] += len(group.requests)
        peak[client] = max(peak[client], loads[client])
        made[client] += 1
        await asyncio.sleep(0.01 if client == "fast" else 0.1)
        loads[client] -= len(group.requests)
        return answer(group)

    places = collect(Dispatcher(servers("fast", "slow"), ask, 12, 600, 5, Counter()), requests(40, 4))
    assert sorted(places) == list(range(160))
    assert peak["fast"] <= 12 and peak["slow"] <= 12
    assert made["fast"] > 3 * made["slow"]


@pytest.mark.parametrize("kind", ["late", "unreachable", "status_500", "status_503", "garbage", "empty", "choices"])
def test_a_failing_servers_groups_are_made_elsewhere_once_and_counted(kind):
    counts = Counter()

    async def ask(client, group):
        if client == "bad":
            raise ServerError(kind, "no")
        await asyncio.sleep(0.01)
        return answer(group)

    pool = servers("bad", "good")
    places = collect(Dispatcher(pool, ask, 8, 600, 5, counts), requests(10, 4))
    assert sorted(places) == list(range(40))
    assert counts[f"errors/{kind}"] >= 1 and counts["resent"] >= 1
    assert not pool["bad"].trusted and pool["bad"].last_error == f"{kind}: no"


@pytest.mark.parametrize("kind", ["late", "status_500", "garbage"])
def test_a_failed_request_costs_that_request_alone(kind):
    asked = Counter()

    async def ask(client, group):
        asked[group.places[0]] += 1
        if group.places[0] == 8 and asked[8] <= 2:
            await asyncio.sleep(0.05)
            raise ServerError(kind, "no")
        await asyncio.sleep(0.4)
        return answer(group)

    async def run() -> list[int]:
        async def know():  # the weights of a server that failed, as the keeper does
            while True:
                await asyncio.sleep(0.05)
                pool["one"].version = VERSION

        knowing, places = asyncio.create_task(know()), []
        async for group, _ in Dispatcher(pool, ask, 256, 600, 5, Counter()).run(groups_of(requests(20, 4)), VERSION):
            places += group.places
        knowing.cancel()
        return places

    pool = servers("one")
    assert sorted(asyncio.run(run())) == list(range(80))
    assert asked.total() == 22 and asked[8] == 3


def test_a_late_request_does_not_tell_against_a_server_that_finishes_others():
    late = []

    async def ask(client, group):
        await asyncio.sleep(0.05 if group.places[0] else 0.3)
        if not group.places[0] and not late:
            late.append(client)
            raise ServerError("late", "no")
        return answer(group)

    pool = servers("one")
    assert sorted(collect(Dispatcher(pool, ask, 64, 600, 5, Counter()), requests(10, 1))) == list(range(10))
    assert late == ["one"] and pool["one"].last_error == "never came up" and pool["one"].not_before == 0


def test_groups_that_fail_together_are_one_failure():
    failed = []

    async def ask(client, group):
        if client == "bad" and len(failed) < 8:
            failed.append(group)
            await asyncio.sleep(0.1)
            raise ServerError("late", "no")
        return answer(group)

    pool = servers("bad")
    began = time.monotonic()
    assert len(collect(Dispatcher(pool, ask, 8, 600, 5, Counter()), requests(12, 1))) == 12
    assert len(failed) == 8 and time.monotonic() - began < 4  # a pause of half a second, not of thirty


def test_a_server_that_fails_every_request_is_given_up_however_often_it_answers_a_probe():
    async def ask(client, group):
        raise ServerError("status_503", "overloaded")

    async def run():
        async def probe():
            while True:
                await asyncio.sleep(0.05)
                pool["one"].heard()
                pool["one"].version = VERSION

        probing = asyncio.create_task(probe())
        try:
            async for _ in Dispatcher(pool, ask, 8, 600, 1.0, Counter()).run(groups_of(requests(2, 2)), VERSION):
                pass
        finally:
            probing.cancel()

    pool = servers("one")
    with pytest.raises(RolloutsLost, match="one: status_503: overloaded"):
        asyncio.run(asyncio.wait_for(run(), 20))


def test_a_server_that_is_taken_out_lets_go_of_its_other_groups():
    async def ask(client, group):
        if client == "hung":
            await asyncio.sleep(60)
        return answer(group)

    async def run():
        pool, counts, places = servers("hung", "good"), Counter(), []
        dispatcher = Dispatcher(pool, ask, 8, 600, 5, counts)

        async def notice():
            await asyncio.sleep(0.1)
            pool["hung"].failed(ServerError("late", "no sign of life"))

        watching = asyncio.create_task(notice())
        async for group, _ in dispatcher.run(groups_of(requests(10, 4)), VERSION):
            places += group.places
        await watching
        return places, counts

    began = time.monotonic()
    places, counts = asyncio.run(run())
    assert sorted(places) == list(range(40)) and counts["resent"] == 2
    assert time.monotonic() - began < 10


def test_a_server_with_other_weights_is_not_asked():
    asked = []

    async def ask(client, group):
        asked.append(client)
        return answer(group)

    pool = servers("stale", "good")
    pool["stale"].version = "run-2"
    collect(Dispatcher(pool, ask, 8, 600, 5, Counter()), requests(10, 2))
    assert set(asked) == {"good"}


def test_a_server_that_comes_back_is_tried_with_one_group_before_it_is_trusted():
    flying, failed, on_trial = Counter(), [], []

    async def ask(client, group):
        flying[client] += 1
        if client == "shaky" and not pool["shaky"].trusted:
            on_trial.append(flying[client])
        await asyncio.sleep(0.02 if client == "shaky" else 0.3)
        flying[client] -= 1
        if client == "shaky" and len(failed) < 64:  # all that it is asked at first
            failed.append(group)
            raise ServerError("status_500", "no")
        return answer(group)

    async def run():
        dispatcher, places = Dispatcher(pool, ask, 64, 600, 5, Counter()), []
        async for group, _ in dispatcher.run(groups_of(requests(200, 1)), VERSION):
            places += group.places
            pool["shaky"].version = VERSION  # as the keeper finds out
        return places

    pool = servers("shaky", "good")
    assert sorted(asyncio.run(run())) == list(range(200))
    assert on_trial == [1] and pool["shaky"].trusted and pool["shaky"].failures == 0


def test_without_a_usable_server_it_gives_up_in_time_and_says_what_it_knows():
    async def ask(client, group):
        raise ServerError("status_503", "overloaded")

    pool = servers("one", "two")
    pool["two"].client, pool["two"].last_error = None, "ended with code 1: out of memory"
    began = time.monotonic()
    with pytest.raises(RolloutsLost) as lost:
        collect(Dispatcher(pool, ask, 8, 600, 1.0, Counter()), requests(2, 2))
    assert 0.9 < time.monotonic() - began < 5
    assert "one: status_503: overloaded" in str(lost.value) and "two: ended with code 1" in str(lost.value)


def test_a_request_that_is_wrong_in_itself_is_not_sent_again():
    async def ask(client, group):
        raise RequestRefused("prompt too long")

    with pytest.raises(RequestRefused):
        collect(Dispatcher(servers("one", "two"), ask, 8, 600, 5, Counter()), requests(4, 2))


def test_back_off_grows_and_has_an_end():
    server, pauses = ServerState("x", client="x"), []
    for _ in range(10):
        server.failed(ServerError("late", ""))
        pauses.append(round(server.not_before - time.monotonic(), 1))
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0] and pauses[-1] == dispatch.LONGEST_BACK_OFF
