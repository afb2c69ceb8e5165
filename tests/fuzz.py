"""Feed damaged and hostile inputs to what reads a stranger's files: weights, configurations, COCO jsons, VOC folders.

    python -m tests.fuzz --target weights --minutes 3

Each input is a valid one, made here, of which parts were changed. What an input may do: be read, or be refused as a
user's mistake. An exception of any other kind, 20 seconds of work, or more than 2 GiB of memory is a finding: it is
written into --findings, and the exit status is 1. With --engine atheris, that fuzzer (pip install atheris) chooses the
inputs by which lines they reach.
"""

import argparse
import collections
import io
import json
import logging
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from PIL import Image

if "atheris" in sys.argv:  # its instruments go into what is imported under it
    import atheris

    with atheris.instrument_imports(include=["fpn_d2", "pickletools", "yaml"]):
        import fpn_d2.checkpoint.reading
        import fpn_d2.config_files  # noqa: F401

from fpn_d2.errors import UserError

_SECONDS = 20  # for one input: a loaded machine is slow
_SPARE_MEMORY = 2**31
_NUMBERS = [0, 1, -1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64]


_YAML_VALUES = [
    *("1", "-1", "0", "1.5", "1e400", "2e-3", ".nan", ".inf", "yes", "null", "~", "''", "x", '"a b"', "[]"),
    *("[1, 2]", "[[1, 2.5], [x]]", "{A: 1}", "(1, 2)", '"(1, 2)"', '"[" ', "!!python/tuple [1, 2]", "!!set {a}"),
    *("1_000", "{}", "2001-01-01"),
    *("0x10", "9" * 400, '"__import__(\'os\')"', "'\\x00'", '"\\u202e"', "!!binary aGk=", "&a [*a]", "[[[[[[]]]]]]"),
    *('"1 + 1"', '"None"', '"True"', "[null]", "[true, 1]", "{1: 2}", "{null: x}", '"1,2"', "build_fpn_backbone", "GN"),
]


class Hang(BaseException):
    """An input took too long."""


class Weights:
    """Files for `read_checkpoint`; the first byte says whether the rest is the file or the pickle in torch's zip."""

    words = [
        *(b"(", b")", b"t", b"R", b"b", b"s", b"u", b"a", b"e", b"]", b"}", b"q\x00", b"h\x00", b"2", b"0", b"1", b"Q"),
        *(b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94",
        b"\x8a\x08"),
        *(f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode() for name in (
            "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.FloatStorage", "torch.Size",
            "torch._tensor._rebuild_from_type_v2", "collections.OrderedDict", "collections.defaultdict", "numpy.dtype",
            "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "numpy.ndarray", "_codecs.encode",
            "builtins.set", "builtins.list", "os.system", "builtins.eval", "torch.storage._load_from_bytes",
        )),
        b"r\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\x00\x00\x00", b"\x8b\xff\xff\xff\x7f", b"PK\x01\x02",
        b"\x80\x05",
    ]  # fmt: skip

    def __init__(self, folder: Path):
        from fpn_d2.checkpoint.reading import read_checkpoint

        self._read = read_checkpoint
        self._path = str(folder / "w.pth")
        self._blocks = {f"w/data/{i}": np.arange(n, dtype="f4").tobytes() for i, n in enumerate((6, 2, 1))}

    def seeds(self) -> list[bytes]:
        base = torch.arange(6.0).view(2, 3)
        state = collections.OrderedDict([("a.weight", base.t()), ("a.bias", torch.ones(2)), ("n", torch.tensor(1.0))])
        whole = {"model": state, "iteration": np.int64(3), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
        zoo = {"model": {"a": np.ones((2, 3), "f4"), "b": np.float64(1)}, "__author__": "x",
        "blobs": {b"c_w": np.ones(2)}}
        seeds = [b"\0" + pickle.dumps(value, protocol) for value in (zoo,
        {"blobs": zoo["model"]}) for protocol in (0, 2, 4, 5)]
        seeds += [b"\0" + pickle.dumps(state, 2)]
        for form in (True, False):
            file = io.BytesIO()
            torch.save(whole, file, _use_new_zipfile_serialization=form)
            seeds.append(b"\0" + file.getvalue())
            if form:
                archive = zipfile.ZipFile(file)
                program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
                seeds += [b"\1" + program] * 6
        header = json.dumps({"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
        return [*seeds, b"\0" + struct.pack("<Q", len(header)) + header + bytes(8)]

    def run(self, data: bytes) -> None:
        content = data[1:]
        if data[:1] == b"\1":
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, member in {"w/data.pkl": content, **self._blocks}.items():
                    archive.writestr(name, member)
            content = file.getvalue()
        with open(self._path, "wb") as file:
            file.write(content)
        self._read(self._path)


class Config:
    """YAML files, read and merged over Detectron2's defaults and ours."""

    words = [
        *(b"!!python/tuple ", b"!!python/object/apply:eval ", b"!!python/name:os.system ", b"_BASE_: c.yaml\n",
        b"<<: *a\n"),
        *(b"&a ", b"*a", b"[", b"]", b"{", b"}", b": ", b"- ", b"? ", b"| \n", b"'",
        b'"', b"\n  ", b"%YAML 1.1\n", b"---\n"),
        *(b"!!int ", b"!!float ", b"!!binary ", b"!!set ", b"!!omap ", b"!!timestamp ", b".inf", b"~", b"2001-01-01",
        b"\\x00"),
        *(b"VERSION: 1\n", b"MODEL:\n", b"SOLVER: {BASE_LR: 1}\n", b"(1, 2)", b"(((((((", b"-----1", b"1e999",
        b"9" * 400),
    ]  # fmt: skip

    def __init__(self, folder: Path):
        from fpn_d2.config import add_fpn_d2_config
        from fpn_d2.engine import prepare

        self._merge = prepare._merge_file
        # The search for a key of a like name takes 0.2 s and is the same for every name: it is made for few inputs.
        self._look_up, self._prepare = prepare.did_you_mean, prepare
        self._cfg = get_cfg()
        add_fpn_d2_config(self._cfg)
        self._keys = prepare._all_keys(self._cfg)
        self._path = str(folder / "c.yaml")
        (folder / "base.yaml").write_text("VERSION: 2\nMODEL: {MASK_ON: True}\n")

    def made(self, rng: random.Random) -> bytes:
        """A file of some keys that there are, each with a value of any kind."""
        lines = [b"_BASE_: base.yaml\n"] if rng.random() < 0.1 else []
        for key in rng.sample(self._keys, rng.choice((1, 1, 2, 4))):
            *sections, last = key.split(".")
            value = rng.choice(_YAML_VALUES)
            lines += [b"".join(f"{section}: {{".encode() for section in sections) + f"{last}: {value}".encode()]
            lines[-1] += b"}" * len(sections) + b"\n"
        return b"".join(lines)

    def seeds(self) -> list[bytes]:
        return [
            b"_BASE_: base.yaml\nMODEL:\n  WEIGHTS: w.pkl\n  FPN: {NORM: GN, OUT_CHANNELS: 64}\n",
            b"SOLVER:\n  STEPS: (60000, 80000)\n  BASE_LR: 0.02\nDATASETS: {TEST: !!python/tuple [b]}\n",
            b"A: &a {B: 1}\nC: *a\nD: {<<: *a, E: [1, 2.5, x, null, yes]}\n",
            b"MODEL: {ANCHOR_GENERATOR: {SIZES: !!python/object/apply:eval ['[[x, x * 2**.5] for x in [32, 64]]']}}\n",
            b"VERSION: 1\nMODEL: {WEIGHT: a}\nTEST: {AUG_ON: True}\n",
            b"INPUT:\n- 1\n- {a: b}\n? [k]\n: |\n  text\n  more\n",
        ]

    def run(self, data: bytes) -> None:
        with open(self._path, "wb") as file:
            file.write(data)
        self._prepare.did_you_mean = self._look_up if sum(data) % 50 == 0 else lambda *_: ""
        try:
            self._merge(self._cfg.clone(), self._path)
        finally:
            self._prepare.did_you_mean = self._look_up


class _Data:
    """Sets for the check of `fpn_d2.data.check`, with one sound image of 40 x 30 pixels; each is repaired too."""

    def __init__(self, folder: Path):
        from fpn_d2.data.check import check_set
        from fpn_d2.data.coco_annotations import CheckOptions

        self._check, self._options = check_set, CheckOptions(jobs=1)
        self._folder = folder
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / "a.jpg")
        (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")

    def _look(self, source: Path, **where: str) -> None:
        found = self._check(str(source), self._options, **where)
        if not found.stopped:
            collections.deque(found.repaired(), maxlen=0)


class Coco(_Data):
    words = [
        *(b'"id":', b'"image_id":', b'"bbox":', b'"category_id":', b'"segmentation":', b'"iscrowd":', b'"area":',
        b'"images":'),
        *(b"[", b"]", b"{", b"}", b",", b":", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b'"\\u0000"',
        b'"\\ud800"', b'""'),
        *(b"9" * 400, b"0.1", b"-1", b"[[1,2,3,4,5,6]]", b'{"counts":"a","size":[1,1]}', b"\xef\xbb\xbf", b"[" * 500,
        b'{"a":' * 200),
    ]  # fmt: skip

    def seeds(self) -> list[bytes]:
        image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}
        category = {"id": 1, "name": "thing", "supercategory": ""}
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}
        mask = {**box, "id": 2, "segmentation": [[1, 2, 11, 2, 11, 14, 1, 14]]}
        crowd = {**box, "id": 3, "iscrowd": 1, "segmentation": {"counts": [0, 1200], "size": [30, 40]}}
        points = {**box, "id": "4", "keypoints": [1, 2, 2], "num_keypoints": 1}
        sets = ([box], [box, mask, crowd], [points, mask], [])
        contents = [{"images": [image], "categories": [category], "annotations": some} for some in sets]
        text = {**contents[0], "images": [{**image, "id": "x"}], "annotations": [{**box, "image_id": "x"}], "info": {}}
        return [json.dumps(content).encode() for content in (*contents, text)]

    def run(self, data: bytes) -> None:
        file = self._folder / "a.json"
        file.write_bytes(data)
        self._look(file, images=str(self._folder / "JPEGImages"))


class Voc(_Data):
    words = [
        *(b"<object>", b"</object>", b"<bndbox>", b"</bndbox>", b"<xmin>", b"</xmin>", b"<name>", b"</name>",
        b"<!--", b"-->"),
        *(b"<![CDATA[", b"]]>", b"&amp;", b"&a;", b"&#0;", b"&#x110000;", b"<!DOCTYPE a [", b"<!ENTITY a 'b'>",
        b"]>", b"<a/>"),
        *(b'encoding="gbk"', b'encoding="utf-16"', b'encoding="utf-7"', b'encoding="hex"', b'encoding="idna"',
        b"nan", b"-1e400"),
        *(b"9" * 400, b"\x00", b"\xff", b"<a>" * 300, b"<difficult>1</difficult>", b"\xef\xbb\xbf"),
    ]  # fmt: skip

    def seeds(self) -> list[bytes]:
        box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>14</ymax></bndbox>"
        one = f"<object><name>thing</name><difficult>0</difficult>{box}</object>"
        body = f"<annotation><size><width>40</width><height>30</height></size>{one}</annotation>"
        laughs = "<!DOCTYPE a [<!ENTITY a 'xx'><!ENTITY b '&a;&a;'>]>"
        texts = [body, body.replace("thing", "&b;")]
        return [
            texts[0].encode(),
            f'<?xml version="1.0" encoding="gbk"?>{body}'.encode("gbk"),
            f"<?xml version='1.0'?>{laughs}{texts[1]}".encode(),
            body.replace(one, one * 3).encode(),
            body.encode("utf-16"),
        ]

    def run(self, data: bytes) -> None:
        (self._folder / "Annotations" / "a.xml").write_bytes(data)
        self._look(self._folder, split="train")


TARGETS = {"weights": Weights, "config": Config, "coco": Coco, "voc": Voc}


def changed(data: bytes, rng: random.Random, words: list[bytes], seeds: list[bytes]) -> bytes:
    """``data`` with a few parts put in, taken out, doubled or overwritten; the first byte of weights may change too."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 30))
        kind = rng.randrange(9)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = out[at : at + length] * rng.choice((1, 1, 2, 100))
        elif kind in (3, 4):
            out[at:at] = rng.choice(words)
        elif kind == 5:
            out[at : at + length] = rng.choice(words)
        elif kind == 6:
            number = rng.choice(_NUMBERS)
            ways = (str(number).encode(), (number % 2**32).to_bytes(4, "little"), (number % 2**64).to_bytes(8,
            "little"))
            way = rng.choice(ways)
            out[at : at + rng.choice((0, len(way)))] = way
        elif kind == 7:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            out[at : at + rng.choice((0, length))] = other[start : start + rng.choice((4, 30, 200))]
        elif out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def is_refusal(error: Exception) -> bool:
    """Whether ``error`` is a mistake of the user's: what `user_mistakes_end_the_program` prints as one line."""
    return isinstance(error, UserError)


class Fuzz:
    """Runs a target on inputs, one after another, and counts what becomes of them."""

    def __init__(self, name: str, folder: Path, findings: Path):
        self._name, self._findings = name, findings
        self.target = TARGETS[name](folder)
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0
        signal.signal(signal.SIGALRM, self._too_long)

    def _too_long(self, *_: object) -> None:
        raise Hang(f"more than {_SECONDS} s")

    def one(self, data: bytes) -> None:
        """Run the target on one input; once more if it took too long, as a machine that stood still is no finding."""
        for last in (False, True):
            signal.alarm(_SECONDS)
            start = time.process_time()
            try:
                self.target.run(data)
                self.counts["read"] += 1
                return
            except (Exception, Hang) as error:
                signal.alarm(0)
                if isinstance(error, Hang) and not last:
                    continue
                if isinstance(error, Exception) and is_refusal(error):
                    self.counts["refused"] += 1
                else:
                    self._keep(data, error)
                return
            finally:
                signal.alarm(0)
                self.slowest = max(self.slowest, time.process_time() - start)

    def _keep(self, data: bytes, error: BaseException) -> None:
        self.counts["found"] += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        self.counts[key] += 1
        if self.counts[key] <= 3:
            self._findings.mkdir(parents=True, exist_ok=True)
            place = self._findings / f"{self._name}-{self.counts['found']}"
            place.with_suffix(".bin").write_bytes(data)
            place.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))

    def result(self) -> dict:
        """What `report` says, as numbers."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        read, refused, found = (self.counts[key] for key in ("read", "refused", "found"))
        return {
            "target": self._name, "inputs": read + refused + found, "read": read, "refused": refused, "found": found,
            "slowest": round(self.slowest, 2), "peak_mib": round(peak),
        }  # fmt: skip

    def report(self) -> str:
        total = sum(self.counts[key] for key in ("read", "refused", "found"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rest = {key: n for key, n in self.counts.items() if key not in ("read", "refused", "found")}
        return (
            f"{self._name}: {total} inputs, {self.counts['read']} read, {self.counts['refused']} refused, "
            f"{self.counts['found']} findings {rest or ''}; slowest {self.slowest:.2f} s, peak memory {peak:.0f} MiB"
        )


def bound_memory() -> None:
    """Let this process have 2 GiB more of addresses than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _SPARE_MEMORY,) * 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, default=0, help="stop after so many inputs, whatever the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("output/fuzz"))
    parser.add_argument("--json", type=Path, help="write the counts into this file too")
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        if args.engine == "atheris":
            fuzz = Fuzz(args.target, Path(folder), args.findings)
            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            for number, seed in enumerate(fuzz.target.seeds()):
                (corpus / str(number)).write_bytes(seed)
            options = [f"-max_total_time={int(60 * args.minutes)}", "-rss_limit_mb=4096", f"-seed={args.seed + 1}"]

            def one(data: bytes) -> None:
                fuzz.one(data)
                if sum(fuzz.counts[key] for key in ("read", "refused", "found")) % 5000 == 0:
                    print(fuzz.report(), flush=True)

            atheris.Setup([sys.argv[0], str(corpus), *options], one)
            atheris.Fuzz()
        fuzz = Fuzz(args.target, Path(folder), args.findings)
        bound_memory()
        rng = random.Random(args.seed)
        seeds = fuzz.target.seeds()
        pool = list(seeds)
        end, count = time.monotonic() + 60 * args.minutes, 0
        for seed in seeds:
            fuzz.one(seed)
        while time.monotonic() < end and not (args.inputs and count >= args.inputs):
            made = getattr(fuzz.target, "made", None)
            if made and rng.random() < 0.5:
                data = made(rng)
            else:
                data = changed(rng.choice(pool), rng, fuzz.target.words, seeds)
            before = fuzz.counts["read"]
            fuzz.one(data)
            count += 1
            # What was read although it was changed is a good start for further changes.
            if fuzz.counts["read"] > before and len(data) < 5000 and rng.random() < 0.05:
                pool = (pool if len(pool) < 500 else seeds + rng.sample(pool, 250)) + [data]
        print(fuzz.report(), flush=True)
        if args.json:
            args.json.write_text(json.dumps(fuzz.result()))
    return 1 if fuzz.counts["found"] else 0


if __name__ == "__main__":
    sys.exit(main())
