"""A hub on 127.0.0.1: what huggingface_hub 1.33 and datasets 4.7 ask of the real one for what is tested, and
nothing more.

Weights (.safetensors) are LFS objects, uploaded and fetched by plain HTTP, from another host name as on the
real hub; Xet is off.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants

WRITER, READER = "hf_writer", "hf_reader"  # tokens; without one everything may be read too


class Repository:
    """commits: {hash: {path: bytes}}; refs: {branch or tag: hash}."""

    def __init__(self, visibility=None):
        self.commits, self.refs, self.visibility = {}, {}, visibility
        self.commit({})

    def commit(self, files):
        content = [
            self.refs.get("main"),
            sorted((path, git_hash(content)) for path, content in files.items()),
        ]
        commit = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[commit], self.refs["main"] = files, commit
        return commit

    @property
    def files(self):
        return self.commits[self.refs["main"]]


class LocalHub:
    """repositories: {"models/org/name" or "datasets/org/name": Repository}; requests: what was asked, in
    order.

    cuts: {file name: [(share of its bytes, "close" or "reset"), ..]}, how its next downloads end early;
    expired: uploads are refused.
    """

    def __init__(self):
        self.repositories, self.objects, self.requests, self.cuts, self.expired = {}, {}, [], {}, False
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, name, files, tag=None):
        """A new commit on main that holds just these files, {path: bytes} or those of a folder; returns its
        hash.
        """
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        repository = self.repositories.setdefault(name, Repository())
        commit = repository.commit(files)
        if tag:
            repository.refs[tag] = commit
        return commit

    def asked(self, pattern):
        """The requests ("METHOD /path") that match."""
        return [one["request"] for one in self.requests if re.fullmatch(pattern, one["request"])]

    def downloads(self):
        """{file name: [(Range header, bytes sent) of each GET]}."""
        files = {one["file"] for one in self.requests} - {None}
        return {
            file: [(one["range"], one["sent"]) for one in self.requests if one["file"] == file]
            for file in files
        }


def environment(url, cache, token=""):
    """The variables that give a new process this hub, with a cache of its own."""
    return {"HF_ENDPOINT": url, "HF_HOME": f"{cache}", "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1,localhost"}  # fmt: skip


def use(url, cache, token="", setattr=setattr, setenv=os.environ.__setitem__):
    """The same for this process, whose clients have read their variables already. setattr, setenv:
    monkeypatch's, which undo it.
    """
    import datasets  # over a second of CPU time, when tests are run and not when they are collected

    for name, value in environment(url, cache, token).items():
        setenv(name, value)
    setattr(constants, "ENDPOINT", url)
    setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    setattr(constants, "HF_HUB_CACHE", f"{cache}/hub")
    setattr(constants, "HF_HUB_DISABLE_XET", True)
    setattr(datasets.config, "HF_ENDPOINT", url)
    setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache) / "datasets")
    setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # asks a second host, datasets-server
    set_offline(False, setattr)
    close_session()  # proxies are read when it opens


def set_offline(is_offline, setattr=setattr):
    """HF_HUB_OFFLINE of this process."""
    import datasets

    setattr(constants, "HF_HUB_OFFLINE", is_offline)
    setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)


# ---------------------------------------------------------------- HTTP


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path):
    return path.endswith(".safetensors")


def oid(path, content):
    return sha256(content) if is_lfs(path) else git_hash(content)


class Refused(Exception):
    """Answered with this status, and JSON of the error and whatever else the client looks for."""

    def __init__(self, status, error, headers=None, **more):
        self.status, self.headers, self.content = (
            status,
            {"X-Error-Message": error} | (headers or {}),
            {"error": error} | more,
        )


class Server(ThreadingTCPServer):  # HTTPServer would ask the name server who 127.0.0.1 is
    daemon_threads = True
    request_queue_size = (
        64  # the clients' threads connect at once; a connection that finds the queue full waits a second
    )


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, a connection per request: none outlives the server."""

    def answer(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.record = {
            "request": f"{self.command} {path}",
            "range": self.headers.get("Range"),
            "file": None,
            "sent": 0,
        }
        hub.requests.append(self.record)
        try:
            for methods, pattern, answer in ROUTES:
                if (found := re.fullmatch(pattern, path)) and self.command in methods.split():
                    return answer(self, hub, *[unquote(part) for part in found.groups() if part])
            raise Refused(501, "no such route")
        except Refused as refusal:
            self.send_json(refusal.content, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass

    def send(self, content=b"", status=200, headers=None):
        self.record["status"] = status
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.record["sent"] = len(content)
            self.wfile.write(content)

    def send_json(self, content, status=200, headers=None):
        self.send(
            json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {})
        )

    def may_write(self):
        if self.token != WRITER:
            raise Refused(403, "this token may not write")


def find(hub, name, revision):
    """(commit, {path: bytes}) of a branch, tag or commit."""
    if name not in hub.repositories:
        raise Refused(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
    repository = hub.repositories[name]
    commit = repository.refs.get(revision, revision)
    if commit not in repository.commits:
        raise Refused(404, "Revision not found", {"X-Error-Code": "RevisionNotFound"})
    return commit, repository.commits[commit]


def info(self, hub, name, revision="main"):
    commit, _ = find(hub, name, revision)
    self.send_json({"id": name.split("/", 1)[1], "sha": commit, "siblings": []})


def tree(self, hub, name, revision, folder=""):
    commit, files = find(hub, name, revision)
    listed = {path: content for path, content in files.items() if path.startswith(folder)}
    if folder and not listed:
        raise Refused(404, "no such folder", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    entries = [
        {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        for path, content in listed.items()
    ]
    for entry in entries:
        if is_lfs(entry["path"]):
            entry["lfs"] = {"oid": sha256(listed[entry["path"]]), "size": entry["size"], "pointerSize": 130}
    self.send_json(entries)


def resolve(self, hub, name, revision, path):
    """The file; for weights, where they are."""
    commit, files = find(hub, name if name.startswith("datasets/") else f"models/{name}", revision)
    headers = {"X-Repo-Commit": commit}
    if path not in files:
        raise Refused(404, "no such file", headers | {"X-Error-Code": "EntryNotFound"})
    headers["ETag"] = f'"{oid(path, files[path])}"'
    if is_lfs(path):
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": len(files[path])}
        headers["Location"] = f"http://localhost:{hub.port}/lfs/{name}/{commit}/{path}"
        return self.send(status=302, headers=headers)
    send_file(self, hub, path, files[path], headers)


def lfs(self, hub, name, commit, path):
    send_file(self, hub, path, find(hub, f"models/{name}", commit)[1][path], {})


def send_file(self, hub, path, content, headers):
    """All of it, or from where a Range starts; broken off, if `cuts` says so."""
    status = 200
    if self.record["range"]:
        first = int(re.fullmatch(r"bytes=(\d+)-", self.record["range"])[1])
        status, headers = 206, headers | {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        content = content[first:]
    if self.command == "GET":
        self.record["file"] = path
    cuts = hub.cuts.get(path)
    share, how = cuts.pop(0) if cuts and self.command == "GET" else (1, None)
    self.send(content[: int(share * len(content))], status, headers | {"Content-Length": len(content)})
    if how == "reset":  # no FIN but an RST: what a router that forgot the connection sends
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


def whoami(self, hub):
    if self.token not in (WRITER, READER):
        raise Refused(401, "Invalid user token")
    self.send_json({"type": "user", "name": "someone"})


def create(self, hub):
    self.may_write()
    wanted = json.loads(self.body)
    name = f"{wanted['organization']}/{wanted['name']}"
    if f"models/{name}" in hub.repositories:
        raise Refused(409, "You already created this model repo", url=f"{hub.url}/{name}")
    hub.repositories[f"models/{name}"] = Repository(wanted["visibility"])
    self.send_json({"url": f"{hub.url}/{name}"})


def auth_check(self, hub, name):
    find(hub, name, "main")
    self.may_write()
    self.send_json({})


def validate_yaml(self, hub):
    self.send_json({"errors": [], "warnings": []})


def preupload(self, hub, name, revision):
    self.may_write()
    _, files = find(hub, name, revision)
    paths = [file["path"] for file in json.loads(self.body)["files"]]
    modes = [
        {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
        for path in paths
    ]
    self.send_json(
        {
            "files": [
                one | {"oid": oid(one["path"], files[one["path"]]) if one["path"] in files else None}
                for one in modes
            ]
        }
    )


def lfs_batch(self, hub, name):
    upload = {"header": {}, "href": f"http://localhost:{hub.port}/upload/"}
    wanted = json.loads(self.body)["objects"]
    for one in wanted:
        if one["oid"] not in hub.objects:
            one["actions"] = {"upload": upload | {"href": upload["href"] + one["oid"]}}
    self.send_json({"transfer": "basic", "objects": wanted})


def put_object(self, hub, wanted):
    if hub.expired or sha256(self.body) != wanted:
        raise Refused(403, "Request has expired" if hub.expired else "other content than announced")
    hub.objects[wanted] = self.body
    self.send()


def commit(self, hub, name, branch):
    self.may_write()
    files = dict(find(hub, name, branch)[1])
    for line in map(json.loads, self.body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    done = hub.commit(name, files)
    self.send_json(
        {"commitUrl": f"{hub.url}/{name.removeprefix('models/')}/commit/{done}", "commitOid": done}
    )


def no_registry(self, hub):
    raise Refused(404, "no registry here")


REPOSITORY, PLACE = r"/api/((?:models|datasets)/[\w.-]+/[\w.-]+)", r"((?:datasets/)?[\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", REPOSITORY, info),
    ("GET", REPOSITORY + "/revision/([^/]+)", info),
    ("GET", REPOSITORY + "/tree/([^/]+)(?:/(.+))?", tree),
    ("GET HEAD", f"/{PLACE}/resolve/([^/]+)/(.+)", resolve),
    ("GET", f"/lfs/{PLACE}/([^/]+)/(.+)", lfs),
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("GET", REPOSITORY + "/auth-check/write", auth_check),
    ("POST", "/api/validate-yaml", validate_yaml),  # of the model card
    ("POST", REPOSITORY + "/preupload/([^/]+)", preupload),
    ("POST", rf"/{PLACE}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/upload/([0-9a-f]{64})", put_object),
    ("POST", REPOSITORY + "/commit/([^/]+)", commit),
    ("GET", "/api/agent-harnesses", no_registry),  # names for the client's user agent
)
