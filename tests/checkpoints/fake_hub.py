"""A model hub on the loopback device: what a download needs of the protocol, counted requests, faults on order."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Files of at least this size are stored like large files, with their SHA-256 as the tag."""


@dataclass
class Fault:
    """What goes wrong with requests whose path matches: a `status`, another `body`, a cut after `cut` bytes, false
    bytes, or `delay` seconds of silence.
    """

    path: str
    method: str = "GET|HEAD"
    status: int | None = None
    code: str | None = None
    cut: int | None = None
    garble: bool = False
    body: bytes | None = None
    delay: float = 0.0
    times: int = 1000


@dataclass
class Hub:
    """Repositories as commit -> path -> content, branches as name -> commit, and the log of requests."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def push(self, repo: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """Publish files, or the content of a folder, as the newest commit of a branch; return the commit."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        seed = repr((repo, branch, len(self.commits.get(repo, {})), sorted(files)))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def gets(self) -> list[str]:
        """Return the file names that were fetched, without the list requests."""
        return [path.split("/", 5)[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path, self.headers.get("Range")))
        fault = self.take_fault(method, path)
        if fault and fault.delay:
            self.hub.closing.wait(fault.delay)
        if fault and fault.body is not None and "/resolve/" not in path:
            self.reply(200, fault.body, {"Content-Type": "text/html"})
        elif fault and fault.status:
            self.reply(fault.status, b"{}", {"X-Error-Code": fault.code} if fault.code else {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.info(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            self.tree(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self.info(match[1], "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(method, *match.groups(), fault=fault)
        else:
            self.reply(404, b"{}", {})

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.hub.commits:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.hub.branches[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, self.hub.commits[repo][commit]

    def info(self, repo: str, revision: str) -> None:
        if found := self.files(repo, revision):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in found[1].items()]
            self.reply_json({"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        if found := self.files(repo, revision):
            self.reply_json([self.entry(name, data) for name, data in found[1].items()])

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def file(self, method: str, repo: str, revision: str, name: str, fault: Fault | None) -> None:
        found = self.files(repo, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data = files[name]
        tag = (hashlib.sha256 if len(data) >= LARGE else hashlib.sha1)(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if fault and fault.garble:
            data = bytes(byte ^ 1 for byte in data)
        if fault and fault.body is not None:
            data = fault.body.ljust(len(data))[: len(data)]
        status = 200
        if (wanted := self.headers.get("Range")) and method == "GET":
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self.reply(status, data, headers, cut=fault.cut if fault and method == "GET" else None)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """Hangs up at the end, so that no thread waits for further requests on an open connection."""

    connections: list[socket.socket]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = Server(("127.0.0.1", 0), handler)
    server.connections = []
    server.daemon_threads = False  # closing waits for them
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.hang_up()
        server.server_close()
        thread.join()
