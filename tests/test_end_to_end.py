"A short run through the command line: train, sweep; a graph with figures; again for nothing."

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from wlsft.study.cli import main
from wlsft.study.runs import train_run

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "WLSFT_QUIET": "1"}
FIGURES = ("alpha.png", "alpha.csv", "paths.png", "paths.csv", "methods.png", "k.png", "styles.png")


def call(*command, cwd=ROOT):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=OFFLINE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def flags(params):
    found = []
    for name, value in params.items():
        found += ["-p", name, str(value)]
    return found


@pytest.fixture
def params(tiny):
    return dict(
        adapter="token-replay",
        memory_size=8,
        encoder=f"test_vit={tiny / 'vit.safetensors'}",
        corpus=f"mine={tiny / 'captions.csv'}",
        batch_size=16,
    )


def test_train_and_sweep(tiny, params, tmp_path):
    runs = tmp_path / "runs"
    train = ["train", *flags(params), "--runs", str(runs)]
    main(train)
    (folder,) = [path.parent for path in runs.glob("*/run.json")]
    info = json.loads((folder / "run.json").read_text())
    assert info["parameters"]["adapter"] == "token-replay" and len(info["history"]) == 1
    assert not (folder / "state.pt").exists()

    sweep = [
        "sweep",
        folder.name,
        *flags(dict(alpha_steps=2, suite=f"mine={tiny / 'suite'}", all_banks=True)),
    ]
    sweep += ["--study", "e2e", "--runs", str(runs), "--out", str(folder / "rows.parquet")]
    sweep += ["--cache", str(tmp_path / "cache")]
    main(sweep)
    rows = pd.read_parquet(folder / "rows.parquet")
    assert sorted(rows.alpha.unique()) == [0, 0.5, 1]
    assert set(rows.study) == {"e2e"} and set(rows.method) == {"WLSFT"} and set(rows.run) == {folder.name}
    assert set(rows.adapter) == {"token-replay"} and rows.value.between(0, 100).all()

    made = [folder / "theta.safetensors", *tmp_path.glob("cache/*.parquet")]
    before = [path.stat().st_mtime_ns for path in made]
    main(train)
    main(sweep)
    assert [path.stat().st_mtime_ns for path in made] == before and len(made) == 2
    assert len(list(runs.glob("*/run.json"))) == 1
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "rows.parquet"), rows, check_exact=True)


def test_the_command_trains_what_the_function_does(params, tmp_path):
    main(["train", *flags(params), "--runs", str(tmp_path / "a")])
    (theta,) = tmp_path.glob("a/*/theta.safetensors")
    assert theta.read_bytes() == (train_run(params, tmp_path / "b") / "theta.safetensors").read_bytes()


def test_a_study_becomes_figures(tiny, params, tmp_path):
    "Two runs through the graph; a second call finds nothing to do."
    (tmp_path / "nbs/studies").mkdir(parents=True)
    (tmp_path / "nbs/09_figures.ipynb").symlink_to(ROOT / "nbs/09_figures.ipynb")
    defaults = dict(params, suite=f"mine={tiny / 'suite'}", alpha_steps=1)
    study = dict(title="two", defaults=defaults, runs=[dict(lr=1e-3), dict(lr=1e-2)])
    (tmp_path / "nbs/studies/two.yaml").write_text(json.dumps(study))
    command = ["snakemake", "--snakefile", ROOT / "Snakefile", "--directory", tmp_path, "--cores", "2"]
    command += ["--workflow-profile", ROOT / "profiles/local"]
    command += ["--config", "study=two", "draws=20", f"runs={tmp_path / 'runs'}"]
    call(*command, cwd=tmp_path)
    assert set(FIGURES) <= {path.name for path in (tmp_path / "figures/two").iterdir()}
    rows = pd.read_parquet(tmp_path / "runs/studies/two/rows.parquet")
    assert set(rows.lr) == {1e-3, 1e-2} and set(rows.study) == {"two"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.*")}
    call(*command, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
