"""The JSON API: answers, refusals, hostile uploads, load from another process, the end."""

import base64
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

import fpn_d2
from fpn_d2 import cli
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.analysis.serve.schema import ANSWER, ERROR
from fpn_d2.cli.serve import EXAMPLE
from fpn_d2.inference.json_lines import detections_of

from .conftest import QUEUE, UPLOAD_MB, start


def matches(value, schema: dict, place: str = "answer") -> None:
    """Fail unless a value is what a schema says; knows the words that ours use."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    asked = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(isinstance(value, kinds[kind]) for kind in asked) and not isinstance(value, bool), place
    known = {"type", "description", "properties", "required", "additionalProperties"}
    assert set(schema) <= known | {"items", "minItems", "maxItems", "minimum", "maximum"}
    if isinstance(value, dict):
        assert set(schema["required"]) <= set(value) <= set(schema["properties"]), place
        for name, one in value.items():
            matches(one, schema["properties"][name], f"{place}.{name}")
    elif isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), place
        for one in value:
            matches(one, schema["items"], f"{place}[]")
    elif isinstance(value, (int, float)):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), place


@pytest.fixture(scope="module")
def predictor(server):
    return fpn_d2.load(server.checkpoint, device="cpu")


def test_help_has_the_example(capsys):
    """What it says is run by the fixture."""
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert EXAMPLE in " ".join(capsys.readouterr().out.split())


def test_answers_are_the_predictors_own_with_levels(server, predictor):
    assert server.said.startswith(f"Serving at http://127.0.0.1:{server.port} ")
    rule, found = Rule.of(predictor.cfg), 0
    for path in server.images[:3]:
        status, answer = server.json("POST", "/api/predict?min_score=0.1", path.read_bytes())
        assert status == 200 and (answer["width"], answer["height"]) == (64, 64)
        matches(answer, ANSWER)
        instances = predictor(path)
        instances = instances[instances.scores >= 0.1]
        expected = detections_of(instances, predictor.class_names, predictor.category_ids)
        levels = rule.assign_in(instances.pred_boxes.tensor.double().numpy(), (64, 64))
        assert [one.pop("level") for one in answer["detections"]] == levels.tolist()
        for mine, theirs in zip(answer["detections"], expected, strict=True):
            assert mine["category_id"] == theirs["category_id"]
            np.testing.assert_allclose(mine["bbox"], theirs["bbox"], atol=0.02)
            assert mine["score"] == pytest.approx(theirs["score"], abs=2e-5)
        found += len(expected)
    assert found > 0


def test_maps_kinds_of_files_and_exif(server):
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        file = io.BytesIO()
        tall.save(file, kind, **({"exif": exif} if kind == "JPEG" else {}))
        status, answer = server.json("POST", "/api/predict?maps=true", file.getvalue())
        matches(answer, ANSWER)
        assert (answer["height"], answer["width"]) == ((60, 40) if kind == "JPEG" else (40, 60))
        assert [one["name"] for one in answer["maps"]] == ["p2", "p3", "p4", "p5", "p6"]
        first = Image.open(io.BytesIO(base64.b64decode(answer["maps"][0]["png"])))
        assert first.size[0] <= answer["maps"][0]["width"] and first.size[1] <= answer["maps"][0]["height"]
    deep = io.BytesIO()
    Image.fromarray(np.full((30, 30), 40000, np.uint16)).save(deep, "PNG")
    assert server.json("POST", "/api/predict", deep.getvalue())[0] == 200


def test_model_schema_and_page(server):
    status, about = server.json("GET", "/api/model")
    assert status == 200 and about["levels"] == [2, 3, 4, 5] and len(about["classes"]) == 6
    assert (about["queue"], about["max_upload_bytes"]) == (QUEUE, UPLOAD_MB * 2**20)
    status, described = server.json("GET", "/api/schema")
    assert described["openapi"].startswith("3.1") and "429" in described["paths"]["/api/predict"]["post"]["responses"]
    status, headers, page = server.ask("GET", "/")
    assert status == 200 and b"<!doctype html>" in page and "default-src 'none'" in headers["content-security-policy"]
    for name in re.findall(r'(?:src|href)="([^":]+)"', page.decode()):
        assert server.ask("GET", f"/{name}")[0] == 200
    assert server.ask("GET", "/../app.py")[0] == 404 and server.ask("GET", "/api/predict")[0] == 405


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of so many grey pixels whose data are whatever is given."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    end = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


def bomb(side: int) -> bytes:
    return png(side, side, zlib.compress(b"\0" * (side * (side + 1)), 9))


HOSTILE = {
    "nothing": (b"", 400),
    "text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
    "a closed decoder": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "a gif": (b"GIF89a" + bytes(40), 415),
    "a bomb": (bomb(1500), 413),
    "a size beyond all bounds": (png(2**31 - 1, 2**31 - 1), 413),
    "no pixels": (png(0, 0), 415),
    "too flat": (png(2000, 1, zlib.compress(b"\0" * 2001)), 422),
    "cut short": (bomb(600)[:-40], 422),
    "noise behind a header": (b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8, 415),
    "a text bomb": (
        bomb(60)[:33]
        + struct.pack(">I", len(text := b"k\0\0" + zlib.compress(bytes(4 * 2**20), 9)))
        + (b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text)))
        + bomb(60)[33:],
        422,
    ),
    "too many bytes": (bytes(UPLOAD_MB * 2**20 + 1), 413),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads_are_refused(server, name):
    body, expected = HOSTILE[name]
    status, answer = server.json("POST", "/api/predict", body)
    assert status == expected, answer
    matches(answer, ERROR)
    assert server.json("GET", "/health")[1]["in"] == 0


def test_a_chunked_upload_is_bounded_too(server):
    status, answer = server.json("POST", "/api/predict", (bytes(2**16) for _ in range(UPLOAD_MB * 16 + 4)))
    assert status == 413 and "at most" in answer["error"]


@pytest.mark.parametrize("query", ["min_score=2", "min_score=nan", "min_score=a", "maps=1", "size=3"])
def test_wrong_parameters(server, query):
    status, answer = server.json("POST", f"/api/predict?{query}", server.images[0].read_bytes())
    assert status == 400 and answer["error"]


def test_other_names_and_other_sites_are_not_answered(server):
    assert server.ask("GET", "/health", headers={"Host": "evil.example"})[0] == 421
    assert server.ask("GET", "/health", headers={"Host": f"localhost:{server.port}"})[0] == 200
    body = server.images[0].read_bytes()
    assert server.ask("POST", "/api/predict", body, {"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert server.ask("POST", "/api/predict", body, {"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_huge_headers_and_noise_are_refused(server):
    for sent in (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**20, b"\x16\x03\x01" + b"\n\n" * 40):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            try:
                connection.sendall(sent)
                answer = connection.recv(100)
            except OSError:  # it hung up while we still wrote
                answer = b""
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert server.ask("GET", "/health")[0] == 200


_LOAD = """
import http.client, json, sys, threading
port, paths, threads, each = int(sys.argv[1]), sys.argv[4:], int(sys.argv[2]), int(sys.argv[3])
bodies = [open(path, "rb").read() for path in paths]
results, lock = [], threading.Lock()
def work(number):
    for i in range(each):
        which = (number + i) % len(bodies)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/api/predict", bodies[which])
        answer = connection.getresponse()
        text, wait = answer.read(), answer.getheader("Retry-After")
        with lock:
            results.append([which, answer.status, wait, json.loads(text)])
        connection.close()
all_threads = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
[t.start() for t in all_threads]; [t.join() for t in all_threads]
print(json.dumps(results))
"""


def test_under_load_nothing_is_lost_and_429s_are_honest(server):
    """More at once than there are places: each request is answered, rightly or with a 429 that says when to come."""
    paths = [str(path) for path in server.images[:3]]
    alone = [server.json("POST", "/api/predict", open(path, "rb").read())[1]["detections"] for path in paths]
    before = server.json("GET", "/health")[1]
    threads, each = 6 * QUEUE, 4
    command = [sys.executable, "-c", _LOAD, str(server.port), str(threads), str(each), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    results = json.loads(done.stdout)
    statuses = [status for _, status, _, _ in results]
    assert len(results) == threads * each and set(statuses) == {200, 429}
    for which, status, wait, answer in results:
        if status == 200:
            assert answer["detections"] == alone[which]
        else:
            assert int(wait) >= 1 and str(QUEUE) in answer["error"]
    after = server.json("GET", "/health")[1]
    assert after["in"] == 0 and after["failed"] == before["failed"]
    assert after["answered"] - before["answered"] == statuses.count(200)
    assert after["busy"] - before["busy"] == statuses.count(429)


def test_clients_that_hang_up_free_their_places(server):
    before = server.json("GET", "/health")[1]["gone"]
    for _ in range(QUEUE):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\nabc")
    for _ in range(600):
        health = server.json("GET", "/health")[1]
        if health["gone"] == before + QUEUE:
            break
        threading.Event().wait(0.05)
    assert health["gone"] == before + QUEUE and health["in"] == 0
    assert server.ask("POST", "/api/predict", server.images[0].read_bytes())[0] == 200


def test_what_was_let_in_is_answered_after_sigterm(checkpoint, scenes):
    running = start(checkpoint, scenes)
    results: list[int] = []
    body = running.images[0].read_bytes()
    # Its place is taken; the rest of its upload comes after the signal.
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as slow:
        slow.sendall(b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
        slow.sendall(body[:100])
        while running.json("GET", "/health")[1]["in"] < 1:
            pass
        threads = [
            threading.Thread(target=lambda: results.append(running.ask("POST", "/api/predict", body)[0]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        while running.json("GET", "/health")[1]["in"] + len(results) < 5:
            pass
        running.process.send_signal(signal.SIGTERM)
        while True:  # until nobody is let in any more
            try:
                socket.create_connection(("127.0.0.1", running.port), timeout=5).close()
            except OSError:
                break
        slow.sendall(body[100:])
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
    for thread in threads:
        thread.join()
    assert results == [200] * 4
    rest, _ = running.process.communicate(timeout=60)
    assert running.process.returncode == 0 and rest.endswith("Stopped.\n") and "Traceback" not in rest


def test_mistakes_are_said_before_anything_is_served(server, capsys):
    assert cli.main(["serve", str(server.checkpoint), "--port", str(server.port), "--device", "cpu"]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err
    assert cli.main(["serve", str(server.checkpoint), "--queue", "0", "--device", "cpu"]) == 2
    assert "queue is 0" in capsys.readouterr().err
