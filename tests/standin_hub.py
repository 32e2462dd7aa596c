"""A stand-in for the Hugging Face hub on this machine, with the model repositories that a test gives it."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandinHub:
    """Serves folders by repository name; `downloads` counts the files that were sent whole."""

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = repositories
        self.downloads: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET(send_body=False)

            def do_GET(self, send_body: bool = True):
                path = self.path.partition("?")[0].lstrip("/")
                for name, folder in hub.repositories.items():
                    if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                        files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                        content = json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode()
                        return self.answer(content, {"Content-Type": "application/json"}, send_body)
                    for revision in ("main", COMMIT):
                        prefix = f"{name}/resolve/{revision}/"
                        if path.startswith(prefix) and (folder / path.removeprefix(prefix)).is_file():
                            content = (folder / path.removeprefix(prefix)).read_bytes()
                            hub.downloads[path.removeprefix(prefix)] += send_body
                            etag = hashlib.sha256(content).hexdigest()
                            return self.answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, send_body)
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def answer(self, content: bytes, headers: dict[str, str], send_body: bool) -> None:
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if send_body:
                    self.wfile.write(content)

            def log_message(self, *args) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> "StandinHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that is to find its models here, with an empty cache of its own."""
        port = self.server.server_address[1]
        return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
