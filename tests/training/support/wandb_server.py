"""Stands in for a W&B server: takes what is uploaded, and says what W&B's client needs to hear."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Has one run, of any name. ``environment`` leads W&B's client to it; ``refuse`` is a status to answer with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "0" * 40}
        self.refuse: int | None = None
        self.requests: list[dict[str, Any]] = []  # of the file stream
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def lines(self, name: str = "wandb-history.jsonl") -> list[dict[str, Any]]:
        """What has come of a file, each line where it was said to belong."""
        lines: dict[int, str] = {}
        for request in self.requests:
            file = (request.get("files") or {}).get(name, {"offset": 0, "content": []})
            lines |= dict(enumerate(file["content"], file["offset"]))
        return [json.loads(lines[number]) for number in sorted(lines)]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        history = self.lines()
        count = {"historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0}
        match re.match(r"\s*\w+ (\w*)", query)[1]:
            case "RunResumeStatus":
                tails = {"historyTail": json.dumps([json.dumps(line) for line in history[-1:]]), "eventsTail": "[]"}
                about = {"summaryMetrics": json.dumps((self.lines("wandb-summary.json") or [{}])[-1]), "config": "{}"}
                bucket = {"name": variables["name"], "tags": [], "wandbConfig": '{"t": 1}'} | count | tails | about
                return {"model": project | {"bucket": bucket if history else None}}
            case "UpsertBucket":
                bucket = {"id": "b", "name": variables["name"], "displayName": "d", "config": "{}", "project": project}
                return {"upsertBucket": {"bucket": bucket | count, "inserted": not history}}
            case "CreateRunFiles":
                urls = [
                    {"name": n, "uploadUrl": f"{self.environment['WANDB_BASE_URL']}/{n}"} for n in variables["files"]
                ]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": urls}}
        return {}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuse:
            return self._say({"errors": [{"message": "no"}]}, self.server.refuse)
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            self.server.requests.append(json.loads(body))
            return self._say({})
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            return self._say({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
        return self._say({})  # what W&B's client reports of itself

    do_GET = do_PUT = do_POST  # noqa: N815

    def _say(self, what: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output free of it."""
