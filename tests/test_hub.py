"""Models of the Hub, from a server on this machine that answers as the Hub does."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml

from conftest import ROOT

COMMIT = "c4549779" + 32 * "0"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"code"}


@pytest.fixture
def hub():
    """Its address, and the paths that it is asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.rsplit("/", 1)[-1]
            tree = [{"type": "file", "path": f, "size": len(content), "oid": f} for f, content in FILES.items()]
            answers = {
                "/api/models/a/b/revision/refs%2Fpr%2F3": {"id": "a/b", "sha": COMMIT},
                f"/api/models/a/b/tree/{COMMIT}?recursive=true&expand=false": tree,
            }
            content = json.dumps(answers[self.path]).encode() if self.path in answers else FILES.get(name)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_revision_may_be_a_pull_request(hub, tmp_path):
    address, asked = hub
    code = (
        "from d2o import hub; from d2o.settings import Source\n"
        "print(hub.locate(Source(hub='a/b', revision='refs/pr/3')))"
    )
    variables = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    for offline in ("0", "1"):
        variables["HF_HUB_OFFLINE"] = offline
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert COMMIT in done.stdout
    (snapshot,) = tmp_path.glob(f"hub/models--a--b/snapshots/{COMMIT}")
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    assert all("refs/pr" not in path for path in asked)


def test_the_reward_model_whose_main_branch_holds_no_safetensors_is_pinned_to_its_conversion():
    rewards = yaml.safe_load((ROOT / "config" / "paper.yaml").read_text())["rewards"]
    assert rewards["openassistant"]["source"]["revision"] == "refs/pr/3"
