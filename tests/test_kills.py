"SIGKILL at random moments of data, recording, training, sweep and figure: what a rerun leaves is what an undisturbed run leaves, bit for bit. KILLS says how many."
import multiprocessing as mp
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

KILLS = int(os.environ.get("KILLS", 12))
ctx = mp.get_context("forkserver")
ctx.set_forkserver_preload(["wlsft.interpolation", "wlsft.figures", "wlsft.train", "wlsft.suites", "transformers", "timm"])


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
    params = dict(encoder=f"test_vit={data / 'vit.safetensors'}", corpus=f"mine={data / 'captions.csv'}", adapter="token-replay", memory=8, epochs=3, batch_size=16, seed=seed)
    run = load_run(train_run(params, folder), folder)
    rows = alpha_sweep(run, load_suite(f"mine={data / 'suite'}", size=160), [0, 0.5, 1], "kills", scratch=folder / "scratch")
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
    return theta.parent.name, theta.read_bytes(), pd.read_parquet(f"{folder}/rows.parquet"), Path(f"{folder}/figure.csv").read_bytes(), Path(f"{folder}/figure.png").read_bytes()


def same(a, b):
    return a[0] == b[0] and a[1] == b[1] and a[2].equals(b[2]) and a[3:] == b[3:]


def run(folder, data, **options):
    p = ctx.Process(target=job, args=(str(folder), str(data)), kwargs=options)
    p.start()
    return p


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import timm
    import torch
    from safetensors.torch import save_file
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    colours = dict(red=(220, 30, 30), green=(30, 200, 40), blue=(30, 60, 230))
    lines = ["image,text"]
    for split, n in (("images", 16), ("suite/train", 12), ("suite/id-test", 5), ("suite/noisy", 5)):
        for name, colour in colours.items():
            for i in range(n):
                path = folder / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(np.array(colour) + rng.normal(0, 90 if "noisy" in split else 30, (48, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                if split == "images":
                    lines.append(f"images/{name}/{i}.png,a {name} square number {i}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "vit.safetensors")
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "An undisturbed run, and how long it took."
    for name in ("warm", "whole"):                                                          # the first one waits for the server's imports
        folder, start = tmp_path_factory.mktemp(name), time.time()
        p = run(folder, data)
        p.join()
        assert p.exitcode == 0
    return left(folder), time.time() - start


def test_kill_anywhere(data, whole, tmp_path):
    want, seconds = whole
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
    assert other[1] != whole[0][1]                                                          # a seed changes what is learned
    assert np.allclose(other[2].value[other[2].alpha == 0], rows.value[rows.alpha == 0])     # the pretrained encoder has no seed
