"""The guard at a server's door: no path answers without the run's token.

vLLM's `--api-key` guards only the paths of its public API; its development paths run arbitrary methods.
"""

import os
import secrets

TOKEN = "R1DIST_SERVER_TOKEN"
"""Environment variable: the token that every request must carry, as `Authorization: Bearer <token>`."""


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
        if secrets.compare_digest(given, self.expected):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "this server asks for the token of its run"}'})
