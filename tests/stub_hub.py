"""A stand-in for the Hugging Face hub's HTTP, for the real client: accounts, repositories, commits, cards."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ACCOUNTS = {"hf_writes": ("somebody", "write"), "hf_reads": ("somebody", "read")}
"""Token -> account and role."""


class StubHub:
    """Serves while its context lasts. `repositories`: id -> branch -> path -> content; `private`: the private ones.

    `cards`: (kind, id) -> metadata of a model's or dataset's card. `refuse_commits`: answer the next ones with 403.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.cards: dict[tuple[str, str], dict] = {}
        self.messages: list[str] = []
        self.calls: list[str] = []
        self.refuse_commits = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _do(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                path = self.path.partition("?")[0]
                hub.calls.append(f"{self.command} {path}")
                status, answer = hub.answer(self.command, path, token, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = _do

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repository][branch]

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict | list]:
        if found := re.fullmatch(r"/api/(models|datasets)/([\w.-]+(?:/[\w.-]+)?)", path):
            card = self.cards.get((found[1], found[2]))
            return (200, {"id": found[2], "cardData": card}) if card is not None else (404, {"error": "not found"})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if token not in ACCOUNTS:
            return 401, {"error": "Invalid credentials in Authorization header"}
        account, role = ACCOUNTS[token]
        if path == "/api/whoami-v2":
            return 200, {"name": account, "auth": {"accessToken": {"displayName": "mine", "role": role}}}
        if role == "read":
            return 403, {"error": "this token may only read"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked.get("organization") not in (None, account):
                return 403, {"error": f"You don't have the rights to create a model under {asked['organization']}"}
            name = f"{account}/{asked['name']}"
            self.repositories.setdefault(name, {"main": {}})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.private.add(name)
            return 200, {"url": f"{self.url}/{name}"}
        verb = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|tree|branch)/([\w.-]+)", path)
        if verb is None or verb[1] not in self.repositories:
            return 404, {"error": "not found"}
        branches = self.repositories[verb[1]]
        if verb[2] == "branch":
            branches.setdefault(verb[3], dict(branches["main"]))
            return 200, {}
        files = branches[verb[3]]
        if verb[2] == "tree":
            return 200, [{"type": "file", "path": name, "size": len(c), "oid": "0"} for name, c in files.items()]
        if verb[2] == "preupload":
            asked = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **how} for file in asked]}
        if self.refuse_commits:
            self.refuse_commits -= 1
            return 403, {"error": "storage limit reached"}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        return 200, {"commitUrl": f"{self.url}/{verb[1]}/commit/0", "commitOid": "0", "success": True}
