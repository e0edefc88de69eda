"""A Hugging Face hub on this machine, for tests: the part of its HTTP API that its own client uses here.

Repositories are kept in memory as commits, each a dictionary from path to content. Large files are served and taken as
the hub does those of Git LFS: by a redirect to another address, with their SHA-256 as the tag.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
USER = "tester"
"""Who the token belongs to."""

LARGE = (".bin", ".safetensors", ".parquet", ".h5", ".msgpack")
"""Suffixes of the files that are in Git LFS."""

Files = Mapping[str, bytes]


@dataclass
class Repository:
    """A repository: its commits in their order, and the commit that every branch and tag is at."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Make the files the whole content of a branch, and give the commit."""
        digest = hashlib.sha1(f"{len(self.commits)} {branch}".encode())
        for path, content in sorted(files.items()):
            digest.update(f"{path} {len(content)} ".encode() + content)
        self.commits[digest.hexdigest()] = dict(files)
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """Give the commit that a branch, a tag or a commit is."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        return commit if commit in self.commits else None


@dataclass
class Hub:
    """The repositories, by ``models/owner/name`` or ``datasets/owner/name``, and what was asked for.

    Attributes:
        url: Its address.
        repositories: By ``models/<owner>/<name>`` or ``datasets/<owner>/<name>``.
        uploaded: The contents of large files, by their hash.
        large: The names of those that were asked for.
        requests: Method and path of every request.
        broken: Whether every answer is that the service is not available.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: bool = False

    @property
    def store(self) -> str:
        """Where large files are; another host, as for the hub, whose client follows no redirect to its own."""
        return self.url.replace("127.0.0.1", "localhost")

    def publish(
        self, name: str, files: Files | Path, kind: str = "models", *, private: bool = False, gated: bool = False
    ) -> Repository:
        """Make a repository, or another commit of it, from contents or from a folder."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository(private, gated))
        repository.commit(contents(files) if isinstance(files, Path) else files)
        return repository

    def fetched(self) -> set[str]:
        """Give the names of the files whose content was asked for."""
        names = {line.rpartition("/")[2] for line in self.requests if re.match(r"GET \S*/resolve/", line)}
        return names | {self.large[line[-64:]] for line in self.requests if line.startswith("GET /lfs/")}


def contents(folder: Path) -> dict[str, bytes]:
    """Give every file below a folder by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def serve() -> Hub:
    """Serve an empty hub on a free port of this machine until the process ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {unquote(address.path)}")
        try:
            if self.hub.broken:
                raise _Refused(503)
            self._route(address.path.strip("/"))
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, b"{}", {name: value for name, value in headers.items() if value})

    def _route(self, path: str) -> None:
        """Answer; the path is quoted, because a branch may have slashes in its name."""
        if found := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(f"{found[1] or 'models/'}{found[2]}", unquote(found[3]), unquote(found[4]))
        if found := re.fullmatch(r"lfs/(\w{64})", path):
            return self._large(found[1])
        if found := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [self._action(item) for item in self._asked()["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if path == "api/whoami-v2":
            self._need_token()
            return self._json({"type": "user", "name": USER, "orgs": []})
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self._create()
        found = re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+))?(?:/(.*))?)?", path)
        if found is None:
            raise _Refused(404, "RepoNotFound")
        key, what, revision, rest = (
            f"{found[1]}/{found[2]}",
            found[3],
            unquote(found[4] or "main"),
            unquote(found[5] or ""),
        )
        repository = self._repository(key)
        if what in ("preupload", "commit"):
            self._need_token()
            return self._preupload(repository, revision) if what == "preupload" else self._commit(repository, revision)
        if what == "refs":
            named = {"branches": repository.branches, "tags": repository.tags}
            return self._json(
                {
                    kind: [{"name": at, "ref": f"refs/{kind}/{at}", "targetCommit": refs[at]} for at in refs]
                    for kind, refs in named.items()
                }
                | {"converts": []}
            )
        if what == "branch":
            self._need_token()
            if revision in repository.branches:
                raise _Refused(409)
            repository.branches[revision] = self._commit_of(repository, "main")
            return self._json({})
        commit = self._commit_of(repository, revision)
        files = repository.commits[commit]
        if what in (None, "revision"):
            siblings = [{"rfilename": name, **self._entry(name, content)} for name, content in files.items()]
            record = {"id": found[2], "sha": commit, "siblings": siblings, "tags": []}
            return self._json(record | {"private": repository.private, "gated": repository.gated and "manual"})
        if what == "tree":
            return self._json(self._tree(files, rest.rstrip("/"), recursive="recursive" in self.query))
        if what == "paths-info":
            paths = {item.rstrip("/") for item in self._asked().get("paths", [])}
            return self._json([entry for entry in self._tree(files, "", recursive=True) if entry["path"] in paths])
        raise _Refused(404)

    def _repository(self, key: str) -> Repository:
        """Give a repository, if whoever asks may see it; as on the hub, a private one looks like none."""
        repository, token = self.hub.repositories.get(key), self._token()
        if token not in (None, TOKEN):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        if repository is None or (repository.private and token is None):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _need_token(self) -> None:
        if self._token() != TOKEN:
            raise _Refused(401, message="Invalid credentials in Authorization header")

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _resolve(self, key: str, revision: str, path: str) -> None:
        repository = self._repository(key)
        if repository.gated:
            raise _Refused(403 if self._token() else 401, "GatedRepo", "Access to this repository is restricted")
        commit = self._commit_of(repository, revision)
        content = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif path.endswith(LARGE):
            self.hub.uploaded[_sha256(content)], self.hub.large[_sha256(content)] = content, Path(path).name
            headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", headers | {"Location": f"{self.hub.store}/lfs/{_sha256(content)}"})
        else:
            self._send_part(content, headers | {"ETag": f'"{_git_oid(content)}"'})

    def _large(self, oid: str) -> None:
        if self.command == "PUT":
            if _sha256(self.body) != oid:
                raise _Refused(400)
            self.hub.uploaded[oid] = self.body
            self._send(200, b"")
        else:
            self._send_part(self.hub.uploaded[oid], {"ETag": f'"{oid}"'})

    def _send_part(self, content: bytes, headers: Mapping[str, str]) -> None:
        """Send the content, or the range of it that was asked for."""
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            ranged = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            self._send(206, content[first : last + 1], {**headers, **ranged})
        else:
            self._send(200, content, headers)

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"size": len(content), "blobId": _git_oid(content)}
        if path.endswith(LARGE):
            oid = _sha256(content)
            entry["lfs"] = {"sha256": oid, "oid": oid, "size": len(content), "pointerSize": 134}
        return entry

    def _tree(self, files: Files, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entry = self._entry(path, content)
                entries[path] = {"type": "file", "path": path, "oid": entry.pop("blobId"), **entry}
        if folder and not entries:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        return list(entries.values())

    def _asked(self) -> Any:
        if "json" in (self.headers.get("Content-Type") or ""):
            return json.loads(self.body)
        return parse_qs(self.body.decode())

    def _create(self) -> None:
        self._need_token()
        asked = self._asked()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            raise _Refused(403, message="You don't have the rights to create a model under the namespace")
        key = f"{asked.get('type', 'model')}s/{name}"
        if key in self.hub.repositories:
            address = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            self._send(409, json.dumps(address).encode(), {"Content-Type": "application/json"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.publish(name, {".gitattributes": b"*.safetensors filter=lfs"}, private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _preupload(self, repository: Repository, revision: str) -> None:
        self._commit_of(repository, revision)
        files = [
            {"path": item["path"], "uploadMode": "lfs" if item["path"].endswith(LARGE) else "regular"}
            for item in self._asked()["files"]
        ]
        self._json({"files": [file | {"shouldIgnore": False} for file in files]})

    def _action(self, item: Mapping[str, Any]) -> dict[str, Any]:
        action = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.hub.uploaded:
            return action
        return action | {"actions": {"upload": {"href": f"{self.hub.store}/lfs/{item['oid']}", "header": {}}}}

    def _commit(self, repository: Repository, revision: str) -> None:
        files = dict(repository.commits[self._commit_of(repository, revision)])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, revision)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/x/y/commit/{commit}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
