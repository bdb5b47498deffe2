"""A stand-in for a vLLM server that answers at once, and wrongly if told to. For what real servers will not do."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web
from transformers import AutoTokenizer

from r1dist.generation.vllm.plugin.guard import ENGINE_HEADER
from r1dist.tiny import BASE_DIR

LOGPROB = -1.0


def _tiny_ids(text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(BASE_DIR)(text, add_special_tokens=False)["input_ids"]


class StubServer:
    """Speaks the part of vLLM's HTTP that the engine uses, in a thread of its own.

    `misbehave(kind)` makes every completion after it wrong: an HTTP status as text, `garbage`, `empty`,
    `choices`, `nan`, `hang`; None makes it right again. `hold(prompt, times)` never answers that prompt so often.
    `refused` are the control calls that it answers wrongly: an HTTP status as text, or `die` to hang up.

    Args:
        receiver: vLLM's engine that takes weights, for what is sent to be taken; None takes nothing.
    """

    def __init__(self, tokens: int = 4, receiver: Any = None):
        self.tokens = tokens
        self.receiver = receiver
        self.refused: dict[str, str] = {}
        self.calls: list[str] = []  # control calls and completions, in their order
        self.asleep: set[str] = set()
        self.updating = False
        self.version = "default"
        self.wrong: str | None = None
        self.delay = 0.0  # seconds for a completion
        self.busy = False  # its engine computes and answers nothing else
        self.engine: dict | None = None  # what the middleware tells of it
        self.models = {"max_model_len": 256, "root": "some/model"}
        self.settings = {
            "weight_transfer_config": {"backend": "shm"},
            "scheduler_config": {"enable_chunked_prefill": False},
            "device_config": {"device": "cpu"},
        }
        self.tokenize: Callable[[str], list[int]] = _tiny_ids
        self.held: Counter[tuple[int, ...]] = Counter()
        self.asked: Counter[str] = Counter()
        self.seeds: list[int] = []
        self._stopping = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def misbehave(self, kind: str | None) -> None:
        self.wrong = kind

    def hold(self, prompt: list[int], times: int) -> None:
        self.held[tuple(prompt)] = times

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _start(self) -> str:
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/weight_info", self._info)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/get_world_size", self._world_size)
        app.router.add_post("/{control}", self._control)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(headers={} if self.engine is None else {ENGINE_HEADER: json.dumps(self.engine)})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [self.models]})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"vllm_config": self.settings})

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": self.tokenize((await request.json())["prompt"])})

    async def _info(self, request: web.Request) -> web.Response:
        while self.busy and not self._stopping.is_set():
            await asyncio.sleep(0.05)
        return web.json_response({"weight_version": self.version})

    async def _world_size(self, request: web.Request) -> web.Response:
        return web.json_response({"world_size": 1})

    async def _control(self, request: web.Request) -> web.Response:
        name = request.match_info["control"]
        tags = request.query.getall("tags", [])
        self.asked[name] += 1
        self.calls.append(f"{name}({','.join(tags)})" if tags else name)
        refused = self.refused.get(name)
        if refused == "die":
            request.transport.close()
        elif refused is not None:
            self.updating &= name != "update_weights"
            return web.Response(text="refused", status=int(refused))
        body = await request.json() if request.can_read_body else {}
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._act, name, tags, body)
        except Exception as error:  # as vLLM does
            return web.Response(text=f"{type(error).__name__}: {error}", status=500)
        return web.json_response({"success": True})

    def _act(self, name: str, tags: list[str], body: dict) -> None:
        """What vLLM's worker does, in its order and with its checks."""
        if name == "update_weight_version":
            self.version = body["new_version"]
        elif name == "sleep":
            self.asleep = {"weights", "kv_cache"}
        elif name == "wake_up":
            self.asleep -= set(tags)
        elif name == "init_weight_transfer_engine" and self.receiver:
            self.receiver.init_transfer_engine(self.receiver.parse_init_info(body["init_info"]))
        elif name == "start_weight_update":
            if self.updating:
                raise RuntimeError("start_weight_update called while a weight update is already active.")
            if "weights" in self.asleep:
                raise RuntimeError("this memory is not mapped")
            self.updating = True
            if self.receiver:
                self.receiver.start_weight_update()
        elif name in ("update_weights", "finish_weight_update"):
            if not self.updating:
                raise RuntimeError("start_weight_update must be called first.")
            try:
                if name == "update_weights" and self.receiver:
                    self.receiver.update_weights(body["update_info"])
                elif self.receiver:
                    self.receiver.finish_weight_update()
                self.updating = name == "update_weights"
            except BaseException:
                self.updating = False
                raise

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked["unseeded"] += "seed" not in body
        if "prompt_logprobs" in body:
            positions = [None, *({str(token): {"logprob": LOGPROB}} for token in body["prompt"][1:])]
            return web.json_response({"choices": [{"prompt_logprobs": positions}]})
        self.asked["completions"] += 1
        self.calls.append("completions")
        if self.held[tuple(body["prompt"])]:
            self.held[tuple(body["prompt"])] -= 1
            await self._stopping.wait()
        await asyncio.sleep(self.delay)
        if self.wrong is None:
            self.seeds += range(body["seed"], body["seed"] + body["n"])
        elif self.wrong.isdigit():
            return web.json_response({"error": "no"}, status=int(self.wrong))
        elif self.wrong == "garbage":
            return web.Response(text="<html>bad gateway</html>")
        elif self.wrong == "hang":
            await self._stopping.wait()
        choices = [self._choice(index, body) for index in range(body["n"])]
        return web.json_response({"choices": choices[1:] if self.wrong == "choices" else choices})

    def _choice(self, index: int, body: dict) -> dict:
        ids = [] if self.wrong == "empty" else [5 + (body["seed"] + index) % 7] * min(self.tokens, body["max_tokens"])
        logprobs = [None if self.wrong == "nan" else LOGPROB] * len(ids)
        return {"index": index, "token_ids": ids, "finish_reason": "stop", "logprobs": {"token_logprobs": logprobs}}
