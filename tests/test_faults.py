"Bad input is refused by name: parameters on the command line, truncated files, foreign checkpoints."

import hashlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from wlsft.core.params import RANGES, ParameterError, check_parameters, check_values
from wlsft.datasets.base import DataError, data_folder
from wlsft.datasets.suites import load_suite
from wlsft.evaluation.stats import bootstrap_table, read_rows, select_lr
from wlsft.study.notebooks import notebook_parameters
from wlsft.study.runs import Run, load_run
from wlsft.study.sweep import alpha_sweep

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def wlsft(*args):
    return subprocess.run(["wlsft", *map(str, args)], cwd=ROOT, capture_output=True, text=True, env=OFFLINE)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("alhpa", 0.9, "parameter = 'alhpa' is not known (did you mean alpha?); allowed: alpha, "),
        ("alpha", "half", "alpha = 'half' is a str; it must be a float"),
        ("k", 2.5, "k = 2.5 is a float; it must be an int"),
        ("alpha", 1.7, "alpha = 1.7 is not allowed; it must be a number from 0 to 1"),
    ],
)
def test_a_notebook_is_refused_before_anything_runs(tmp_path, name, value, message):
    from wlsft.study.cli import main

    notebook, out = str(ROOT / "nbs/04_knn_eval.ipynb"), str(tmp_path / "out.ipynb")
    with pytest.raises(SystemExit) as refusal:
        main(["notebook", notebook, out, "-p", name, str(value)])
    assert message in str(refusal.value) and not list(tmp_path.iterdir())


FILM = "WLSFT with film; allowed: method, adapter, encoder, corpus, "


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(alhpa=1), f"parameter = 'alhpa' is not known to {FILM}"),
        (dict(rank=8), f"parameter = 'rank' is not known to {FILM}"),
        (dict(method="FLIP"), "method = 'FLIP' is not known (did you mean FLYP?); allowed: WLSFT, "),
        (
            dict(adapter="flim"),
            "adapter = 'flim' is not known (did you mean film?); allowed: full, film, token-replay",
        ),
        (dict(epochs=0), "epochs = 0 is not allowed"),
        (dict(epochs=1.5), "epochs = 1.5 is a float; it must be an int"),
        (dict(lr=-1.0), "lr = -1.0 is not allowed"),
        (dict(corpus="cc20k-typo"), "corpus = 'cc20k-typo' is not known (did you mean cc20k?); allowed: "),
        (dict(adapter="token-replay", memory_source="learned", consistency=1.0), "consistency = 1.0 needs"),
    ],
)
def test_training_is_refused_before_it_starts(tmp_path, capsys, params, message):
    from wlsft.study.cli import main

    command = ["train", "--runs", str(tmp_path)]
    for name, value in params.items():
        command += ["-p", name, str(value)]
    with pytest.raises(SystemExit) as refusal:
        main(command)
    assert str(refusal.value).startswith("wlsft train: ") and message in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_notebook_that_fails_is_kept(tmp_path):
    done = wlsft("notebook", "nbs/04_knn_eval.ipynb", tmp_path / "out.ipynb", "-p", "run", "no-such-run")
    assert done.returncode != 0 and "run = 'no-such-run' is not known; allowed: " in done.stderr
    assert not (tmp_path / "out.ipynb").exists() and (tmp_path / "out.failed.ipynb").exists()


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def is_tagged(cell):
    return "parameters" in cell.metadata.get("tags", [])


FOUND = [*sorted(ROOT.glob("nbs/[0-9]*.ipynb")), *sorted(ROOT.glob("nbs/[a-z]*/*.ipynb"))]
NOTEBOOKS = [path for path in FOUND if any(map(is_tagged, code_cells(path)))]
STRANGE = [None, True, -1, 1.5, float("nan"), float("inf"), 10**12, "seven", [], [-1], ["x"], {}]


def is_wrong(name, value, default):
    "Is a value of another type than the default, or out of the parameter's range?"
    widened = isinstance(default, float) and type(value) is int
    if type(value) is not type(default) and not widened:
        return True
    first = value[0] if isinstance(value, list) and value else value
    if name not in RANGES or isinstance(first, (str, list)):
        return False
    low, high = RANGES[name]
    return not low <= first <= high


def wrong_values(defaults):
    "Pairs of a parameter and a value that it must not have."
    pairs = itertools.product(defaults, STRANGE)
    return [(name, value) for name, value in pairs if is_wrong(name, value, defaults[name])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_refuses_wrong_values(path):
    defaults = notebook_parameters(path)
    cells = code_cells(path)
    at = next(i for i, cell in enumerate(cells) if is_tagged(cell))
    parameters, check = cells[at].source, cells[at + 1].source
    assert "check_values(globals())" in check  # before any work, also under plain papermill
    wrong = wrong_values(defaults)
    assert len(wrong) >= 10
    for name, value in wrong:
        with pytest.raises(ParameterError, match=name):
            check_parameters({name: value}, defaults)
            check_values({name: value})
        space = {"__name__": "notebook"}
        exec(parameters, space)  # the cell itself, then what papermill injects
        with pytest.raises(ParameterError, match=name):
            exec(f"{name} = value\n{check}", {**space, "value": value})
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
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
    with pytest.raises(DataError, match="was cut short or changed"):
        load_run(str(shipped))


def test_checkpoint_of_another_model(shipped):
    tensors = load_file(shipped / "theta.safetensors")
    save_file({**tensors, "theta_1.blocks.9.film.gamma": torch.ones(3)}, shipped / "theta.safetensors")
    info = json.loads((shipped / "run.json").read_text())
    info["theta"] = hashlib.sha256((shipped / "theta.safetensors").read_bytes()).hexdigest()
    (shipped / "run.json").write_text(json.dumps(info))
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
    command = ["snakemake", "-n", "--config", "study=nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode != 0
        and "there are: cc20k, coco10k, controls, cost, dose, emojishift" in done.stdout + done.stderr
    )


def test_a_small_bank_is_drawn(tmp_path):
    "Eight training images, fewer than k = 20: single answers are kept at the largest k there is."
    rng = np.random.default_rng(0)
    for part, animal, i in itertools.product(("train", "id-test", "snow"), ("a", "b"), range(4)):
        (tmp_path / part / animal).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / part / animal / f"{part}{i}.png")
    torch.manual_seed(0)
    encoder = timm.create_model("test_vit", num_classes=0).eval()
    zero = {key: value.clone() for key, value in encoder.state_dict().items()}
    one = {key: value + 0.01 for key, value in zero.items()}
    params = dict(method="WLSFT", adapter="full", corpus="c", encoder="test_vit", seed=0, lr=0.1)
    run = Run("r", encoder, zero, one, dict(parameters=params))
    rows = alpha_sweep(run, load_suite(f"mine={tmp_path}", size=160), [0, 1])
    table = bootstrap_table(select_lr(rows.assign(study="")), 20)
    assert set(table["set"]) >= {"ID", "OOD", "snow"}
