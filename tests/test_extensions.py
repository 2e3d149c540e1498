"The five snippets of CONTRIBUTING, as printed, go through training, loading, a sweep and a figure."

import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from wlsft.adapters import ADAPTERS
from wlsft.datasets.corpora import CORPORA
from wlsft.datasets.labelled import SUITES
from wlsft.evaluation.metrics import METRICS
from wlsft.evaluation.stats import bootstrap_table, select_lr
from wlsft.reports.curves import figure_alpha
from wlsft.study.plan import study_plan
from wlsft.study.runs import load_run, train_run
from wlsft.study.sweep import alpha_sweep, suite_of
from wlsft.train import METHODS

ROOT = Path(__file__).resolve().parent.parent
REGISTRIES = (ADAPTERS, METHODS, CORPORA, SUITES, METRICS)


@pytest.fixture(scope="module")
def registered():
    "What the snippets of CONTRIBUTING register, for the time of these tests."
    before = [dict(registry) for registry in REGISTRIES]
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    assert len(snippets) == 5
    assert max(len(snippet.strip().splitlines()) for snippet in snippets) < 25
    for snippet in snippets:
        exec(compile(snippet, "CONTRIBUTING.md", "exec"), {"__name__": "contributed"})
    added = [set(registry) - set(old) for registry, old in zip(REGISTRIES, before)]
    yield list(itertools.chain.from_iterable(added))
    for registry, old in zip(REGISTRIES, before):
        registry.clear()
        registry.update(old)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A data folder with the pictures that the toy corpus reads."
    folder = tmp_path_factory.mktemp("data")
    (folder / "named").mkdir()
    for i in range(12):
        pixels = np.full((40, 40, 3), 20 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f"named/{['dark', 'bright'][i > 5]}_square_{i}.png")
    return folder


def test_from_registration_to_a_figure(registered, root, tiny, tmp_path):
    assert registered == ["block-scale", "FT-smoothed", "named-files", "squares", "balanced_accuracy"]
    encoder = f"test_vit={tiny / 'vit.safetensors'}"
    text = dict(
        adapter="block-scale", corpus="named-files", n_pairs=12, encoder=encoder, batch_size=4, lr=0.1
    )
    labels = dict(method="FT-smoothed", smoothing=0.2, suite="squares", encoder=encoder, batch_size=8)
    parts = []
    for params in (text, labels):
        run = load_run(train_run(params, tmp_path, root), tmp_path, root)
        assert any(not torch.equal(run.theta_0[key], run.theta_1[key]) for key in run.theta_1)
        suite = suite_of(run, "squares", root)
        parts.append(alpha_sweep(run, suite, [0, 0.5, 1], metrics=["accuracy", "balanced_accuracy"]))
    rows = pd.concat(parts).assign(study="toy")
    assert {"block-scale", "full"} == set(rows.adapter) and {"WLSFT", "FT-smoothed"} == set(rows.method)
    assert rows[rows.metric == "balanced_accuracy"].value.between(0, 100).all()
    figure, shown = figure_alpha(bootstrap_table(select_lr(rows), 20))
    titles = " ".join(ax.get_title() for ax in figure.axes)
    assert "block-scale" in titles and "FT-smoothed" in titles and len(shown)


def test_a_study_takes_them(registered, root, tiny, tmp_path):
    encoder = f"test_vit={tiny / 'vit.safetensors'}"
    study = f"""
defaults: {{encoder: '{encoder}', suite: squares, metrics: [accuracy, balanced_accuracy]}}
runs:
- {{adapter: block-scale, corpus: named-files}}
- {{method: FT-smoothed, smoothing: [0.1, 0.2]}}
"""
    (tmp_path / "toy.yaml").write_text(study)
    jobs = list(study_plan(tmp_path / "toy.yaml", root=root).values())
    assert [job.params.get("smoothing") for job in jobs] == [None, 0.1, 0.2]
    assert {tuple(job.sweep["metrics"]) for job in jobs} == {("accuracy", "balanced_accuracy")}
