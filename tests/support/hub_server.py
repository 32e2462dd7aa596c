"""Stand-in for the Hugging Face hub on loopback: its API, and downloads that can start at any byte.

It follows https://huggingface.co/docs/hub/api and huggingface_hub's own client.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants, file_download

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class Branches:
    """Repository of a data set or model: the files of each branch, as bytes by path."""

    branches: dict[str, dict[str, bytes]]
    gated: bool = False

    def commit(self, branch: str) -> str:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.branches[branch].items())
        return hashlib.sha1(json.dumps([branch, content]).encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        return next((branch for branch in self.branches if revision in (branch, self.commit(branch))), None)


@dataclass
class HubServer:
    """Server of `repositories` by name, and of `files` by path as another web server would.

    Attributes:
        requests: (method, path, Range header) of every request so far.
        tokens: (path, Authorization header) of every request so far.
        break_off: the number of bytes after which the next download of a path breaks off.
        failures: HTTP statuses of the next responses, by (method, path).
        without_length: paths of files that are sent in chunks, without a length.
        without_version: send `files` without an ETag.
        hangs_up: close every connection without a response.
    """

    repositories: dict[str, Branches] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[tuple[str, str | None]] = field(default_factory=set)
    break_off: dict[str, int] = field(default_factory=dict)
    failures: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    without_length: set[str] = field(default_factory=set)
    without_version: bool = False
    hangs_up: bool = False

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, name: str) -> list[str | None]:
        """Return the Range header of each download of a file so far."""
        return [range_ for method, path, range_ in self.requests if method == "GET" and path.endswith(name)]


def connect(monkeypatch: pytest.MonkeyPatch, server: HubServer, home: Path) -> None:
    """Make huggingface_hub use `server`, and `home` for its downloads."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.tokens.add((path, self.headers.get("Authorization")))
        if self.hub.hangs_up:
            self.close_connection = True
        elif failures := self.hub.failures.get((self.command, path)):
            self._answer(failures.pop(0), {})
        elif path in self.hub.without_length:
            self._chunks(self.hub.files[path.removeprefix("/files/")])
        elif path.removeprefix("/files/") in self.hub.files:
            self._file(path, self.hub.files[path.removeprefix("/files/")])
        elif match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(/auth-check|/revision/(.+))?", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/(refs/convert/parquet|[^/]+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self._answer(404, {"error": "Not found"}, error="NotFound")

    def _api(self, name, what, revision):
        repository = self.hub.repositories.get(name)
        if not repository:  # the hub answers 401 to users who are not logged in, as for a private repository
            self._answer(401, {"error": "Repository not found"}, error="RepoNotFound")
        elif what == "/auth-check":
            self._answer(*((403, {"error": "gated"}, "GatedRepo") if repository.gated else (200, {}, None)))
        elif not (branch := repository.find(revision or "main")):
            self._answer(404, {"error": "Invalid rev id"}, error="RevisionNotFound")
        else:
            siblings = [
                {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                for path, data in repository.branches[branch].items()
            ]
            commit = repository.commit(branch)
            gated = "manual" if repository.gated else False
            self._answer(200, {"id": name, "sha": commit, "gated": gated, "private": False, "siblings": siblings})

    def _resolve(self, name, revision, path):
        repository = self.hub.repositories.get(name)
        branch = repository and repository.find(revision)
        if not repository:
            self._answer(401, {}, error="RepoNotFound")
        elif repository.gated:
            self._answer(403, {}, error="GatedRepo")
        elif not branch:
            self._answer(404, {}, error="RevisionNotFound")
        elif path not in repository.branches[branch]:
            self._answer(404, {}, error="EntryNotFound")
        else:
            self._file(path, repository.branches[branch][path], repository.commit(branch))

    def _answer(self, status, content, error=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _chunks(self, data):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in (data, b"") if self.command == "GET" else ():
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def _file(self, path, data, commit=None):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        if commit or not self.hub.without_version:
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        if commit:
            self.send_header("X-Repo-Commit", commit)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.hub.break_off.pop(path, None)
        self.wfile.write(data[start:stop])
        self.close_connection = stop is not None
