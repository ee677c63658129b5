"""A stand-in for the Hugging Face hub: the few requests of huggingface_hub that uploading and loading make.

Repositories are kept in memory. Every request is written down, so that a test can see what left the machine.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"
SHA = "0123456789abcdef0123456789abcdef01234567"  # of every commit


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by their sha256
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)  # method, path, body
    refuses: int = 0  # the HTTP status of every write; 0: none


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, self.path, data))
        return data

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        data, path, hub = self.body(), self.path.partition("?")[0], self.hub
        if path == "/api/validate-yaml":
            front = json.loads(data)["content"].split("---\n")
            known = len(front) == 1 or isinstance(yaml.safe_load(front[1]), dict)
            warnings = [{"message": "empty or missing yaml metadata"}] if len(front) == 1 else []
            errors = [] if known else [{"message": "no dictionary"}]
            self.answer({"errors": errors, "warnings": warnings}, 200 if known else 400)
        elif hub.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            said = f"the token {TOKEN} may not do that"
            self.answer({"error": said}, hub.refuses or 401)
        elif path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            is_new = name not in hub.repos
            hub.repos.setdefault(name, {})
            if is_new:
                hub.visibility[name] = wanted.get("visibility", "public")
            self.answer({"url": f"{hub.url}/{name}"}, 200 if is_new else 409)
        elif "/preupload/" in path:
            files = [
                {"path": item["path"], "uploadMode": mode(item["path"]), "shouldIgnore": False}
                for item in json.loads(data)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{hub.url}/objects/{item['oid']}"}}}
                for item in json.loads(data)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[name][value["path"]] = hub.objects[value["oid"]]
            self.answer({"commitUrl": f"{hub.url}/{name}/commit/{SHA}", "commitOid": SHA})
        else:
            self.answer({"error": path}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        digest = hashlib.sha256(data).hexdigest()
        self.hub.objects[digest] = data
        self.answer({}, 200 if self.path == f"/objects/{digest}" else 400)

    def do_GET(self) -> None:
        self.body()
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, files = "/".join(parts[2:4]), self.hub.repos.get("/".join(parts[2:4]))
            if files is None:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if parts[4:5] == ["tree"]:
                tree = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
                return self.answer(tree)
            return self.answer({"id": name, "sha": SHA, "siblings": [{"rfilename": path} for path in files]})
        found = self.hub.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if found is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        return self.answer(found, ETag=f'"{hashlib.sha256(found).hexdigest()}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET


def mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
