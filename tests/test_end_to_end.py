"A short run through the command line: train, sweep; again for nothing."

import json

import pandas as pd
import pytest
from wlsft.study.cli import main
from wlsft.study.runs import train_run


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
