"""A stand-in for an LLM server that judges, and for a vLLM server that holds a reward model: real HTTP, scripted."""

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

Answer = tuple[int, str, dict]
"""Status, text, headers."""


def by_length(question: str) -> str:
    """A reply with a score that depends on the question alone."""
    lowest, highest = map(int, re.search(r"from (\d+) to (\d+)\.$", question).groups())
    return f"Let me see.\nScore: {lowest + len(question) % (highest - lowest + 1)}"


class JudgeStub:
    """Answers `/v1/chat/completions` by `reply`, and `/classify` by `logits`, in a thread of its own; a context.

    `script` holds what comes instead, first: (status, text, headers), or `hang`, `hang up`; `always` what comes then.
    After `most` answers it has only the status 503.
    """

    def __init__(self, most: int | None = None):
        self.most = most
        self.reply: Callable[[str], Any] = by_length
        self.logits: Callable[[list[int]], list[float]] = lambda ids: [len(ids) / 10 - 3]
        self.script: list[Answer | str] = []
        self.always: Answer | str | None = None
        self.delay = 0.0
        self.asked: list[dict] = []
        self.times: list[float] = []
        self.keys: Counter[str | None] = Counter()
        self.busy, self.most_busy = 0, 0
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> "JudgeStub":
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.root = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.url = f"{self.root}/v1"
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]

    async def _start(self) -> str:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/classify", self._classify)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _chat(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._reply)

    async def _classify(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._scores)

    def _reply(self, body: dict) -> dict:
        reply = self.reply(body["messages"][0]["content"])
        return {"choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}]}

    def _scores(self, body: dict) -> dict:
        (ids,) = body["input"]
        return {"data": [{"index": 0, "label": "LABEL_0", "probs": self.logits(ids), "num_classes": 1}]}

    async def _answer(self, request: web.Request, answer: Callable[[dict], dict]) -> web.Response:
        body = await request.json()
        number = len(self.asked)
        self.asked.append(body)
        self.times.append(time.monotonic())
        self.keys[request.headers.get("Authorization")] += 1
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            await asyncio.sleep(self.delay)
            scripted = self.script.pop(0) if self.script else self.always
            if self.most is not None and number >= self.most:
                scripted = (503, "out of order", {})
            if scripted == "hang":
                await asyncio.sleep(60)
            if scripted == "hang up":
                request.transport.close()
            if isinstance(scripted, tuple):
                status, text, headers = scripted
                return web.Response(status=status, text=text, headers=headers)
            return web.json_response(answer(body))
        finally:
            self.busy -= 1
