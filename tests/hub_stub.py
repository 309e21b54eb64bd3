"""A Hugging Face hub on loopback: as much of its protocol as publishing and fetching small repositories takes."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each a dictionary of files."""

    def __init__(self, taken=True):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.taken = taken
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, content=b"", status=200, **headers):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                path = self.path.partition("?")[0]
                if not hub.taken:
                    self.answer({"error": "You have no right to this"}, 403)
                elif path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
                    hub.repos.setdefault(name, {})
                    hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                    self.answer({"url": f"{hub.address}/{name}", "name": name})
                elif path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                    files = json.loads(body)["files"]
                    kinds = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                    self.answer({"files": kinds})
                elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            own = line["value"]
                            hub.repos[found[1]][own["path"]] = base64.b64decode(own["content"])
                    self.answer({"commitUrl": f"{hub.address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
                else:
                    self.answer({"error": f"unknown {path}"}, 404)

            def do_GET(self):
                path = self.path.partition("?")[0]
                info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
                file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
                tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)
                if tree and tree[1] in hub.repos:
                    files = hub.repos[tree[1]].items()
                    self.answer([{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in files])
                elif info and info[1] in hub.repos:
                    names = [{"rfilename": name} for name in hub.repos[info[1]]]
                    self.answer({"id": info[1], "sha": COMMIT, "siblings": names, "tags": [], "private": False})
                elif file and file[2] in hub.repos.get(file[1], {}):
                    content = hub.repos[file[1]][file[2]]
                    self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
                else:
                    self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

            do_HEAD = do_GET  # noqa: N815 (the name that http.server asks for)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
