"SIGKILL at random moments of data, recording, training, sweep and figure: what a rerun leaves is what an undisturbed run leaves, bit for bit. KILLS says how many."

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
    ["wlsft.interpolation", "wlsft.figures", "wlsft.train", "wlsft.suites", "transformers", "timm"]
)


def job(folder, data, seed=0):
    "Everything that a study does, in small, in one process."
    import torch
    from wlsft.figures import save_figure
    from wlsft.interpolation import alpha_sweep, write_rows
    from wlsft.runs import load_run
    from wlsft.suites import load_suite
    from wlsft.train import train_run

    os.environ["WLSFT_QUIET"] = "1"
    torch.set_num_threads(1)
    folder, data = Path(folder), Path(data)
    params = dict(
        encoder=f"test_vit={data / 'vit.safetensors'}",
        corpus=f"mine={data / 'captions.csv'}",
        adapter="token-replay",
        memory=8,
        epochs=3,
        batch_size=16,
        seed=seed,
    )
    run = load_run(train_run(params, folder), folder)
    rows = alpha_sweep(
        run, load_suite(f"mine={data / 'suite'}", size=160), [0, 0.5, 1], "kills", scratch=folder / "scratch"
    )
    write_rows(rows, folder / "rows.parquet")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    ax.plot(rows.alpha, rows.value, ".")
    save_figure(fig, rows[["alpha", "set", "value"]], folder, "figure")
    (folder / "done").touch()


def left(folder):
    "What a finished job leaves, without what says how long it took."
    (theta,) = Path(folder).glob("*/theta.safetensors")
    assert not [p for p in Path(folder).rglob("*") if p.suffix == ".npy" and "scratch" in p.parts]
    return (
        theta.parent.name,
        theta.read_bytes(),
        pd.read_parquet(f"{folder}/rows.parquet"),
        Path(f"{folder}/figure.csv").read_bytes(),
        Path(f"{folder}/figure.png").read_bytes(),
    )


def same(a, b):
    return a[0] == b[0] and a[1] == b[1] and a[2].equals(b[2]) and a[3:] == b[3:]


def in_small_files(limit, said, *args):
    "The job where no file may have more bytes than the limit; its error goes to the file `said`."
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    attempt(said, *args)


def attempt(said, *args):
    try:
        job(*args)
    except OSError as e:
        Path(said).write_text(str(e))


def run(folder, data, target=job, before=(), **options):
    p = ctx.Process(target=target, args=(*before, str(folder), str(data)), kwargs=options)
    p.start()
    return p


@pytest.fixture(scope="module")
def data(tiny):
    return tiny


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "An undisturbed run: what it left, how long it took, and its folder."
    for name in ("warm", "whole"):  # the first one waits for the server's imports
        folder, start = tmp_path_factory.mktemp(name), time.time()
        p = run(folder, data)
        p.join()
        assert p.exitcode == 0
    return left(folder), time.time() - start, folder


def test_kill_anywhere(data, whole, tmp_path):
    want, seconds, _ = whole
    kills, jobs, rng = 0, 0, random.Random(0)
    while kills < KILLS:
        folder = tmp_path / str(jobs)
        folder.mkdir()
        while not (folder / "done").exists():
            p = run(folder, data)
            p.join(rng.uniform(0.05, 1.1 * seconds) if kills < KILLS else None)
            if p.is_alive():
                os.kill(p.pid, signal.SIGKILL)
                p.join()
                kills += 1
            else:
                assert p.exitcode == 0, "a rerun did not complete"
        jobs += 1
        assert same(left(folder), want)


def test_the_same_command_twice_and_another_seed(data, whole, tmp_path):
    for name, seed in (("again", 0), ("seed", 1)):
        (tmp_path / name).mkdir()
        p = run(tmp_path / name, data, seed=seed)
        p.join()
        assert p.exitcode == 0
    assert same(left(tmp_path / "again"), whole[0])
    other, rows = left(tmp_path / "seed"), whole[0][2]
    assert other[1] != whole[0][1]  # a seed changes what is learned
    assert np.allclose(
        other[2].value[other[2].alpha == 0], rows.value[rows.alpha == 0]
    )  # the pretrained encoder has no seed


STAGES = {
    "images-": [],
    "state.pt": ["cache"],
    ".npy.part": ["cache", "token-*"],
    "rows.parquet": ["cache", "token-*", "scratch"],
}


@pytest.mark.parametrize("file", STAGES)
def test_files_that_cannot_grow(data, whole, tmp_path, file):
    "Each stage is stopped at its own file; what was there stays, and the job ends well when there is room."
    folder, said = tmp_path / "job", tmp_path / "said"
    folder.mkdir()
    for there in (p for pattern in STAGES[file] for p in whole[2].glob(pattern)):
        (shutil.copytree if there.is_dir() else shutil.copy)(there, folder / there.name)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    p = run(folder, data, in_small_files, (500, str(said)))
    p.join()
    assert p.exitcode == 0 and re.search(
        rf"{file}.* cannot be written: File too large; what was there before is as it was", said.read_text()
    ), said.read_text()
    assert {f: f.read_bytes() for f in before} == before
    p = run(folder, data)
    p.join()
    assert p.exitcode == 0 and same(left(folder), whole[0])


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(data, whole, tmp_path, small_disk):
    "Filled to a few kB by other files, which then go: each time one sentence, no bus error of a mapped array, nothing lost."
    for free in (4, 60, 150, 300):
        with open(small_disk / "filler", "wb") as f:
            room = shutil.disk_usage(small_disk).free
            f.write(b"x" * max(0, room - free * 1024))
        p = run(small_disk, data, attempt, (tmp_path / f"said{free}",))
        p.join()
        assert p.exitcode == 0
        if (tmp_path / f"said{free}").exists():
            assert "cannot be written: No space left on device" in (tmp_path / f"said{free}").read_text()
        (small_disk / "filler").unlink()
    assert (tmp_path / "said4").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    p = run(small_disk, data)
    p.join()
    assert p.exitcode == 0 and same(left(small_disk), whole[0])


def test_a_place_that_is_only_read(data, tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    p = run(small_disk, data, attempt, (tmp_path / "said",))
    p.join()
    assert p.exitcode == 0 and "cannot be made: Read-only file system" in (tmp_path / "said").read_text()


def test_training_does_not_depend_on_workers(data, tmp_path, monkeypatch):
    from wlsft import files
    from wlsft.lp_ft import train_classifier

    loader, left_by = files._loader, {}
    for n in (0, 1, 3):
        monkeypatch.setattr(
            files, "_loader", lambda images, rows, workers, strict, n=n: loader(images, rows, n, strict)
        )
        folder = train_classifier(
            dict(
                method="FT",
                encoder=f"test_vit={data / 'vit.safetensors'}",
                suite=f"mine={data / 'suite'}",
                batch_size=8,
            ),
            tmp_path / str(n),
        )
        left_by[n] = (folder / "theta.safetensors").read_bytes()
    assert left_by[0] == left_by[1] == left_by[3]


def test_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    "The run stops before a weight moves, says where, and keeps the last whole epoch; a rerun goes on from there."
    from wlsft import train

    params = dict(
        encoder=f"test_vit={data / 'vit.safetensors'}",
        corpus=f"mine={data / 'captions.csv'}",
        epochs=3,
        batch_size=16,
    )
    step, calls = train.train_step, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 5:
            raise FloatingPointError("the loss is nan")
        return step(*args)

    monkeypatch.setattr(train, "train_step", breaks)
    with pytest.raises(
        FloatingPointError,
        match=r"epoch 2, step 2: the loss is nan; images \[\d+, .*the last whole epoch is kept",
    ):
        train.train_run(params, tmp_path / "runs")
    (state,) = tmp_path.glob("runs/*/state.pt")
    monkeypatch.setattr(train, "train_step", step)
    resumed, undisturbed = (
        train.train_run(params, tmp_path / "runs"),
        train.train_run(params, tmp_path / "whole"),
    )
    assert (
        not state.exists()
        and (resumed / "theta.safetensors").read_bytes() == (undisturbed / "theta.safetensors").read_bytes()
    )
