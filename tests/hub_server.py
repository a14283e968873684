"""A Hugging Face Hub on loopback, for tests: the part of its protocol that is needed to push and fetch models.

It understands the requests of huggingface_hub 1.x with `HF_ENDPOINT` set and Xet switched off (`HF_HUB_DISABLE_XET=1`):
creating a repository, preupload, LFS batch with basic transfer, commits as NDJSON, tags, repository info, trees,
and resolving with entity tags. As on the real Hub, large files come from another host name (localhost in
place of 127.0.0.1), and only the header X-Error-Code says which error it is.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"
"""The token that may write, and read gated repositories."""

USER = "me"
LFS_SUFFIXES = (".safetensors", ".bin", ".model")


class HubError(Exception):
    """An error as the answer to a request: status, X-Error-Code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Blob(NamedTuple):
    """The content of a file in a commit."""

    sha256: str
    sha1: str
    size: int
    lfs: bool

    @property
    def oid(self) -> str:
        """The content's id on the Hub, which is also its entity tag."""
        return self.sha256 if self.lfs else self.sha1


@dataclass
class Repo:
    """A model repository: commits hold whole trees, references point at commits."""

    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: dict[str, Blob], ref: str = "main") -> str:
        oid = secrets.token_hex(20)
        self.commits[oid] = tree
        self.refs[ref] = oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        """Commit and tree of a branch, tag or commit."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, self.commits[oid]


@dataclass
class Hub:
    """The state of the server; `log` holds "METHOD path" of every request."""

    folder: Path
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    leaked_tokens: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables of a process that uses this Hub, with its own cache."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repos[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """A repository's files and their contents."""
        tree = self.repo(repo_id).at(revision)[1]
        return {path: self.content(blob.sha256) for path, blob in tree.items()}

    def content(self, sha256: str) -> bytes:
        return (self.folder / sha256).read_bytes()

    def store(self, content: bytes, lfs: bool) -> Blob:
        blob = Blob(
            hashlib.sha256(content).hexdigest(),
            hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            len(content),
            lfs,
        )
        (self.folder / blob.sha256).write_bytes(content)
        return blob

    def publish(self, repo_id: str, folder: Path, gated: bool = False) -> str:
        """Put a folder into a repository without the protocol; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.gated = gated
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return repo.commit({path: self.store(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()})


class Handler(BaseHTTPRequestHandler):
    """One connection. ROUTES lists the paths and the methods that answer them."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.hub.log.append(f"{self.command} {url.path}")
        self.body = self._read_body()
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, answer in ROUTES:
                if verb == method and (match := re.fullmatch(pattern, url.path)):
                    answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                    return
            raise HubError(404, "", f"no such route: {self.command} {url.path}")
        except HubError as error:
            self.reply({"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self) -> Any:
        return json.loads(self.body)

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def demand_token(self) -> None:
        if not self.authorised():
            raise HubError(401, "", "Invalid username or password.")

    def readable(self, repo: str) -> Repo:
        found = self.hub.repo(repo)
        if found.gated and not self.authorised():
            raise HubError(403, "GatedRepo", f"Access to model {repo} is restricted.")
        return found

    # --- writing --------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self.demand_token()
        self.reply({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        self.demand_token()
        wanted = self.json()
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if wanted.get("type") not in (None, "model"):
            raise HubError(400, "", f"{wanted['type']} is not served here")
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.repos[repo_id] = Repo()
            self.hub.repos[repo_id].commit({})
        self.reply({"url": f"{self.hub.url}/{repo_id}"}, 409 if exists else 200)

    def validate_yaml(self) -> None:
        """The Hub's check of a model card: its front matter has to be YAML, and its licence a name."""
        content = self.json()["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        good = isinstance(data, dict) and isinstance(data.get("license", ""), str)
        self.reply({"errors": [] if good else [{"message": "invalid metadata"}], "warnings": []}, 200 if good else 400)

    def preupload(self, repo: str, revision: str) -> None:
        self.demand_token()
        tree = self.hub.repo(repo).at(revision)[1]
        modes = []
        for file in self.json()["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES)
            known = tree.get(file["path"])
            modes.append(
                {
                    "path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False,
                    "oid": known.oid if known else None,
                }
            )  # fmt: skip
        self.reply({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        self.demand_token()
        self.hub.repo(repo)
        request = self.json()
        assert request["operation"] == "upload"
        assert "basic" in request["transfers"]
        objects = []
        for wanted in request["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs-storage/{wanted['oid']}"},
                "verify": {"href": f"{self.hub.url}/{repo}/lfs-verify"},
            }
            there = (self.hub.folder / wanted["oid"]).exists()
            objects.append(wanted if there else wanted | {"actions": actions})
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "", "the content is not what its digest says")
        self.hub.store(self.body, lfs=True)
        self.reply(b"")

    def lfs_verify(self, repo: str) -> None:
        self.demand_token()
        wanted = self.json()
        if len(self.hub.content(wanted["oid"])) != wanted["size"]:
            raise HubError(400, "", "another size")
        self.reply({})

    def commit(self, repo: str, revision: str) -> None:
        self.demand_token()
        found = self.hub.repo(repo)
        tree = dict(found.at(revision)[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                tree[value["path"]] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                tree[value["path"]] = self.hub.store(self.hub.content(value["oid"]), lfs=True)
            elif key == "deletedFile":
                del tree[value["path"]]
            elif key != "header":
                raise HubError(400, "", f"{key} is not served here")
        oid = found.commit(tree, revision)
        self.reply(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""}
        )

    def tag(self, repo: str, revision: str) -> None:
        self.demand_token()
        found = self.hub.repo(repo)
        name = self.json()["tag"]
        if name in found.refs:
            raise HubError(409, "", f"tag {name} exists")
        found.refs[name] = found.at(revision)[0]
        self.reply({})

    # --- reading --------------------------------------------------------------------------------------------

    def info(self, repo: str, revision: str = "") -> None:
        found = self.readable(repo)
        oid, tree = found.at(revision or "main")
        self.reply(
            {
                "_id": repo, "id": repo, "modelId": repo, "sha": oid, "private": False, "gated": found.gated,
                "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(tree)],
            }
        )  # fmt: skip

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        _, tree = self.readable(repo).at(revision)
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(tree.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for i in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:i])
                entries[name] = {
                    "type": "directory",
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                    "size": 0,
                    "path": name,
                }
            if recursive or len(parts) == 1:
                large = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
                entries[path] = {"type": "file", "oid": blob.sha1, "size": blob.size, "path": path, **large}
        if prefix and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.reply(list(entries.values()))

    def resolve(self, repo: str, revision: str, path: str) -> None:
        oid, tree = self.readable(repo).at(revision)
        if path not in tree:
            message = {"error": "Entry not found"}
            self.reply(message, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        blob = tree[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            port = self.hub.url.rsplit(":", 1)[1]
            headers |= {
                "X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size),
                "Location": f"http://localhost:{port}/cdn/{blob.sha256}",
            }  # fmt: skip
            self.reply(b"", 302, headers)
        else:
            self.reply(self.hub.content(blob.sha256), 200, headers)

    def cdn(self, sha256: str) -> None:
        if "Authorization" in self.headers:  # a signed address needs none, and must not see the user's
            self.hub.leaked_tokens.append(self.path)
        content = self.hub.content(sha256)
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.reply(content[first : last + 1], 206, headers)
        else:
            self.reply(content, 200, headers)


REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"
REV = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"{API}/preupload/{REV}", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs-storage/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    ("POST", rf"/{REPO}/lfs-verify", Handler.lfs_verify),
    ("POST", rf"{API}/commit/{REV}", Handler.commit),
    ("POST", rf"{API}/tag/{REV}", Handler.tag),
    ("GET", rf"{API}", Handler.info),
    ("GET", rf"{API}/revision/{REV}", Handler.info),
    ("GET", rf"{API}/tree/{REV}(?P<folder>/.*)?", Handler.tree),
    ("GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", Handler.resolve),
    ("GET", r"/cdn/(?P<sha256>[0-9a-f]{64})", Handler.cdn),
]


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A Hub that runs as long as the context; `folder` holds the files' contents."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
