"Bad input is refused by name: parameters on the command line, truncated files, foreign checkpoints."

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from wlsft.datasets.base import DataError, data_folder
from wlsft.evaluation.stats import read_rows
from wlsft.core.params import ParameterError, RANGES, check_parameters, check_values
from wlsft.study.notebooks import notebook_parameters
from wlsft.study.runs import load_run

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    return subprocess.run(
        ["wlsft-run", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("alhpa", 0.9, "unknown parameter 'alhpa'; this notebook knows: alpha"),
        ("alpha", "half", "alpha = 'half' is a str; it must be a float"),
        ("k", 2.5, "k = 2.5 is a float; it must be a int"),
        ("alpha", 1.7, "alpha = 1.7 is not allowed; it must be a number from 0 to 1"),
    ],
)
def test_runner_refuses_before_anything_runs(tmp_path, name, value, says):
    done = run("nbs/04_knn_eval.ipynb", tmp_path / "out.ipynb", "-p", name, value)
    assert done.returncode != 0 and says in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "chapter, name, value, says",
    [
        ("04_knn_eval", "run", "no-such-run", "run = 'no-such-run' is not known; allowed: "),
        ("01_adapters", "encoder", "vit_enormous", "encoder = 'vit_enormous' is not known"),
        ("00_data", "corpus", "emojishift-poems", "allowed: emojishift-prompts"),
    ],
)
def test_chapters_refuse_wrong_values(tmp_path, chapter, name, value, says):
    done = run(f"nbs/{chapter}.ipynb", tmp_path / "out.ipynb", "-p", name, value)
    assert done.returncode != 0 and says in done.stderr
    assert not (tmp_path / "out.ipynb").exists() and (tmp_path / "out.failed.ipynb").exists()


NOTEBOOKS = sorted([*ROOT.glob("nbs/[0-9]*.ipynb"), *ROOT.glob("nbs/build/*.ipynb")])
STRANGE = [None, True, -1, 1.5, float("nan"), float("inf"), 10**12, "seven", [], [-1], ["x"], {}]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_refuses_wrong_values(path):
    defaults, refused = notebook_parameters(path), 0
    cells = [
        c["source"] if isinstance(c["source"], str) else "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    at = next(i for i, c in enumerate(cells) if c.startswith(tuple(f"{name}: " for name in defaults)))
    assert "check_values(globals())" in cells[at + 1]  # before any work, also under plain papermill
    for name, default in defaults.items():
        for value in STRANGE:
            wrong_type = type(value) is not type(default) and not (
                isinstance(default, float) and type(value) is int
            )
            number = value[0] if isinstance(value, list) and value else value
            out_of_range = (
                name in RANGES
                and not isinstance(number, (str, list))
                and not wrong_type
                and not RANGES[name][0] <= number <= RANGES[name][1]
            )
            if wrong_type or out_of_range:
                refused += 1
                with pytest.raises(ParameterError, match=name):
                    check_parameters({name: value}, defaults)
                    check_values({name: value})
                space = {"__name__": "notebook"}
                exec(cells[at], space)  # the cell itself, then what papermill injects
                with pytest.raises(ParameterError, match=name):
                    exec(f"{name} = value\n" + cells[at + 1], {**space, "value": value})
    assert refused >= 10
    numbers = {k for k, v in defaults.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    assert numbers <= RANGES.keys()


@pytest.fixture
def shipped(tmp_path):
    "A private copy of one shipped run."
    target = tmp_path / "film-keywords"
    shutil.copytree(data_folder() / "runs/film-keywords", target)
    return target


def test_truncated_checkpoint(shipped):
    path = shipped / "theta.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="missing or cut short"):
        load_run(str(shipped))


def test_checkpoint_of_another_model(shipped):
    tensors = load_file(shipped / "theta.safetensors")
    save_file({**tensors, "theta_1.blocks.9.film.gamma": torch.ones(3)}, shipped / "theta.safetensors")
    with pytest.raises(DataError, match="does not have"):
        load_run(str(shipped))


def test_run_of_another_encoder(shipped):
    info = json.loads((shipped / "run.json").read_text())
    (shipped / "run.json").write_text(json.dumps({**info, "encoder_digest": "0" * 16}))
    with pytest.raises(DataError, match="tuned from other weights"):
        load_run(str(shipped))


def test_rows_that_are_not_rows(tmp_path):
    pd.DataFrame(dict(a=[1])).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has no column study"):
        read_rows([tmp_path / "rows.parquet"])
    with pytest.raises(ParameterError, match="no rows"):
        read_rows([])


def test_unknown_study_names_those_there_are():
    done = subprocess.run(
        ["snakemake", "-n", "--config", "study=nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "there are: cc20k, coco10k, emojishift" in done.stdout + done.stderr
