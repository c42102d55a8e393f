"""A hub on the loopback: speaks what ``huggingface_hub`` needs, and can misbehave on request.

Repositories are dictionaries of files by revision. Large files are answered as the real hub answers
them: a redirect to another address, with the hash in ``X-Linked-Etag``; ranges are honoured.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes from which a file is answered with a redirect


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """Files by revision; ``refs`` maps branches to commits."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)  # of the commits that were uploaded
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Make ``files`` the content of ``ref``; returns the commit."""
        body = json.dumps({n: digest(d) for n, d in sorted(files.items())}) + str(len(self.commits))
        sha = hashlib.sha1(body.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """The server; ``url`` is its address, ``requests`` what was asked, ``faults`` what goes wrong next.

    ``faults[path] = "cut"`` ends the next answer for a file in the middle, ``"garbage"`` answers other bytes of the
    same length, ``"500"`` fails; a fault happens once.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []  # (method, path, range)
        self.faults: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.token = "hf_" + "t" * 34
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add(self, name: str, files: dict[str, bytes] | Path, ref: str = "main", **flags: bool) -> Repo:
        """Put the files of a dictionary or folder into repository ``name`` as a new commit on ``ref``."""
        if isinstance(files, Path):
            root = files
            files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        repo = self.repos.setdefault(name, Repo(name, **flags))
        repo.commit(files, ref)
        return repo

    def fetched(self) -> list[str]:
        """The file paths whose contents were asked for."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        small = [re.sub(r"^.*/resolve/[^/]+/", "", p) for p in paths if "/resolve/" in p]
        return small + [p.removeprefix("/cdn/").rpartition("/")[0] for p in paths if p.startswith("/cdn/")]

    def env(self, cache: Path) -> dict[str, str]:
        """Environment variables that make a child process use this hub."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    @contextmanager
    def in_process(self, cache: Path) -> Iterator[HubServer]:
        """Make ``huggingface_hub`` in this process use this hub and the cache folder ``cache``."""
        import huggingface_hub.constants as constants

        wanted = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        before = {name: getattr(constants, name) for name in wanted}
        try:
            for name, value in wanted.items():
                setattr(constants, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(constants, name, value)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        """What an upload asks for: a repository, where files should go, and a commit of them."""
        url = urlsplit(self.path)
        path, body, self.with_body = (
            unquote(url.path),
            self.rfile.read(int(self.headers.get("Content-Length", 0))),
            True,
        )
        self.hub.requests.append(("POST", path, url.query))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.error(401, "RepoNotFound")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        upload = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/([^/]+)", path)
        if upload is None or upload[1] not in self.hub.repos:
            return self.error(404, "RepoNotFound")
        if upload[2] == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            return self.send_json(
                {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        return self.commit(self.hub.repos[upload[1]], body, "create_pr" in url.query)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return self.send_json({"url": f"{self.hub.url}/{name}"}, 409)
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(name, private=private)
        self.hub.repos[name].commit({})
        return self.send_json({"url": f"{self.hub.url}/{name}"})

    def commit(self, repo: Repo, body: bytes, proposed: bool) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
        sha = repo.commit({**repo.commits[repo.refs["main"]], **files}, "refs/pr/1" if proposed else "main")
        repo.messages[sha] = lines[0]["value"]["summary"]
        url = f"{self.hub.url}/{repo.name}"
        pull = {"pullRequestUrl": f"{url}/discussions/1"} if proposed else {}
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **pull})

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.with_body = with_body
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/cdn/"):
            name, _, sha = path.removeprefix("/cdn/").rpartition("/")
            return self.send_bytes(self.hub.blobs[sha], {"ETag": f'"{sha}"'}, name)
        api = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+).*)?", path)
        if api:
            return self.api(api[1], api[2], api[3] or "main")
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        if file:
            return self.resolve(file[1], file[2], file[3])
        return self.error(404, "EntryNotFound")

    def open_repo(self, name: str, revision: str, contents: bool = True) -> tuple[Repo, str] | None:
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not known):
            self.error(401, "RepoNotFound")
        elif repo.gated and contents and not known:
            self.error(403, "GatedRepo")
        elif (commit := repo.find(revision)) is None:
            self.error(404, "RevisionNotFound")
        else:
            return repo, commit
        return None

    def api(self, name: str, kind: str | None, revision: str) -> None:
        found = self.open_repo(name, revision, contents=False)
        if found is None:
            return
        repo, commit = found
        files = repo.commits[commit]
        if kind == "tree":
            tree = []
            for path, data in files.items():
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": digest(data)[:40]}
                if len(data) >= LARGE:
                    entry["lfs"] = {"oid": digest(data), "size": len(data), "pointerSize": 130}
                tree.append(entry)
            return self.send_json(tree)
        siblings = [{"rfilename": path} for path in files]
        info = {"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
        self.send_json({**info, "private": repo.private, "gated": "manual" if repo.gated else False, "downloads": 0})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.open_repo(name, revision)
        if found is None:
            return
        repo, commit = found
        data = repo.commits[commit].get(path)
        head = {"X-Repo-Commit": commit}
        if data is None:
            return self.error(404, "EntryNotFound", head)
        sha = digest(data)
        if len(data) < LARGE:
            return self.send_bytes(data, {**head, "ETag": f'"{sha[:40]}"'}, path)
        self.hub.blobs[sha] = data
        self.send_response(302)
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{path}/{sha}"  # another host
        linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data)), "Location": location}
        for key, value in {**head, **linked, "ETag": f'"{sha[:40]}"', "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send_bytes(json.dumps(value).encode(), {"Content-Type": "application/json"}, "", status)

    def send_bytes(self, data: bytes, headers: dict[str, str], path: str, status: int = 200) -> None:
        fault = self.hub.faults.pop(path, None) if self.with_body and path in self.hub.faults else None
        if fault == "500":
            return self.error(500, "")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = int(asked[2]) + 1 if asked and asked[2] else len(data)
        part = data[start:stop]
        if fault == "garbage":
            part = bytes(byte ^ 0x5A for byte in part)
        self.send_response(206 if asked else status)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        for key, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(len(part))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.with_body:
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
            if fault == "cut":
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)

    def error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "X-Error-Code": code, "Content-Length": "0"}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
