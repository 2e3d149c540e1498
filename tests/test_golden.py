"Golden bits: tiny runs of every method and adapter, rows of two sweeps. A change must be meant."

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wlsft.study.runs import load_run, train_run
from wlsft.study.sweep import alpha_sweep, suite_of

PATH = Path(__file__).parent / "golden.json"
GOLDEN = json.loads(PATH.read_text())
TEXT = dict(batch_size=16, epochs=2)
LABELS = dict(batch_size=8, epochs=2)
CLIP = dict(batch_size=8, encoder="clip_openclipart", lr=1e-4, head_lr=1e-4, weight_decay=0.1)
REPLAY = dict(adapter="token-replay", memory_size=8)
RUNS = {
    "WLSFT-full": dict(TEXT, adapter="full", lr=1e-4),
    "WLSFT-film": dict(TEXT, adapter="film", lr=1e-2),
    "WLSFT-token-replay": dict(TEXT, **REPLAY, rank=16, consistency=0.5),
    "WLSFT-token-replay-learned": dict(TEXT, **REPLAY, memory_source="learned", seed=1),
    "FT-full": dict(LABELS, method="FT", lr=1e-3, head_lr=1e-2, batch_norm="running"),
    "LP-FT-film": dict(LABELS, method="LP-FT", adapter="film", lr=1e-2, c_values=3),
    "LP-FT-full": dict(LABELS, method="LP-FT", lr=1e-3, c_values=3),
    "FLYP-full": dict(method="FLYP", batch_size=8, micro_batch_size=4),
    "FLYP-film": dict(method="FLYP", batch_size=8, adapter="film", collisions="ignored", lr=1e-2),
    "L2-SP-full": dict(CLIP, method="L2-SP", weight_decay=0.0),
    "LP-clip": dict(method="LP", encoder="clip_openclipart", c_values=3),
    "LP-FT-clip": dict(CLIP, method="LP-FT", c_values=3),
}


def machine():
    "What bits depend on: PyTorch, the processor, and the instructions that PyTorch uses on it."
    cpu = torch.cpu.get_capabilities().get("cpu_name", "")
    return f"{torch.__version__}, {cpu}, {torch.backends.cpu.get_cpu_capability()}"


RECORDING = bool(os.environ.get("RECORD_GOLDEN"))  # write what this machine computes instead of comparing
HERE = GOLDEN.get(machine(), {})
same_machine = pytest.mark.skipif(not (HERE or RECORDING), reason=f"no record for {machine()}")


def check(kind, name, found):
    "Compare with the record, or make it."
    if RECORDING:
        GOLDEN.setdefault(machine(), {}).setdefault(kind, {})[name] = found
        PATH.write_text(json.dumps(GOLDEN) + "\n")
    elif name not in HERE.get(kind, {}):
        pytest.skip(f"{name} is not recorded for {machine()}")
    else:
        assert found == HERE[kind][name]


def hash_of(tensors):
    whole = hashlib.sha256()
    for key in sorted(tensors):
        whole.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


@pytest.fixture(scope="module")
def train(tiny, tmp_path_factory):
    "Train a named run; threads decide the order of sums."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("golden")

    def run(name):
        params = dict(RUNS[name])
        if "method" not in params:
            params["corpus"] = f"mine={tiny / 'captions.csv'}"
        else:
            params["suite"] = f"mine={tiny / 'suite'}"
        if params.get("method") != "FLYP" and "encoder" not in params:
            params["encoder"] = f"test_vit={tiny / 'vit.safetensors'}"
        return train_run(params, folder)

    yield run
    torch.set_num_threads(threads)


@same_machine
@pytest.mark.parametrize("name", RUNS)
def test_weights(train, name):
    saved = load_file(train(name) / "theta.safetensors")
    thetas = {key: value for key, value in saved.items() if key.startswith("theta_")}
    heads = {key: value for key, value in saved.items() if key.startswith("head_")}
    check("runs", name, dict(tensors=len(thetas), theta=hash_of(thetas), head=hash_of(heads)))


@same_machine
@pytest.mark.parametrize("name", ["LP-FT-film", "FLYP-film"])
def test_rows_of_a_sweep(train, name):
    run = load_run(train(name))
    scorers = ["knn", "head", "probe", "distortion"] if name == "LP-FT-film" else ["knn", "head"]
    rows = alpha_sweep(run, suite_of(run), [0, 0.5, 1], scorers, all_banks=True)
    have = []
    for row in rows.itertuples():
        correct = None if row.correct is None else sum(row.correct)
        key = [row.alpha, row.scorer, row.bank, row.layer, row.k, row.set, row.metric]
        have.append([key, [round(row.value, 9), row.n, correct]])
    check("rows", name, sorted(have, key=str))
