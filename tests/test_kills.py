"""SIGKILL at random moments of data, recording, training, sweep and figure.

What a rerun leaves is what an undisturbed run leaves, bit for bit. KILLS says how many.
"""

import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

KILLS = int(os.environ.get("KILLS", 12))
ctx = mp.get_context("forkserver")
ctx.set_forkserver_preload(
    [
        "wlsft.study.runs",
        "wlsft.study.sweep",
        "wlsft.reports.plots",
        "transformers.models.bert.modeling_bert",
        "open_clip.hf_model",
        "timm",
    ]
)


def job(folder, data, seed=0):
    "Everything that a study does, in small, in one process."
    import matplotlib.pyplot as plt
    import torch
    from wlsft.reports.plots import save_figure
    from wlsft.study.runs import load_run, train_run
    from wlsft.study.sweep import alpha_sweep, suite_of, write_rows

    os.environ["WLSFT_QUIET"] = "1"
    torch.set_num_threads(1)
    folder, data = Path(folder), Path(data)
    params = dict(
        encoder=f"test_vit={data / 'vit.safetensors'}",
        corpus=f"mine={data / 'captions.csv'}",
        adapter="token-replay",
        memory_size=8,
        epochs=3,
        batch_size=16,
        seed=seed,
    )
    run = load_run(train_run(params, folder), folder)
    suite = suite_of(run, f"mine={data / 'suite'}")
    rows = alpha_sweep(run, suite, [0, 0.5, 1], cache=folder / "sweeps")
    write_rows(rows.assign(study="kills"), folder / "rows.parquet")
    fig, ax = plt.subplots()
    ax.plot(rows.alpha, rows.value, ".")
    save_figure(fig, rows[["alpha", "set", "value"]], folder, "figure")
    (folder / "done").touch()


def left(folder):
    "What a finished job leaves, without what says how long it took: bytes by name, and the rows."
    folder = Path(folder)
    (theta,) = folder.glob("*/theta.safetensors")
    kept = [path.name for path in folder.glob("sweeps/*.npy")]
    assert all(name.startswith("pretrained-") for name in kept) and len(kept) == 1  # shared by other runs
    files = {f"{theta.parent.name}/theta.safetensors": theta.read_bytes()}
    for name in ("figure.csv", "figure.png"):
        files[name] = (folder / name).read_bytes()
    return files, pd.read_parquet(folder / "rows.parquet")


def same(a, b):
    return a[0] == b[0] and a[1].equals(b[1])


def in_small_files(limit, message, *args):
    "The job where no file may have more bytes than the limit; its error goes to the file `message`."
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    attempt(message, *args)


def attempt(message, *args):
    "The job; what the system refuses goes to the file `message`."
    try:
        job(*args)
    except OSError as e:
        Path(message).write_text(str(e))


def run(folder, data, target=job, before=(), **options):
    process = ctx.Process(target=target, args=(*before, str(folder), str(data)), kwargs=options)
    process.start()
    return process


def complete(folder, data, *target, **options):
    "Run to the end, which must be a good one."
    process = run(folder, data, *target, **options)
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def data(tiny):
    return tiny


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "An undisturbed run: what it left, how long it took, and its folder."
    for name in ("warm", "whole"):  # the first one waits for the server's imports
        folder, start = tmp_path_factory.mktemp(name), time.time()
        complete(folder, data)
    return left(folder), time.time() - start, folder


def test_kill_anywhere(data, whole, tmp_path):
    want, seconds, _ = whole
    kills, jobs, rng = 0, 0, random.Random(0)
    while kills < KILLS:
        folder = tmp_path / str(jobs)
        folder.mkdir()
        while not (folder / "done").exists():
            process = run(folder, data)
            process.join(rng.uniform(0.05, 1.1 * seconds) if kills < KILLS else None)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            else:
                assert process.exitcode == 0, "a rerun did not complete"
        jobs += 1
        assert same(left(folder), want)


def test_the_same_command_twice_and_another_seed(data, whole, tmp_path):
    for name, seed in (("again", 0), ("seed", 1)):
        (tmp_path / name).mkdir()
        complete(tmp_path / name, data, seed=seed)
    assert same(left(tmp_path / "again"), whole[0])
    (files, rows), (other_files, other_rows) = whole[0], left(tmp_path / "seed")
    weights = {content for name, content in files.items() if name.endswith("theta.safetensors")}
    assert not weights & set(other_files.values())  # a seed changes what is learned
    zero, other_zero = rows[rows.alpha == 0], other_rows[other_rows.alpha == 0]
    assert np.allclose(zero.value, other_zero.value)  # the pretrained encoder has no seed


STAGES = {  # the file that a stage cannot write -> what earlier stages have left
    "images-": [],
    "state.pt": ["cache"],
    ".npy.part": ["cache", "WLSFT-*"],
    "rows.parquet": ["cache", "WLSFT-*", "sweeps"],
}


@pytest.mark.parametrize("file", STAGES)
def test_files_that_cannot_grow(data, whole, tmp_path, file):
    "Each stage is stopped at its file; what was there stays, and the job ends well when there is room."
    folder, message = tmp_path / "job", tmp_path / "message"
    folder.mkdir()
    for pattern in STAGES[file]:
        (source,) = whole[2].glob(pattern)
        shutil.copytree(source, folder / source.name)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    complete(folder, data, in_small_files, (500, str(message)))
    reason = "cannot be written: File too large; what was there before is as it was"
    assert re.search(f"{file}.* {reason}", message.read_text()), message.read_text()
    assert {f: f.read_bytes() for f in before} == before
    complete(folder, data)
    assert same(left(folder), whole[0])


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(data, whole, tmp_path, small_disk):
    "Filled but for a few kB by other files, which then go: one sentence each time, and nothing is lost."
    for free in (4, 60, 150, 300):
        message = tmp_path / f"message{free}"
        with open(small_disk / "filler", "wb") as f:
            room = shutil.disk_usage(small_disk).free
            f.write(b"x" * max(0, room - free * 1024))
        complete(small_disk, data, attempt, (message,))
        if message.exists():
            assert "cannot be written: No space left on device" in message.read_text()
        (small_disk / "filler").unlink()
    assert (tmp_path / "message4").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    complete(small_disk, data)
    assert same(left(small_disk), whole[0])


def test_a_place_that_is_only_read(data, tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    complete(small_disk, data, attempt, (tmp_path / "message",))
    assert "cannot be made: Read-only file system" in (tmp_path / "message").read_text()


def test_training_does_not_depend_on_workers(data, tmp_path, monkeypatch):
    from wlsft.datasets import images
    from wlsft.study.runs import train_run

    loader, weights = images._loader, {}
    params = dict(method="FT", encoder=f"test_vit={data / 'vit.safetensors'}", suite=f"mine={data / 'suite'}")
    for n in (0, 1, 3):

        def with_workers(files, rows, workers, strict, n=n):
            return loader(files, rows, n, strict)

        monkeypatch.setattr(images, "_loader", with_workers)
        folder = train_run(dict(params, batch_size=8), tmp_path / str(n))
        weights[n] = (folder / "theta.safetensors").read_bytes()
    assert weights[0] == weights[1] == weights[3]


def test_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    "The run stops before a weight moves and says where; a rerun goes on from the last whole epoch."
    from wlsft.models import loop
    from wlsft.study.runs import train_run

    params = dict(
        encoder=f"test_vit={data / 'vit.safetensors'}",
        corpus=f"mine={data / 'captions.csv'}",
        epochs=3,
        batch_size=16,
    )
    step, calls = loop.train_step, []

    def breaks(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise FloatingPointError("the loss is nan")
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", breaks)
    place = r"epoch 2, step 2: the loss is nan; images \[\d+, .*the last whole epoch is kept"
    with pytest.raises(FloatingPointError, match=place):
        train_run(params, tmp_path / "runs")
    (state,) = tmp_path.glob("runs/*/state.pt")
    monkeypatch.setattr(loop, "train_step", step)
    resumed = train_run(params, tmp_path / "runs")
    undisturbed = train_run(params, tmp_path / "whole")
    assert not state.exists()
    assert (resumed / "theta.safetensors").read_bytes() == (undisturbed / "theta.safetensors").read_bytes()
