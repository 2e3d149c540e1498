"""Readers fed with damaged and hostile files: a `DataError`, a `ParameterError`, or an answer.

Never another exception, a hang or a swollen process. FUZZ says how many inputs a reader (FUZZ=10000 for an
evening), GUIDED how many that follow coverage.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from wlsft.core.device import peak_memory_mb
from wlsft.core.params import ParameterError
from wlsft.datasets.base import DataError, data_folder
from wlsft.datasets.own_tables import table_pairs
from wlsft.datasets.img2dataset import TarSource, tar_members, tar_pairs
from wlsft.datasets.corpora import coco_pairs
from wlsft.datasets.emojishift import read_style
from wlsft.datasets.images import FileSource, ImageFiles
from wlsft.evaluation.stats import read_rows
from wlsft.models.weights import read_weights
from wlsft.study.plan import expand_study
from wlsft.study.runs import load_run

GUIDED = os.environ.get("GUIDED")  # inputs a reader from atheris, which follows coverage
FUZZ = int(os.environ.get("FUZZ", 100))
REFUSED = (DataError, ParameterError)
RUNS_OF_STUDY = "{adapter: [film, full], lr: 0.1}", "{adapter: film, corpus: emojishift-names}"
STUDY = "\n- ".join(["title: t\ndefaults: {encoder: e, epochs: 2}\nruns:", *RUNS_OF_STUDY]).encode()


def picture(kind, size=(40, 30)):
    b = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).save(b, kind)
    return b.getvalue()


MEMBERS = {
    "0.jpg": picture("JPEG"),
    "0.txt": b"a cat",
    "1.png": picture("PNG"),
    "1.json": b'{"caption": "a dog"}',
    "../../2.jpg": picture("JPEG"),
}


def tar_bytes():
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode="w") as tar:
        for name, body in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return b.getvalue()


def weights_bytes(folder):
    save_file({"a.weight": torch.ones(3, 2)}, folder / "w")
    return (folder / "w").read_bytes()


def pth_bytes(folder):
    torch.save({"state_dict": {"a": torch.ones(2)}}, folder / "t")
    return (folder / "t").read_bytes()


def parquet_bytes(folder):
    pd.read_parquet(data_folder() / "results/emojishift.parquet").head(20).to_parquet(folder / "p")
    return (folder / "p").read_bytes()


def run_bytes(folder):
    return (data_folder() / "runs/film-keywords/run.json").read_bytes()


def coco_bytes(folder):
    images = [dict(id=i, file_name=f"{i}.jpg") for i in range(3)]
    annotations = [dict(image_id=i, caption=f"number {i}") for i in range(3)]
    return json.dumps(dict(images=images, annotations=annotations)).encode()


def read_coco(folder, raw):
    for sub in ("coco/annotations", "coco/train2017"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    (folder / "coco/annotations/captions_train2017.json").write_bytes(raw)
    coco_pairs(folder, 3, 0, 8, "")


def read_run(folder, raw):
    (folder / "run.json").write_bytes(raw)
    (folder / "theta.safetensors").write_bytes(b"")
    load_run(str(folder))


def read_emoji(folder, raw):
    emoji = folder / "emojishift"
    emoji.mkdir(exist_ok=True)
    (emoji / "noto.parquet").write_bytes(raw)
    (emoji / "checksums.json").write_bytes((data_folder() / "emojishift/checksums.json").read_bytes())
    read_style("noto", folder)


def read_image(path):
    return ImageFiles.from_source(FileSource([path]), 16).decode(0)


def read_tar(path):
    source = TarSource(tar_members(path))
    return [source.read(i) for i in range(len(source))]


def written(name, read):
    "A reader of bytes, which it first writes to a file."

    def write_and_read(folder, raw):
        (folder / name).write_bytes(raw)
        return read(folder / name)

    return write_and_read


TABLE = b'filepath,caption\na.jpg,"a, b"\n\xff.jpg,c\n'
READERS = {  # name -> (what reads, a sound file)
    "jpeg": (written("x.jpg", read_image), lambda f: picture("JPEG")),
    "png": (written("x.png", read_image), lambda f: picture("PNG")),
    "webp": (written("x.webp", read_image), lambda f: picture("WEBP")),
    "tiff": (written("x.tif", read_image), lambda f: picture("TIFF")),
    "tar": (written("x.tar", read_tar), lambda f: tar_bytes()),
    "tar of pairs": (written("x.tar", lambda p: tar_pairs([p], 10)), lambda f: tar_bytes()),
    "table": (written("x.csv", table_pairs), lambda f: TABLE),
    "tabs": (written("x.tsv", table_pairs), lambda f: b"filepath\tcaption\na.jpg\tb\n"),
    "coco": (read_coco, coco_bytes),
    "safetensors": (written("x.safetensors", read_weights), weights_bytes),
    "pth": (written("x.pth", read_weights), pth_bytes),
    "rows": (written("rows.parquet", lambda p: read_rows([p])), parquet_bytes),
    "emojishift": (read_emoji, parquet_bytes),
    "run.json": (read_run, run_bytes),
    "study": (written("x.yaml", lambda p: expand_study(p, 2)), lambda f: STUDY),
}
PIECES = [
    b"",
    b"\x00",
    b"\xff" * 8,
    b"\n",
    b",",
    b'"',
    b"[" * 50,
    b"{" * 50,
    b"-1",
    b"1e999",
    b"null",
    b"NaN",
    b"../",
    b"99999999999999999999",
    b"&a [*a, *a]",
    b"!!python/object/apply:os.system [x]",
]


@st.composite
def damage(draw):
    "Cut, overwrite, insert, repeat or swap, at places given as shares of the file."
    place = st.floats(0, 1, exclude_max=True)
    what = st.sampled_from(["cut", "put", "insert", "drop", "repeat", "flip"])
    piece = st.sampled_from(PIECES) | st.binary(max_size=6)
    return draw(st.lists(st.tuples(what, place, place, piece), min_size=1, max_size=6))


def flip(raw, i, bit):
    "One bit of byte i changed, if there is such a byte."
    if i >= len(raw):
        return raw
    return raw[:i] + bytes([raw[i] ^ (1 << bit)]) + raw[i + 1 :]


def damaged(raw, steps):
    for what, a, b, piece in steps:
        i, j = sorted((int(a * len(raw)), int(b * len(raw))))
        if what == "cut":
            raw = raw[:j]
        elif what == "put":
            raw = raw[:i] + piece + raw[i + len(piece) :]
        elif what == "insert":
            raw = raw[:i] + piece + raw[i:]
        elif what == "drop":
            raw = raw[:i] + raw[min(j, i + 64) :]
        elif what == "repeat":
            raw = raw[:j] + raw[i : min(j, i + 4096)] + raw[j:]
        else:
            raw = flip(raw, i, len(piece) % 8)
    return raw


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused(reader, tmp_path):
    read, sound = READERS[reader]
    raw = sound(tmp_path)
    before = peak_memory_mb()

    @settings(
        max_examples=FUZZ,
        deadline=None,
        database=None,
        derandomize=FUZZ <= 100,
        suppress_health_check=list(HealthCheck),
    )
    @example([("put", 0.5, 0.5, b"\x00")])  # found by 7,000 inputs a reader
    @given(damage())
    def feed(steps):
        start = time.time()
        try:
            read(tmp_path, damaged(raw, steps))
        except REFUSED:
            pass
        assert time.time() - start < 10

    feed()
    assert peak_memory_mb() - before < 1500


GUIDE = """
import sys, atheris
sys.path.insert(0, {tests!r})
with atheris.instrument_imports(include=["wlsft", "yaml", "tarfile"]):
    import yaml, tarfile, test_fuzz
from pathlib import Path
reader, place, *flags = sys.argv[1:]
(read, sound), place = test_fuzz.READERS[reader], Path(place)
(place / "corpus").mkdir()
(place / "corpus/sound").write_bytes(sound(place))
def one(data):
    try: read(place, data)
    except test_fuzz.REFUSED: pass
atheris.Setup([reader, str(place / "corpus"), f"-artifact_prefix={{place}}/", *flags], one)
atheris.Fuzz()
"""


@pytest.mark.skipif(not GUIDED, reason="GUIDED=5000 asks for it; pip install atheris")
@pytest.mark.parametrize("reader", READERS)
def test_guided_damage(reader, tmp_path):
    size = len(READERS[reader][1](tmp_path))
    flags = [f"-runs={GUIDED}", f"-max_len={2 * size}", "-timeout=10", "-rss_limit_mb=4000"]
    guide = GUIDE.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-Wignore", "-c", guide, reader, str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"Done {GUIDED} runs" in done.stderr, (done.stdout + done.stderr)[-4000:]


def test_a_tar_is_never_unpacked_and_a_compressed_one_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes())
    before = set(tmp_path.rglob("*"))
    source, *_ = tar_pairs([tmp_path / "x.tar"], 10)
    assert len(source) == 3
    assert set(tmp_path.rglob("*")) == before and not (tmp_path.parent.parent / "2.jpg").exists()
    with tarfile.open(tmp_path / "y.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x.tar")
    with pytest.raises(DataError, match="not a tar"):
        tar_members(tmp_path / "y.tar.gz")


def test_bombs(tmp_path):
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")  # 18 kB on disk
    with pytest.raises(DataError, match=r"bomb\.png cannot be decoded"):
        read_image(tmp_path / "bomb.png")
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"run\.json"):
        load_run(str(tmp_path))
    (tmp_path / "laughs.yaml").write_text(
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nruns: *b\n"
    )
    with pytest.raises(ParameterError, match="is not a study"):
        expand_study(tmp_path / "laughs.yaml")


def test_nothing_in_a_checkpoint_or_a_study_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "was_here").touch, ())

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match="cannot be read as weights"):
        read_weights(tmp_path / "evil.pth")
    (tmp_path / "evil.yaml").write_text(f"runs: !!python/object/apply:os.mkdir ['{tmp_path}/was_here']\n")
    with pytest.raises(ParameterError, match="YAML"):
        expand_study(tmp_path / "evil.yaml")
    assert not (tmp_path / "was_here").exists()
    assert zipfile.is_zipfile(tmp_path / "evil.pth")


IMPORTS = """
import importlib, pkgutil, socket
def refuse(*args, **options): raise SystemExit("the network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import wlsft
for module in pkgutil.walk_packages(wlsft.__path__, "wlsft."): importlib.import_module(module.name)
"""


def test_nothing_is_fetched_at_import():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
