"""A stand-in for the Hugging Face hub on 127.0.0.1, which speaks its protocol.

What `huggingface_hub` and `datasets` ask of the hub is answered as the hub answers: metadata by
HEAD, small files behind a relative redirect, large ones (LFS) behind a redirect to another host,
Range, revisions, tree listings, error codes in headers. Repositories lie in memory.

    with HubStandIn() as hub:
        commit = hub.commit("owner/name", {"config.json": b"{}", "model.safetensors": data})
        hub.use(monkeypatch, tmp_path)                  # in this process
        subprocess.run(..., env=hub.env(tmp_path))      # in another, by its environment variables

It can be told to demand a token, to gate, to break off, to be slow, to serve altered bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".parquet", ".tar", ".model")


@dataclass
class Repository:
    """Commits of a repository, by hash; branches and tags; who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False  # needs a token
    gated: bool = False  # needs a token whose licence was accepted
    altered: dict[str, bytes] = field(default_factory=dict)  # file -> other bytes that are sent


@dataclass
class Request:
    """One request that came."""

    method: str
    path: str
    headers: dict[str, str]


class HubStandIn:
    """A hub with the repositories that `commit` gave it. Tokens: `reader`, and `licensed`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.break_after: list[int] = []  # of the next downloads: cut off after so many bytes
        self.failing: list[int] = []  # of the next requests: answer with this status
        self.delay = 0.0  # seconds before each answer
        self.chunk_delay = 0.0  # seconds before each 64 KiB of a download
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> HubStandIn:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        assert self._server is not None
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(
        self, repo: str, files: dict[str, bytes], *, kind: str = "model", branch: str = "main"
    ) -> str:
        """A new commit with these files alone; the branch stands at it. Returns its hash."""
        found = self.repos.setdefault((kind, repo), Repository())
        seed = repr((repo, len(found.commits), sorted(files))).encode() + b"".join(files.values())
        commit = hashlib.sha1(seed).hexdigest()
        found.commits[commit] = dict(files)
        found.refs[branch] = commit
        return commit

    def repo(self, repo: str, kind: str = "model") -> Repository:
        return self.repos[kind, repo]

    def gets(self) -> list[str]:
        """Paths of the downloads so far."""
        return [request.path for request in self.requests if request.method == "GET"]

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that uses this hub, and a cache of its own."""
        dropped = ("HF_", "HUGGING", "SAEBENCH_LOCK", "TRANSFORMERS_OFFLINE")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "SAEBENCH_CONFIG": str(home / "config"),
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path, *, offline: bool = False) -> None:
        """Let huggingface_hub of this process, which read its variables long ago, use this hub."""
        from huggingface_hub import constants

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(home / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("SAEBENCH_LOCK", str(home / "saebench.lock"))
        monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that this process uses, with a cache and a lock file below tmp_path."""
    with HubStandIn() as hub:
        hub.use(monkeypatch, tmp_path)
        yield hub


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away is part of the tests


class _Stop(Exception):
    """The request is answered."""


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubStandIn]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        self.hub.requests.append(Request(self.command, unquote(url.path), dict(self.headers)))
        if self.hub.delay:
            time.sleep(self.hub.delay)
        parts = [unquote(part) for part in url.path.split("/") if part]
        try:
            if self.hub.failing:
                self._error(self.hub.failing.pop(0), "", "out of order")
            if parts[:1] == ["cdn"]:
                self._cdn(parts[1])
            elif parts[:2] == ["api", "resolve-cache"]:
                self._small(parts[2], "/".join(parts[3:5]), parts[5], "/".join(parts[6:]))
            elif parts[:1] == ["api"]:
                self._api(parts[1:], parse_qs(url.query), parse_qs(body.decode()))
            else:
                self._resolve(parts)
        except _Stop:
            pass

    # What is asked for

    def _resolve(self, parts: list[str]) -> None:
        kind = "dataset" if parts[0] == "datasets" else "model"
        owner, name, verb, revision, *rest = parts[1:] if kind == "dataset" else parts
        assert verb == "resolve"
        repo, file = f"{owner}/{name}", "/".join(rest)
        commit = self._commit(kind, repo, revision)
        files = self.hub.repos[kind, repo].commits[commit]
        if file not in files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        common = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LFS):
            digest = hashlib.sha256(files[file]).hexdigest()
            self._send(
                302,
                b"Found. Redirecting",
                common
                | {
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(files[file])),
                    # Another host, as the hub's: its answer carries no metadata, and no token
                    # may be sent there.
                    "Location": f"http://localhost:{self.hub.port}/cdn/{kind}:{digest}",
                },
            )
        plural = f"{kind}s"
        where = f"/api/resolve-cache/{plural}/{owner}/{name}/{commit}/{file}"
        self._send(307, b"Temporary Redirect", common | {"Location": where})

    def _small(self, plural: str, repo: str, commit: str, file: str) -> None:
        kind = plural.removesuffix("s")
        self._commit(kind, repo, commit)
        found = self.hub.repos[kind, repo]
        data = found.commits[commit][file]
        etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self._send(
            200,
            found.altered.get(file, data),
            {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"},
            ranged=True,
        )

    def _cdn(self, key: str) -> None:
        if "Authorization" in self.headers:
            self._error(400, "", "a token was sent to another host")
        kind, digest = key.split(":")
        for (other, _), repo in self.hub.repos.items():
            for files in repo.commits.values():
                for file, data in files.items():
                    if other == kind and hashlib.sha256(data).hexdigest() == digest:
                        sent, name = repo.altered.get(file, data), PurePosixPath(file).name
                        shown = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
                        headers = {"ETag": f'"{digest}"', "Content-Disposition": shown}
                        self._send(200, sent, headers, ranged=True)
        self._error(404, "", "no such blob")

    def _api(self, parts: list[str], query: dict[str, Any], body: dict[str, Any]) -> None:
        if parts[0] == "whoami-v2":
            token = self._token()
            if token not in ("reader", "licensed"):
                self._error(401, "", "Invalid credentials in Authorization header")
            self._json({"type": "user", "name": token, "auth": {"type": "access_token"}})
        if parts[0] not in ("models", "datasets"):
            self._error(404, "", "not found")
        kind, repo, rest = parts[0].removesuffix("s"), "/".join(parts[1:3]), parts[3:]
        verb = rest[0] if rest else ""
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self._commit(kind, repo, revision)
        files = self.hub.repos[kind, repo].commits[commit]
        if verb in ("", "revision"):
            self._json(self._info(kind, repo, commit, "blobs" in query))
        if verb == "tree":
            below = "/".join(rest[2:])
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            self._json(_tree(files, below, deep))
        if verb == "paths-info":
            paths = [path.strip("/") for path in body.get("paths", [])]
            entries = _tree(files, "", True)
            self._json([entry for entry in entries if entry["path"] in paths])
        if verb == "refs":
            refs = self.hub.repos[kind, repo].refs
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": target}
                for name, target in refs.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})
        self._error(404, "", "not found")

    def _info(self, kind: str, repo: str, commit: str, blobs: bool) -> dict[str, Any]:
        found = self.hub.repos[kind, repo]
        siblings = []
        for entry in _tree(found.commits[commit], "", True):
            if entry["type"] == "file":
                line: dict[str, Any] = {"rfilename": entry["path"]}
                if blobs:
                    line |= {"size": entry["size"], "blobId": entry["oid"]}
                    if lfs := entry.get("lfs"):
                        line["lfs"] = {**lfs, "sha256": lfs["oid"]}
                siblings.append(line)
        return {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "author": repo.partition("/")[0],
            "sha": commit,
            "private": found.private,
            "gated": "manual" if found.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2024-01-01T00:00:00.000Z",
            "createdAt": "2024-01-01T00:00:00.000Z",
            "siblings": siblings,
        }

    # Who may read what

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _commit(self, kind: str, repo: str, revision: str) -> str:
        """The commit that is asked for, where whoever asks may have it."""
        found, token = self.hub.repos.get((kind, repo)), self._token()
        if token and token not in ("reader", "licensed"):
            self._error(401, "", "Invalid credentials in Authorization header")
        if found is None or (found.private and not token):
            # The hub does not tell strangers whether a repository exists.
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        if found.gated and self.path.find("/resolve") >= 0 and token != "licensed":
            self._error(
                403 if token else 401, "GatedRepo", f"Access to {kind} {repo} is restricted"
            )
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Answers

    def _json(self, value: Any) -> NoReturn:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> NoReturn:
        more = {"X-Error-Code": code} if code else {}
        text = json.dumps({"error": message}).encode()
        self._send(status, text, {"X-Error-Message": message, **more, **(headers or {})})

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], *, ranged: bool = False
    ) -> NoReturn:
        span = self.headers.get("Range") if ranged else None
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            status, data = 206, data[start:stop]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self._body(data, ranged)
        raise _Stop

    def _body(self, data: bytes, ranged: bool) -> None:
        cut = self.hub.break_after.pop(0) if ranged and self.hub.break_after else None
        sent = data if cut is None else data[:cut]
        for start in range(0, len(sent), 65536):
            if self.hub.chunk_delay:
                time.sleep(self.hub.chunk_delay)
            self.wfile.write(sent[start : start + 65536])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


def _tree(files: dict[str, bytes], below: str, deep: bool) -> list[dict[str, Any]]:
    """The hub's listing of a folder: files and folders, with sizes and hashes."""
    entries: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        path = PurePosixPath(name)
        if below and not path.is_relative_to(below):
            continue
        for parent in path.parents:
            inside = str(parent) not in (".", below) and (not below or parent.is_relative_to(below))
            if inside and (deep or str(parent.parent) == (below or ".")):
                entries[str(parent)] = {
                    "type": "directory",
                    "oid": hashlib.sha1(str(parent).encode()).hexdigest(),
                    "size": 0,
                    "path": str(parent),
                }
        if deep or str(path.parent) == (below or ".") or name == below:
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "oid": oid, "size": len(data), "path": name}
            if name.endswith(LFS):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
            entries[name] = entry
    return [entries[name] for name in sorted(entries)]
