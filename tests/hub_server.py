"""A stand-in for the Hugging Face hub on localhost: what an upload of a folder needs, kept in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.refused: set[str] = set()
        self.url = ""


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def _answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
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
                return self._answer(
                    {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}"}
                )
            return self._answer({"error": f"not of this stand-in: {path}"}, 404)

        def do_PUT(self):
            body, oid = self._body(), self.path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            self._answer({})

        def do_GET(self):
            name = "/".join(self.path.split("?")[0].split("/")[3:5])
            if self.path.startswith("/api/models/") and name in hub.repos:
                siblings = [{"rfilename": file} for file in hub.repos[name]]
                return self._answer({"id": name, "sha": "0" * 40, "siblings": siblings})
            return self._answer({"error": "Repository Not Found"}, 404)

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
            f"glq push out me/model --endpoint {here.url}    # with HF_TOKEN set to anything; Ctrl-C ends this",
            flush=True,
        )
        threading.Event().wait()
