"""A Hugging Face Hub on this machine: an HTTP server with the routes of push, pull and cards.

Repositories are kept in memory: by id, the commits, and by commit the files. Large files travel
through the LFS routes, as they do on the Hub."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    "The server and its state."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Routes)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, list[dict[str, bytes]]] = {}  # by repository, oldest first
        self.branches: dict[tuple[str, str], int] = {}  # (repository, name) to the commit's number
        self.blobs: dict[str, bytes] = {}  # of LFS, by sha256
        self.asked: list[str] = []

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        "Add a commit to the main branch."
        known = self.commits.setdefault(repo, [{}])
        known.append({**known[-1], **files})
        self.branches[repo, "main"] = len(known) - 1


def commit_id(number: int) -> str:
    return f"{number:040x}"


class Routes(BaseHTTPRequestHandler):
    "The routes of the Hub, as huggingface_hub calls them."

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_one(self, routes):
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}")
        for pattern, method in routes:
            if found := re.fullmatch(pattern, path):
                return method(self, *found.groups())
        return self.refuse(404, "RepoNotFound", f"no route {self.command} {path}")

    # reading

    def find(self, repo, revision):
        "The number of the commit that a revision names; answers with an error if there is none."
        if repo not in self.server.commits:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        number = self.server.branches.get((repo, revision))
        if number is None and re.fullmatch("[0-9a-f]{40}", revision):
            number = int(revision, 16)
        if number is None or number >= len(self.server.commits[repo]):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return number

    def resolve(self, repo, revision, path):
        number = self.find(repo, revision)
        if number is None:
            return
        content = self.server.commits[repo][number].get(path)
        if content is None:
            self.send_commit = commit_id(number)
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit_id(number))
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, ETag=tag, X_Repo_Commit=commit_id(number))

    def info(self, repo, revision="main"):
        number = self.find(repo, revision)
        if number is not None:
            files = [{"rfilename": path} for path in sorted(self.server.commits[repo][number])]
            content = {"id": repo, "modelId": repo, "sha": commit_id(number), "siblings": files}
            self.answer(200, {**content, "tags": [], "private": False})

    def tree(self, repo, revision, path):
        self.refuse(
            404, "EntryNotFound", f"{path} does not exist"
        )  # no repository here has folders

    # writing

    def allowed(self):
        "Whether the request has the token."
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.body()
        self.refuse(401, "", "Invalid username or password.")
        return False

    def create(self):
        if not self.allowed():
            return
        asked = json.loads(self.body())
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server.commits:
            self.answer(409, {"url": f"{self.server.url}/{repo}"})
            return
        self.server.commits[repo] = [{}]
        self.server.branches[repo, "main"] = 0
        self.answer(200, {"url": f"{self.server.url}/{repo}"})

    def validate(self):
        "Check the fields of a card's metadata that ours have, as the Hub documents them."
        content = json.loads(self.body())["content"]
        errors = []
        try:
            data = yaml.safe_load(re.match(r"---\n(.*?)\n---", content, re.DOTALL)[1])
            for base in [data["base_model"]] if "base_model" in data else []:
                if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                    errors.append(f'"base_model" with value "{base}" is not valid')
            if data.get("base_model_relation", "adapter") != "adapter":
                errors.append('"base_model_relation" is not valid')
            if "model-index" in data:
                model_index_to_eval_results(data["model-index"])
        except Exception as error:
            errors.append(str(error))
        content = {"errors": [{"message": message} for message in errors], "warnings": []}
        self.answer(400 if errors else 200, content)

    def preupload(self, repo, revision):
        if not self.allowed():
            return
        files = json.loads(self.body())["files"]
        answered = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.answer(200, {"files": answered})

    def batch(self, repo):
        objects = json.loads(self.body())["objects"]
        url = f"{self.server.url}/lfs"
        answered = [
            {**one, "actions": {"upload": {"href": f"{url}/{one['oid']}", "header": {}}}}
            for one in objects
        ]
        self.answer(200, {"transfer": "basic", "objects": answered})

    def store(self, oid):
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            self.refuse(400, "", "the content has another sha256")
            return
        self.server.blobs[oid] = content
        self.answer(200)

    def commit(self, repo, revision):
        if not self.allowed():
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        number = self.find(repo, revision)
        if number is None:
            return
        files = dict(self.server.commits[repo][number])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.commits[repo].append(files)
        number = len(self.server.commits[repo]) - 1
        self.server.branches[repo, revision] = number
        url = f"{self.server.url}/{repo}/commit/{commit_id(number)}"
        self.answer(200, {"commitUrl": url, "commitOid": commit_id(number), "success": True})

    REPO = r"([\w.-]+/[\w.-]+)"
    READ = (
        (rf"/{REPO}/resolve/([^/]+)/(.+)", resolve),
        (rf"/api/models/{REPO}/revision/([^/]+)", info),
        (rf"/api/models/{REPO}/tree/([^/]+)/(.+)", tree),
        (rf"/api/models/{REPO}", info),
    )
    WRITE = (
        ("/api/repos/create", create),
        ("/api/validate-yaml", validate),
        (rf"/api/models/{REPO}/preupload/([^/]+)", preupload),
        (rf"/api/models/{REPO}/commit/([^/]+)", commit),
        (rf"/{REPO}\.git/info/lfs/objects/batch", batch),
        (r"/lfs/(\w+)", store),
    )

    def do_GET(self):
        self.handle_one(self.READ)

    do_HEAD = do_GET

    def do_POST(self):
        self.handle_one(self.WRITE)

    do_PUT = do_POST


@contextmanager
def running_hub():
    "A Hub that answers while this is open."
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
