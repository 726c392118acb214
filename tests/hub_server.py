"""A small Hub on loopback: as much of huggingface.co's HTTP interface as pushing and loading a model takes.

Models only, in memory. Large and binary files travel by Git LFS to a storage server on a port of its own, so that an
access token sent there by mistake is noticed. Faults can be ordered: refused, dropped or unanswered requests.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_ThisTokenMustNeverBeShownAnywhere1"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model")
LFS_SIZE = 10_000_000
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class File:
    """A file of a commit; `content` of an LFS file is what its pointer stands for."""

    content: bytes
    lfs: bool

    @property
    def blob_id(self):
        data = self.content
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    def info(self, path):
        info = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            info["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return info


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch, files, message):
        seed = f"{len(self.commits)} {branch} {message} {sorted((path, file.blob_id) for path, file in files.items())}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]

    def download(self, folder):
        """The files of `main` in a new folder, which is returned."""
        for name, file in self.files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file.content)
        return folder


@dataclass
class Fault:
    """`kind`: a status to answer with, 'drop' (no answer, nothing done) or 'lost' (done, but no answer)."""

    path: str
    kind: int | str
    times: int
    method: str | None
    body: bytes


class Refusal(Exception):
    def __init__(self, status, message, **headers):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}


class HubServer:
    """Use as a context manager; `url` is the endpoint.

    Args:
        tokens: access token -> its account and role ('write' or 'read').
    """

    def __init__(self, tokens):
        self.tokens = tokens
        self.repos, self.objects, self.faults, self.requests, self.leaks = {}, {}, [], [], []
        self.lock = threading.RLock()
        self.servers = []
        for routes in (HUB_ROUTES, STORAGE_ROUTES):
            handler = type("Handler", (_Handler,), {"hub": self, "routes": routes})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            self.servers.append(server)
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(self, path, kind=503, times=1, method=None, body=b'{"error": "try later"}'):
        """Let the next `times` requests whose path matches the pattern fail."""
        self.faults.append(Fault(path, kind, times, method, body))

    def seen(self, path):
        """Statuses of the requests so far whose path matches the pattern; None for no answer."""
        return [status for _, target, status in self.requests if re.search(path, target)]

    def take_fault(self, method, path):
        for fault in self.faults:
            if fault.times > 0 and fault.method in (None, method) and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_request(self):
        split = urlsplit(self.path)
        self.target, self.query = split.path, parse_qs(split.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            fault = self.hub.take_fault(self.command, self.target)
            if fault is not None and isinstance(fault.kind, int):
                return self.answer(fault.kind, fault.body)
            if fault is None or fault.kind == "lost":
                answer = self.route()
            if fault is None:
                return self.answer(*answer)
            self.hub.requests.append((self.command, self.target, None))
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self):
        for methods, pattern, action in self.routes:
            match = re.fullmatch(pattern, self.target)
            if match and self.command in methods:
                try:
                    return action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                except Refusal as refusal:
                    return refusal.status, {"error": str(refusal)}, refusal.headers
        return 404, {"error": f"no route for {self.command} {self.target}"}

    def answer(self, status, body=b"", headers=None):
        self.hub.requests.append((self.command, self.target, status))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- who asks ----

    def account(self):
        """The account and role of the request's token, or two Nones without one."""
        given = self.headers.get("Authorization")
        if given is None:
            return None, None
        token = given.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repository(self, name, write=False):
        account, role = self.account()
        repo = self.hub.repos.get(name)
        owned = account is not None and name.split("/")[0] == account
        if repo is None or (repo.private and not owned):
            raise Refusal(404 if account else 401, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if write and not (owned and role == "write"):
            raise Refusal(403 if account else 401, "you do not have the rights to write here")
        return repo

    def files(self, repo, revision):
        try:
            return repo.files(revision)
        except KeyError:
            message = f"Invalid rev id: {revision}"
            raise Refusal(404, message, **{"X-Error-Code": "RevisionNotFound"}) from None

    # ---- the interface ----

    def create_repo(self):
        account, role = self.account()
        wanted = json.loads(self.body)
        owner = wanted["organization"] or account
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if owner != account or role != "write":
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{wanted['name']}"
        made = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", **made}
        repo = self.hub.repos[name] = Repo(private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return 200, made

    def create_branch(self, repo, branch):
        repo = self.repository(repo, write=True)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return 200, {}

    def info(self, repo, revision):
        name, repo = repo, self.repository(repo)
        files = self.files(repo, revision or "main")
        sha = repo.branches.get(revision or "main", revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return 200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def validate_yaml(self):
        import yaml

        content = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if front is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            metadata = yaml.safe_load(front.group(1))
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        ids = [metadata.get("base_model"), *metadata.get("datasets", [])]
        wrong = [name for name in ids if name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
        return (400 if wrong else 200), {"errors": [{"message": f"not an id: {name}"} for name in wrong]}

    def preupload(self, repo, revision):
        there = self.files(self.repository(repo, write=True), revision)
        files = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            lfs = (
                path.endswith(LFS_SUFFIXES) or wanted["size"] > LFS_SIZE or b"\0" in base64.b64decode(wanted["sample"])
            )
            old = there.get(path)
            oid = None if old is None else old.sha256 if old.lfs else old.blob_id
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def lfs_batch(self, repo):
        name, _ = repo, self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            item = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                item["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/put/{wanted['oid']}?signature=s3cret"},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"},
                }
            objects.append(item)
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_verify(self, repo):
        self.repository(repo, write=True)
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "object not found")
        return 200, {}

    def commit(self, repo, revision):
        name, repo = repo, self.repository(repo, write=True)
        files, message = dict(self.files(repo, revision)), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {line['key']}")
        oid = repo.commit(revision, files, message)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}

    def tree(self, repo, revision, path):
        files = self.files(self.repository(repo), revision)
        below = f"{path}/" if path else ""
        found = {name: file for name, file in files.items() if name.startswith(below)}
        if path and not found:
            raise Refusal(404, f"{path} does not exist", **{"X-Error-Code": "EntryNotFound"})
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            return 200, [file.info(name) for name, file in sorted(found.items())]
        listed = {}
        for name, file in sorted(found.items()):
            first, deeper, _ = name[len(below) :].partition("/")
            entry = below + first
            listed[entry] = (
                {"type": "directory", "path": entry, "oid": "0" * 40, "size": 0} if deeper else file.info(name)
            )
        return 200, list(listed.values())

    def paths_info(self, repo, revision):
        files = self.files(self.repository(repo), revision)
        wanted = parse_qs(self.body.decode())["paths"]
        return 200, [files[path].info(path) for path in wanted if path in files]

    def resolve(self, repo, revision, path):
        repo = self.repository(repo)
        file = self.files(repo, revision).get(path)
        commit = {"X-Repo-Commit": repo.branches.get(revision, revision)}
        if file is None:
            raise Refusal(404, "Entry not found", **commit, **{"X-Error-Code": "EntryNotFound"})
        if not file.lfs:
            return 200, file.content, {**commit, "ETag": f'"{file.blob_id}"'}
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return 302, b"", {**commit, **linked, "Location": f"{self.hub.storage_url}/get/{file.sha256}?signature=s3cret"}

    # ---- the storage ----

    def stored(self, oid):
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.target)
        if self.query.get("signature") != ["s3cret"]:
            raise Refusal(403, "Access Denied")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400, "the content's SHA-256 is not its name")
            self.hub.objects[oid] = self.body
            return 200, b""
        return 200, self.hub.objects[oid]


API = f"/api/models/{REPO}"
HUB_ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create_repo),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), f"{API}/branch/(?P<branch>.+)", _Handler.create_branch),
    (("POST",), f"{API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), f"{API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("POST",), f"{API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (("GET",), f"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", _Handler.tree),
    (("GET",), f"{API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("POST",), rf"/{REPO}\.git/info/lfs/verify", _Handler.lfs_verify),
    (("GET", "HEAD"), f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
STORAGE_ROUTES = [(("GET", "PUT", "HEAD"), "/(?:put|get)/(?P<oid>[0-9a-f]{64})", _Handler.stored)]
