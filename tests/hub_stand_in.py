"""A small Hub on 127.0.0.1 that speaks what huggingface_hub uses; its repositories live in memory.

    with HubStandIn(tokens={"hf_secret": "me"}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", ...}

Requests of a repository named `ROUTE-fails-STATUS` get that status at that route, and of `ROUTE-stalls` no answer at
all.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubStandIn:
    def __init__(self, tokens):
        self.tokens, self.requests, self.blobs = tokens, [], {}  # tokens: token -> user
        self.repos = {}  # id -> {"private": bool, "commits": [{"message", "oid", "files": {path: bytes}}]}
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo):
        """Path -> content in the newest commit."""
        return self.repos[repo]["commits"][-1]["files"]

    def messages(self, repo):
        """Messages of the commits after the one that creates the repository."""
        return [commit["message"] for commit in self.repos[repo]["commits"][1:]]

    def create(self, repo, private=False):
        self.repos[repo] = {"private": private, "commits": []}
        self.commit(repo, "initial commit", {})

    def commit(self, repo, message, files):
        commits = self.repos[repo]["commits"]
        oid = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits.append({"message": message, "oid": oid, "files": files})
        return oid

    def upload(self, repo, folder):
        """Makes a public repository of a folder."""
        self.create(repo)
        paths = [p for p in folder.rglob("*") if p.is_file()]
        self.commit(repo, "upload", {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths})


def is_large(path):
    return path.endswith((".safetensors", ".png"))


def etag(path, content):
    """Git's id of a small file, the SHA-256 of a large one."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content)
    return hashlib.sha256(content).hexdigest() if is_large(path) else blob.hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": len(content),
            "Content-Type": "application/json",
            **dict(headers),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code="", message="refused"):
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def user(self):
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, path))
        for methods, pattern, route in ROUTES:
            found = re.fullmatch(pattern, path)
            if not found or self.command not in methods:
                continue
            groups = found.groupdict()
            repo = groups.get("repo") or (json.loads(content)["name"] if route == "create" else "")
            failure = re.search(rf"{route}-(?:fails-(\d+)|stalls)$", repo)
            if failure and failure[1]:
                return self.refuse(int(failure[1]))
            if failure:
                self.close_connection = self.hub.closing.wait(60) or True
                return
            writes = self.command in ("POST", "PUT")
            if writes and self.user is None and route != "upload":  # the address of an upload is signed
                return self.refuse(401, message="Invalid user token.")
            known = self.hub.repos.get(repo)
            if "repo" in groups and (known is None or (known["private"] and self.user is None)):
                return self.refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
            return getattr(self, f"answer_{route}")(content, **groups)
        self.refuse(404, "EntryNotFound", f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    # ---------------------------------------------------------------------------------------------------------- routes
    def answer_create(self, content):
        asked = json.loads(content)
        owner = asked.get("organization") or self.user
        if owner != self.user:
            return self.refuse(403, message=f"You don't have the rights to create a model under {owner}.")
        repo = f"{owner}/{asked['name']}"
        exists = repo in self.hub.repos
        if not exists:
            self.hub.create(repo, bool(asked.get("private")) or asked.get("visibility") == "private")
        self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{repo}", "error": "exists" if exists else None})

    def answer_validate(self, content):
        self.reply(200, {"errors": [], "warnings": []})

    def answer_preupload(self, content, repo, revision):
        modes = {f["path"]: "lfs" if is_large(f["path"]) else "regular" for f in json.loads(content)["files"]}
        self.reply(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def answer_batch(self, content, repo):
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(content)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}
        self.reply(200, {"transfer": "basic", "objects": objects})

    def answer_upload(self, content, oid):
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, message="other content than was announced")
        self.hub.blobs[oid] = content
        self.reply(200)

    def answer_commit(self, content, repo, revision):
        files, message = dict(self.hub.files(repo)), ""
        for line in content.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = self.hub.commit(repo, message, files)
        self.reply(200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "success": True})

    def answer_info(self, content, repo, revision=None):
        newest, time = self.hub.repos[repo]["commits"][-1], "2026-01-01T00:00:00.000Z"
        info = {"id": repo, "sha": newest["oid"], "private": self.hub.repos[repo]["private"], "tags": []}
        siblings = [{"rfilename": path} for path in sorted(newest["files"])]
        self.reply(200, {**info, "siblings": siblings, "lastModified": time, "createdAt": time})

    def answer_tree(self, content, repo, revision, folder=""):
        rows = []
        for path, body in sorted(self.hub.files(repo).items()):
            if path.startswith(f"{folder}/" if folder else ""):
                row = {"type": "file", "oid": etag(path, body), "size": len(body), "path": path}
                lfs = {"oid": etag(path, body), "size": len(body), "pointerSize": 130}
                rows.append({**row, "lfs": lfs} if is_large(path) else row)
        self.reply(200, rows)

    def answer_resolve(self, content, repo, revision, path):
        newest = self.hub.repos[repo]["commits"][-1]
        if path not in newest["files"]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        body = newest["files"][path]
        self.reply(200, body, {"ETag": f'"{etag(path, body)}"', "X-Repo-Commit": newest["oid"]})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/upload/(?P<oid>\w+)", "upload"),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", "tree"),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
