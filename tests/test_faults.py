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
from wlsft.data import DataError, data_folder
from wlsft.figures import read_rows
from wlsft.study import ParameterError
from wlsft.runs import load_run

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    return subprocess.run(["wlsft-run", *map(str, args)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("name, value, says", [
    ("alhpa", 0.9, "unknown parameter 'alhpa'; this notebook knows: alpha"),
    ("alpha", "half", "alpha = 'half' is a str; it must be a float"),
    ("k", 2.5, "k = 2.5 is a float; it must be a int"),
])
def test_runner_refuses_before_anything_runs(tmp_path, name, value, says):
    done = run("nbs/04_knn_eval.ipynb", tmp_path / "out.ipynb", "-p", name, value)
    assert done.returncode != 0 and says in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("chapter, name, value, says", [
    ("04_knn_eval", "alpha", 1.7, "alpha = 1.7 is not allowed; it must be a number from 0 to 1"),
    ("04_knn_eval", "run", "no-such-run", "run = 'no-such-run' is not known; allowed: "),
    ("01_adapters", "encoder", "vit_enormous", "encoder = 'vit_enormous' is not known"),
    ("00_data", "corpus", "emojishift-poems", "allowed: emojishift-prompts"),
])
def test_chapters_refuse_wrong_values(tmp_path, chapter, name, value, says):
    done = run(f"nbs/{chapter}.ipynb", tmp_path / "out.ipynb", "-p", name, value)
    assert done.returncode != 0 and says in done.stderr
    assert not (tmp_path / "out.ipynb").exists() and (tmp_path / "out.failed.ipynb").exists()


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
    done = subprocess.run(["snakemake", "-n", "--config", "study=nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "there are: cc20k, coco10k, emojishift" in done.stdout + done.stderr
