"""A stand-in for the Hugging Face hub on localhost: what uploads and downloads of a folder need, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.refused: set[str] = set()
        self.url = ""

    def commit(self, name: str) -> str:
        """Changes whenever a file does, as downloads are kept by it."""
        files = sorted((file, hashlib.sha256(content).hexdigest()) for file, content in self.repos[name].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def _answer(self, content, status=200, headers=()):
            self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **dict(headers)})

        def _send(self, body, status, headers):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_POST(self):
            body, path = self._body(), self.path.split("?")[0]
            hub.tokens.add(self.headers.get("Authorization"))
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.refused:
                    return self._answer({"error": "You don't have the rights to create a model there"}, 403)
                hub.repos.setdefault(name, {})
                hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
                return self._answer({"url": f"{hub.url}/{name}", "name": name, "id": name})
            if path.startswith("/api/validate-yaml"):
                return self._answer({"errors": [], "warnings": []})
            if path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    | {"shouldIgnore": False, "oid": None}
                    for f in files
                ]
                return self._answer({"files": modes})
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    o | {"actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                return self._answer({"transfer": "basic", "objects": objects})
            if "/commit/" in path:
                name = "/".join(path.split("/")[3:5])
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "header":
                        hub.messages.append(value["summary"])
                    elif entry["key"] == "file":
                        hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        hub.repos[name][value["path"]] = hub.objects[value["oid"]]
                oid = hub.commit(name)
                return self._answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})
            return self._answer({"error": f"not of this stand-in: {path}"}, 404)

        def do_PUT(self):
            body, oid = self._body(), self.path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            self._answer({})

        def do_GET(self):
            path = unquote(self.path.split("?")[0])
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+(/.*)?)?", path):
                return self._describe(match[1], match[2] or "", match[3])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                return self._file(match[1], match[2])
            return self._answer({"error": f"not of this stand-in: {path}"}, 404)

        def do_HEAD(self):
            self.do_GET()

        def _missing(self, code):
            return self._answer({"error": code}, 404, {"X-Error-Code": code})

        def _describe(self, name, what, folder):
            if name not in hub.repos:
                return self._missing("RepoNotFound")
            if folder is not None:  # repositories are flat here
                return self._missing("EntryNotFound")
            files = hub.repos[name]
            if what.startswith("/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ]
                return self._answer(tree)
            siblings = [{"rfilename": file} for file in files]
            return self._answer({"id": name, "sha": hub.commit(name), "siblings": siblings, "private": False})

        def _file(self, name, file):
            if name not in hub.repos:
                return self._missing("RepoNotFound")
            if file not in hub.repos[name]:
                return self._missing("EntryNotFound")
            content = hub.repos[name][file]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._send(content, 200, {"ETag": etag, "X-Repo-Commit": hub.commit(name)})

    return Handler


@contextmanager
def running():
    """A Hub, and its server for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with running() as here:
        print(
            f"HF_TOKEN=any glq push out me/model --endpoint {here.url}    # Ctrl-C ends this\n"
            f"HF_ENDPOINT={here.url} glq chat me/model",
            flush=True,
        )
        threading.Event().wait()
