"""The guard at a server's door: no path answers without the run's token, and `/health` tells how the engine does.

vLLM's `--api-key` guards only the paths of its public API; its development paths run arbitrary methods.
"""

import json
import os
import secrets

TOKEN = "R1DIST_SERVER_TOKEN"
"""Environment variable: the token that every request must carry, as `Authorization: Bearer <token>`."""
ENGINE_HEADER = "x-r1dist-engine"
"""Of the answer to `/health`: JSON with `running`, `processor_seconds`, `tokens` and `shape`, see `client.Health`."""
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")
TOKENS = "vllm:generation_tokens_total"


class TokenGuard:
    """ASGI middleware for vLLM's `--middleware`: 401 for whoever does not know the token, whatever the path.

    Raises `KeyError` when the server is started without a token: it then does not start.
    """

    def __init__(self, app):
        self.app = app
        self.expected = f"Bearer {os.environ[TOKEN]}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not secrets.compare_digest(given, self.expected):
            return await _refuse(scope, send)
        if scope["path"] == "/health":
            send = self._with_engine(scope, send)
        await self.app(scope, receive, send)

    def _with_engine(self, scope, send):
        """`send`, with the engine's state as a header."""

        async def send_with_header(message) -> None:
            if message["type"] == "http.response.start":
                value = json.dumps(self._state(scope)).encode()
                message = {**message, "headers": [*message["headers"], (ENGINE_HEADER.encode(), value)]}
            await send(message)

        return send_with_header

    def _state(self, scope) -> dict:
        client = scope["app"].state.engine_client
        model = client.vllm_config.model_config.hf_text_config
        return {
            "running": client.get_num_unfinished_requests(),
            "processor_seconds": processor_seconds(),
            "tokens": _generated_tokens(),
            "shape": {name: getattr(model, name, None) for name in SHAPE},
        }


def processor_seconds() -> float | None:
    """Of this process's descendants: the engine, its workers, and the compilers that a worker waits for.

    None where there are none, or where one ended meanwhile.
    """
    import psutil

    # Those of a child that has ended are its parent's `children_*`.
    try:
        return sum(sum(p.cpu_times()[:4]) for p in psutil.Process().children(recursive=True)) or None
    except psutil.NoSuchProcess:
        return None


def _generated_tokens() -> float:
    """Since the server's start; 0 with `--disable-log-stats`."""
    from prometheus_client import REGISTRY

    families = REGISTRY.restricted_registry([TOKENS]).collect()
    return sum(sample.value for family in families for sample in family.samples if sample.name == TOKENS)


async def _refuse(scope, send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"error": "this server asks for the token of its run"}'})
