"""A server in a process of its own, with a small detector of random weights."""

import http.client
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from detectron2.modeling import build_model

from fpn_d2.checkpoint.contents import contents
from fpn_d2.cli.serve import EXAMPLE
from fpn_d2.data import register_from_config
from fpn_d2.engine import ReportingCheckpointer
from tests.engine.small import small_config

ROOT = Path(__file__).resolve().parents[3]
QUEUE, UPLOAD_MB = 4, 1


@dataclass
class Server:
    """A server that runs.

    Attributes:
        process: its process.
        port: at 127.0.0.1.
        checkpoint: of its detector.
        images: paths of images of 64 x 64 pixels.
        said: its first line.
    """

    process: subprocess.Popen
    port: int
    checkpoint: Path
    images: list[Path]
    said: str

    def ask(self, method: str, path: str, body=None, headers: dict | None = None, seconds: float = 60):
        """Status, headers and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body=None, **options) -> tuple[int, dict]:
        """Status and content of one request."""
        status, _, text = self.ask(method, path, body, **options)
        return status, json.loads(text)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, scenes) -> Path:
    """Folder in which the example of ``--help`` finds its checkpoint."""
    folder = tmp_path_factory.mktemp("serve")
    cfg = small_config(folder / "cfg", scenes, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    register_from_config(cfg)
    (folder / "output" / "my").mkdir(parents=True)
    ReportingCheckpointer(build_model(cfg), str(folder / "output" / "my"), about=contents(cfg)).save("model_best")
    return folder


def start(checkpoint: Path, scenes: Path, *options: str) -> Server:
    """Start what the example of ``--help`` says, at a free port."""
    words = shlex.split(EXAMPLE.replace("--port 8000", "--port 0"))[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "fpn_d2.cli", *words, *options]
    process = subprocess.Popen(
        command, cwd=checkpoint, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    line = process.stdout.readline()
    while line and not line.startswith("Serving"):
        line = process.stdout.readline()
    assert line, "the server ended before it served"
    port = int(line.split(":")[2].split()[0])
    images = sorted((scenes / "images" / "train").iterdir())
    return Server(process, port, checkpoint / "output" / "my" / "model_best.pth", images, line)


@pytest.fixture(scope="session")
def server(checkpoint, scenes):
    options = ("--queue", str(QUEUE), "--max-upload", str(UPLOAD_MB), "--max-pixels", "2")
    running = start(checkpoint, scenes, *options)
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0
