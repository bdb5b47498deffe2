"""The dispatcher over simulated servers on virtual time: hours of long completions in seconds."""

import asyncio
import random
import selectors
from collections import Counter, deque
from types import SimpleNamespace

import pytest

from r1dist.config import Rollout
from r1dist.generation.engine import Request, sample_seed
from r1dist.generation.vllm import dispatch, liveness
from r1dist.generation.vllm.client import Completion, Health, ServerError
from r1dist.generation.vllm.dispatch import Dispatcher, ServerState, groups_of
from r1dist.generation.vllm.liveness import Liveness

VERSION = "run-3"
# configs/recipes/qwen2.5-7b/r1_zero.yaml on a node of eight GPUs with 80 GB: four train, four serve.
RANKS = SERVERS = 4
ROLLOUTS, GROUP, PROMPT = 8192, 16, 200
CACHE_TOKENS = 1_000_000  # of 28 layers, 4 key-value heads of 128 in bfloat16, in what the weights leave of 92 %
STEP_SECONDS, SAMPLE_SECONDS = 0.01, 0.00023  # a decoding step, and what one more sample in it adds
CHUNK = 64  # tokens between two looks of the simulation


class VirtualSelector(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout=None):
        self.now += timeout or 0.0
        return super().select(0)


class SimulatedServer:
    """First come, first served, as many samples at once as the cache holds; it computes the youngest again else."""

    def __init__(self, loses: int):
        self.queue: deque[list] = deque()  # [length, done tokens, future]
        self.running: list[list] = []
        self.tokens = 0.0
        self.used = 0  # tokens in the cache
        self.loses = loses
        self.asked = self.most = 0

    async def health(self, timeout: float) -> Health:
        unfinished = len(self.queue) + len(self.running)
        return Health(running=unfinished, processor_seconds=self.tokens, tokens=self.tokens)

    async def complete(self, lengths: list[int]) -> list[Completion]:
        self.asked += len(lengths)
        self.most = max(self.most, self.asked)
        try:
            if self.loses:
                self.loses -= 1
                await asyncio.sleep(10**9)
            samples = [[length, 0, asyncio.get_running_loop().create_future()] for length in lengths]
            self.queue.extend(samples)
            await asyncio.gather(*(sample[2] for sample in samples))
        finally:
            self.asked -= len(lengths)
        return [Completion([1], [0.0], "length") for _ in lengths]

    async def compute(self) -> None:
        while True:
            while self.queue and self.used + PROMPT + self.queue[0][1] + CHUNK <= CACHE_TOKENS:
                self.running.append(self.queue.popleft())
                self.used += PROMPT + self.running[-1][1]
            if not self.running:
                await asyncio.sleep(1)
                continue
            await asyncio.sleep(CHUNK * (STEP_SECONDS + SAMPLE_SECONDS * len(self.running)))
            self.tokens += CHUNK * len(self.running)
            self.used += CHUNK * len(self.running)
            for sample in self.running:
                sample[1] += CHUNK
                if sample[1] >= sample[0] and not sample[2].done():
                    sample[2].set_result(None)
                    self.used -= PROMPT + sample[1]
            self.running = [sample for sample in self.running if not sample[2].done()]
            while self.used > CACHE_TOKENS:
                self.queue.appendleft(self.running.pop())
                self.used -= PROMPT + self.queue[0][1]


def generate(monkeypatch, longest: int, loses: int = 0) -> tuple[Counter, list[SimulatedServer], float]:
    """One generation by all ranks; what they counted, the servers, and the virtual seconds."""
    selector = VirtualSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    for module in (dispatch, liveness):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    monkeypatch.setattr(dispatch, "TICK", 2.0)
    settings, draw = Rollout(), random.Random(0)
    # Later in a run most completions are long; a tenth has no end.
    lengths = [longest if draw.random() < 0.1 else draw.randint(longest // 4, longest) for _ in range(ROLLOUTS)]
    simulated = [SimulatedServer(loses if number == 0 else 0) for number in range(SERVERS)]
    counts: Counter = Counter()

    async def rank(number: int) -> int:
        servers = {str(n): ServerState(str(n), server, Liveness(server, settings.health_timeout), VERSION)
                   for n, server in enumerate(simulated)}  # fmt: skip

        async def ask(server: SimulatedServer, group) -> list[Completion]:
            return await server.complete(
                [lengths[request.prompt_id * GROUP + request.sample_index] for request in group.requests]
            )

        async def watch() -> None:
            while True:
                for server in servers.values():
                    try:
                        await server.liveness.probe(settings.health_timeout)
                        server.heard()
                    except ServerError as error:
                        server.failed(error)
                await asyncio.sleep(1)

        prompts = range(number, ROLLOUTS // GROUP, RANKS)
        asked = [Request([7, p], p, i, sample_seed(0, 3, p, i)) for p in prompts for i in range(GROUP)]
        dispatcher = Dispatcher(servers, ask, settings.max_concurrent_requests // RANKS, settings.request_timeout,
                                settings.no_server_timeout, counts)  # fmt: skip
        watching, finished = asyncio.create_task(watch()), 0
        async for group, _ in dispatcher.run(groups_of(asked), VERSION):
            finished += len(group.requests)
        watching.cancel()
        return finished

    async def run() -> list[int]:
        computing = [asyncio.create_task(server.compute()) for server in simulated]
        finished = await asyncio.gather(*map(rank, range(RANKS)))
        for task in computing:
            task.cancel()
        return finished

    assert loop.run_until_complete(run()) == [ROLLOUTS // RANKS] * RANKS
    return counts, simulated, selector.now


@pytest.mark.parametrize("longest", [1024, 4096, 16384])
def test_nothing_is_sent_twice_however_long_the_completions(monkeypatch, longest):
    counts, servers, seconds = generate(monkeypatch, longest)
    assert counts == Counter()
    assert max(server.most for server in servers) <= Rollout().max_concurrent_requests
    # Long ones wait in the servers' queues for longer than a request may go without progress.
    assert longest < 16384 or seconds > 10 * Rollout().request_timeout


def test_a_request_that_a_server_lost_is_sent_again_once_it_has_no_other_work(monkeypatch):
    counts, _, _ = generate(monkeypatch, 1024, loses=1)
    assert counts == Counter({"errors/late": 1, "resent": 1})
