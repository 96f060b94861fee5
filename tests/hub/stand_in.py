"""A local server with a package index and the Hub's HTTP API, for tests without internet."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from forks import server

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".pth", ".gguf")  # in LFS on the Hub, with a sha256


@dataclass
class Repository:
    """Files and access rules of a repository."""

    files: dict[str, bytes]
    gated: bool = False
    token: str | None = None  # private: accessible with this token only
    damaged: dict[str, bytes] = field(default_factory=dict)  # served instead, with the old checksum


class StandIn(ThreadingHTTPServer):
    """Serves the Hub's API and an index, records requests, and breaks connections if configured."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.wheels: dict[str, bytes] = {}
        self.page = ""  # instead of a page of links to them all
        self.password: str | None = None  # the Authorization that the index requires
        self.moved_to = ""  # another URL of the same files, to which the index redirects
        self.authorizations: list[str | None] = []
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.break_after: dict[str, list[int]] = {}  # file -> bytes sent before each break
        self.stall = threading.Event()  # if set, large files stop half-way and wait
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, name: str) -> list[str | None]:
        """The Range header of every GET of that file."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(name)]

    def handle_error(self, request: object, client_address: object) -> None:
        """A killed client closes its connection, which is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[0] in ("simple", "wheels", "http:"):
            self.index(parts[2:] if parts[0] == "http:" else parts)  # http: a request to a proxy
        else:
            self.reply(404, b"{}")

    def index(self, parts: list[str]) -> None:
        """A page of the package index, or one of its files."""
        parts = parts if parts[0] in ("simple", "wheels") else parts[1:]
        authorization, server = self.headers.get("Authorization"), self.server
        server.authorizations.append(authorization)
        if server.moved_to and (self.headers.get("Host") or "") not in server.moved_to:
            self.reply(302, b"", {"Location": server.moved_to + self.path})
        elif server.password not in (None, authorization):
            self.reply(401, b"")
        elif parts[0] == "wheels":
            self.reply(200, server.wheels[parts[1]], name=parts[1])
        else:
            links = "".join(f'<a href="/wheels/{w}">{w}</a>' for w in server.wheels)
            page = server.page or f"<!DOCTYPE html><html><body>{links}</body></html>"
            self.reply(200, page.encode(), {"Content-Type": "text/html"})

    def repository(self, name: str, revision: str) -> Repository | None:
        """The repository, or None after the refusal has been sent."""
        found = self.server.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if found is None or (found.token is not None and found.token != token):
            self.refuse(401, "", "Invalid username or password.")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found
        return None

    def listing(self, name: str, revision: str) -> None:
        found = self.repository(name, revision)
        if found is None:
            return
        siblings: list[dict[str, object]] = []
        for file, content in found.files.items():
            row: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": "0" * 40}
            if file.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 100}
            siblings.append(row)
        body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
        body |= {"private": False, "gated": "manual" if found.gated else False, "tags": []}
        self.reply(200, json.dumps(body | {"downloads": 0, "likes": 0}).encode())

    def file(self, repository: str, revision: str, name: str) -> None:
        found = self.repository(repository, revision)
        if found is None:
            return
        if found.gated:
            self.refuse(403, "GatedRepo", "Access to this model is restricted.")
        elif name not in found.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = found.files[name]
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            self.reply(200, found.damaged.get(name, content), headers, name)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, name: str = ""
    ) -> None:
        start = self.headers.get("Range")
        if status == 200 and start is not None:
            first = int(start.removeprefix("bytes=").rstrip("-"))
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-/{len(body)}"}
            status, body = 206, body[first:]
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body, name)

    def send_body(self, body: bytes, name: str) -> None:
        breaks = self.server.break_after.get(name, [])
        if breaks:
            self.wfile.write(body[: breaks.pop(0)])
            self.close_connection = True
        elif self.server.stall.is_set() and name.endswith((".whl", ".safetensors")):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.release.wait(30)
        else:
            self.wfile.write(body)


@dataclass
class Sandbox:
    """A user with an empty cache, configured for the test server."""

    home: Path
    environment: dict[str, str]

    def start(self, **request: object) -> subprocess.Popen[str]:
        child = Path(__file__).parent / "child.py"
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(child), json.dumps(request)],
            env=self.environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **request: object) -> dict:
        """The answer of a new process: {"path"} or {"error"}, progress and cached models."""
        children = server(Path(__file__).parent / "children.py", "-W", "error")
        done = children.run(request, self.environment, self.home)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "libraries print nothing"
        return json.loads(done.stdout)


def write_wheel(folder: Path, member: str, content: bytes) -> Path:
    """A wheel like that of the default model: one large file and its metadata."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
