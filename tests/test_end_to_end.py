"One short run through the command line, as studies do it: train, sweep, figures; then again for nothing."

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
from wlsft.study.runs import train_run

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    done = subprocess.run(
        ["wlsft-run", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_train_sweep_figures(tmp_path):
    runs, flags = tmp_path / "runs", ["-p", "study", "e2e", "-p", "runs", tmp_path / "runs"]
    run(
        "--lean",
        "nbs/03_train.ipynb",
        tmp_path / "a.ipynb",
        "-p",
        "encoder",
        "vit_tiny_emojishift",
        "-p",
        "adapter",
        "token-replay",
        "-p",
        "memory",
        8,
        *flags,
    )
    (folder,) = [p.parent for p in runs.glob("*/run.json")]
    info = json.loads((folder / "run.json").read_text())
    assert (
        info["parameters"]["adapter"] == "token-replay"
        and len(info["history"]) == 1
        and not (folder / "state.pt").exists()
    )

    run(
        "--lean",
        "nbs/05_interpolation.ipynb",
        tmp_path / "b.ipynb",
        "-p",
        "run",
        folder.name,
        "-p",
        "out",
        folder / "rows.parquet",
        *flags,
    )
    rows = pd.read_parquet(folder / "rows.parquet")
    assert (
        sorted(rows.alpha.unique()) == [0, 0.5, 1]
        and set(rows.method) == {"WLSFT-TR"}
        and rows.value.between(0, 100).all()
    )

    run(
        "nbs/09_figures.ipynb",
        tmp_path / "c.ipynb",
        "-p",
        "rows",
        runs,
        "-p",
        "out",
        tmp_path / "figures",
        "-p",
        "draws",
        20,
    )
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"alpha.png", "alpha.csv", "paths.png", "paths.csv", "methods.png", "k.png", "styles.png"} <= names

    before = (folder / "theta.safetensors").stat().st_mtime_ns
    run(
        "--lean",
        "nbs/03_train.ipynb",
        tmp_path / "d.ipynb",
        "-p",
        "encoder",
        "vit_tiny_emojishift",
        "-p",
        "adapter",
        "token-replay",
        "-p",
        "memory",
        8,
        *flags,
    )
    assert (folder / "theta.safetensors").stat().st_mtime_ns == before and len(
        list(runs.glob("*/run.json"))
    ) == 1


def test_a_lean_chapter_trains_what_the_function_does(tiny, tmp_path):
    params = dict(
        encoder=f"test_vit={tiny}/vit.safetensors",
        corpus=f"mine={tiny}/captions.csv",
        adapter="film",
        batch_size=16,
    )
    run(
        "--lean",
        "nbs/03_train.ipynb",
        tmp_path / "a.ipynb",
        *(x for k, v in params.items() for x in ("-p", k, v)),
        "-p",
        "runs",
        tmp_path / "a",
    )
    (theta,) = tmp_path.glob("a/*/theta.safetensors")
    assert theta.read_bytes() == (train_run(params, tmp_path / "b") / "theta.safetensors").read_bytes()
