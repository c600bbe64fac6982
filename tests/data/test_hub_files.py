"""Data sets from the hub: the hub's own client against a server that speaks as the hub does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fitune.data.hub_files import fetch, is_on_hub
from fitune.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LINE = json.dumps({"question": "q", "answer": "a"}).encode()
SETS = {
    "owner/plain": {"README.md": b"# set", "train.jsonl": LINE, "test.jsonl": LINE},
    "owner/parts": {f"data/train-0000{n}-of-00002.jsonl": LINE + b"\n" + LINE for n in range(2)},
    "owner/one": {"anything.jsonl": LINE, "dataset_infos.json": b"{}"},
    "owner/unclear": {"a.jsonl": LINE, "b.jsonl": LINE},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The two answers that the client asks for: which files there are, and a file."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        for name, files in SETS.items():
            if path.startswith(f"api/datasets/{name}"):
                entries = [
                    {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                    for file, content in files.items()
                ]
                facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                body = json.dumps(entries if "/tree/" in path else facts).encode()
                return self._send(body, "application/json", with_body)
            for file, content in files.items():
                if path.startswith(f"datasets/{name}/resolve/") and path.endswith(file):
                    return self._send(content, "application/octet-stream", with_body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _send(self, body: bytes, kind: str, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def fetched(references: list[str], cache: Path, endpoint: str, offline: str = "0") -> list[str]:
    """In a process of its own, as the client reads its address when it is imported."""
    script = (
        "import sys\nfrom fitune.data.hub_files import fetch\nfrom fitune.errors import InputError\n"
        "for reference in sys.argv[1:]:\n"
        "    try:\n        print(' '.join(f'{path.name}:{path.stat().st_size}' for path in fetch(reference)))\n"
        "    except InputError as error:\n        print(str(error).replace(chr(10), ' '))\n"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", script, *references], env=environment, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_files_are_chosen_and_fetched(tmp_path: Path, address: str) -> None:
    found = fetched(
        [
            "hf://datasets/owner/plain", "hf://datasets/owner/plain/test.jsonl", "hf://datasets/owner/parts",
            "hf://datasets/owner/parts/data/train-*.jsonl", "hf://datasets/owner/one@main",
            "hf://datasets/owner/unclear", "hf://datasets/owner/plain/dev.jsonl", "hf://datasets/owner/none",
        ],
        tmp_path, address,
    )  # fmt: skip
    size, both = len(LINE), 2 * len(LINE) + 1
    parts = f"train-00000-of-00002.jsonl:{both} train-00001-of-00002.jsonl:{both}"
    assert found[:5] == [f"train.jsonl:{size}", f"test.jsonl:{size}", parts, parts, f"anything.jsonl:{size}"]
    assert "which of its files is meant is not clear; it has a.jsonl, b.jsonl" in found[5]
    assert "no file there fits dev.jsonl; it has test.jsonl, train.jsonl" in found[6]
    assert "the hub has no such data set, or it is private" in found[7]


def test_without_the_network_it_is_said(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    assert "the hub cannot be reached" in fetched(["hf://datasets/owner/plain"], tmp_path, nobody)[0]
    assert "HF_HUB_OFFLINE forbids" in fetched(["hf://datasets/owner/plain"], tmp_path, nobody, "1")[0]


def test_names() -> None:
    assert is_on_hub("hf://datasets/a/b")
    assert not is_on_hub("data/train.jsonl")
    for wrong in ("hf://a/b", "hf://datasets/a", "hf://models/a/b"):
        with pytest.raises(InputError, match="is not of the form"):
            fetch(wrong)
