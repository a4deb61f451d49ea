"""As much of W&B's server as `wandb sync` talks to, on this machine, with a memory of it."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.ranks import ONLY_WAITS


class FakeWandb:
    """What arrived, by run id. A client that says where in a file its lines belong is obeyed."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        """The last value of each field that a run was set up with."""
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.refuse_history_of: set[str] = set()
        """Runs whose history is answered with an error, as if W&B broke down there."""

    def graphql(self, query: str, variables: dict[str, Any], url: str) -> dict[str, Any]:
        if "upsertBucket" in query:
            name = variables["name"]
            known = {k: v for k, v in variables.items() if v is not None}
            inserted = name not in self.runs
            self.runs.setdefault(name, {}).update(known)
            return {"upsertBucket": {"bucket": self.bucket(name), "inserted": inserted}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{url}/upload/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query or "bucket(" in query:
            name = variables["name"]
            bucket = self.bucket(name) if name in self.runs else None
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e"}, "bucket": bucket}}
        return {}

    def bucket(self, name: str) -> dict[str, Any]:
        lines = self.history.get(name, [])
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": self.runs[name].get("displayName", name),
            "description": "",
            "config": self.runs[name].get("config", "{}"),
            "sweepName": None,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}},
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def stream(self, run: str, body: dict[str, Any]) -> int:
        """Take lines of a run's files; the HTTP status."""
        if run in self.refuse_history_of:
            return 400
        part = (body.get("files") or {}).get("wandb-history.jsonl")
        if part:
            lines = self.history.setdefault(run, [])
            lines[part["offset"] :] = [json.loads(line) for line in part["content"]]
        return 200


@contextmanager
def fake_wandb() -> Iterator[tuple[FakeWandb, str]]:
    """The server's memory, and its address."""
    fake = FakeWandb()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_POST(self) -> None:
            data = self.read()
            if self.path != "/graphql" and not self.path.endswith("/file_stream"):
                return self.answer({})  # such as W&B's figures about itself, which are not JSON
            body = json.loads(data)
            fake.requests.append(f"{self.path} {body.get('operationName') or ''!s}".strip())
            if self.path == "/graphql":
                self.answer({"data": fake.graphql(body["query"], body.get("variables") or {}, url)})
            else:
                self.answer({}, fake.stream(self.path.split("/")[-2], body))

        def do_PUT(self) -> None:
            self.read()
            fake.uploads.append(self.path.removeprefix("/upload/"))
            self.answer({})

        def do_GET(self) -> None:
            self.answer({})

        def read(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def answer(self, body: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(name=ONLY_WAITS, target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake, url
    finally:
        server.shutdown()
        server.server_close()
