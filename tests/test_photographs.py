"""The studies of photographs, from files in the exact formats, on a ViT/16 shrunk to 64 wide.

Train, sweep and tables; two processes; the graph.
"""

import io
import itertools
import json
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from wlsft.datasets.folders import imagenet_ids
from wlsft.datasets.suites import load_suite, write_checksums
from wlsft.evaluation.stats import bootstrap_table, ood_sets, select_lr, selected_changes
from wlsft.models.encoders import load_encoder
from wlsft.models.features import extract_features
from wlsft.reports.curves import figure_alpha, figure_sets
from wlsft.reports.tables import compare_published
from wlsft.study.plan import expand_study
from wlsft.study.protocols import with_protocol
from wlsft.study.runs import load_run, train_run
from wlsft.study.sweep import SWEEP, alpha_sweep, suite_of

ROOT = Path(__file__).resolve().parent.parent
STUDIES = {  # the talk's cells, and one full
    "imagenet20k": ("token-replay", "full"),
    "cc20k": ("token-replay",),
    "coco10k": ("film",),
}
FOLDERS = {
    "imagenet/train": 24,
    "imagenet/val": 6,
    "imagenet-r": 4,
    "imagenet-a": 4,
    "sketch": 4,
}  # images a class
COLOURS = ("red", "green", "blue")


def picture(path, colour, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-60, 60, (90, 120, 3)) + 60 * np.eye(3)[colour] + 90
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    return path


def write_imagenet(root, seed):
    for folder, n in FOLDERS.items():
        for c, i in itertools.product(range(3), range(n)):
            picture(root / folder / imagenet_ids()[c] / f"{i:03}.JPEG", c, next(seed))
    for c in range(3):
        picture(root / f"imagenetv2-matched-frequency-format-val/{c}/0.jpeg", c, next(seed))


def write_cc(root, seed):
    "A tar of pairs; some images are cut short."
    (root / "cc3m").mkdir()
    with tarfile.open(root / "cc3m/00000.tar", "w") as tar:
        for i in range(40):
            image = picture(root / "x.jpg", i % 3, next(seed)).read_bytes()
            whole = image if i % 9 else image[:500]
            for suffix, content in (("jpg", whole), ("txt", f"a {COLOURS[i % 3]} thing".encode())):
                info = tarfile.TarInfo(f"{i:09}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_coco(root, seed):
    "Forty images with five captions each."
    images, annotations = [], []
    for i in range(40):
        path = picture(root / f"coco/train2017/{i:012}.jpg", i % 3, next(seed))
        images.append(dict(id=i, file_name=path.name))
        annotations += [dict(image_id=i, caption=f"{j} {COLOURS[i % 3]} things") for j in range(5)]
    (root / "coco/annotations").mkdir()
    captions = json.dumps(dict(images=images, annotations=annotations))
    (root / "coco/annotations/captions_train2017.json").write_text(captions)


def write_breeds(root):
    first, second, third, *_ = imagenet_ids()
    (root / "breeds").mkdir()
    groups = dict(fish=[[first], [second]], bird=[[third], [third]])
    (root / "breeds/living17.json").write_text(json.dumps(groups))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, seed = tmp_path_factory.mktemp("daten-ü"), itertools.count()
    write_imagenet(root, seed)
    write_cc(root, seed)
    write_coco(root, seed)
    write_breeds(root)
    torch.manual_seed(0)
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    teacher = {f"module.backbone.{key}": value for key, value in weights.items()}
    torch.save(dict(teacher=teacher), root / "dino.pth")
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), root / "resnet.pth")
    (root / "templates.txt").write_text("a photo of a {}.\n")
    write_checksums("imagenet", root)
    return root


@pytest.fixture(scope="module")
def small(data):
    return dict(encoder=f"test_vit={data / 'dino.pth'}", n_pairs=24, epochs=1, batch_size=8)


def runs_of_study(study, small):
    "The first run of each adapter, with as little as possible to do."
    everywhere = dict(small, memory_size=4, rank=8)  # of the runs that have them
    found = {}
    for params in expand_study(ROOT / f"nbs/studies/{study}.yaml", 1, everywhere):
        run = {name: value for name, value in params.items() if name not in SWEEP}
        found.setdefault(params["adapter"], run)
    return [found[adapter] for adapter in STUDIES[study]]


@pytest.fixture(scope="module")
def swept(data, small, tmp_path_factory):
    "Rows of one run of every study and adapter above."
    runs, parts = tmp_path_factory.mktemp("runs"), []
    suite = load_suite("imagenet", data, 160)
    for study in STUDIES:
        for params in runs_of_study(study, small):
            run = load_run(train_run(params, runs, data), runs, data)
            rows = alpha_sweep(run, suite, [0, 0.5, 1], ["knn"], cache=tmp_path_factory.mktemp("cache"))
            parts.append(rows.assign(study=study))
            assert run.info["n_images"] == 24
            assert (run.info["left_out"]["n"] > 0) == (study == "cc20k")
    return pd.concat(parts, ignore_index=True)


def test_every_study_has_every_row(swept):
    main = swept[(swept.scorer == "knn") & (swept.bank == "id") & (swept.k == 20)]
    assert main.groupby(["corpus", "adapter", "alpha"])["set"].nunique().eq(6).all()
    assert set(main.corpus) == set(STUDIES) and main.adapter.nunique() == 3
    zero = main[main.alpha == 0].groupby("set").value
    assert zero.nunique().eq(1).all()  # one pretrained encoder, whatever the study
    assert main[main["set"] == "id-test"].value.min() > 60  # the classes are colours; a guess has a third


def test_the_figures_take_them(swept):
    table = select_lr(swept)
    boot = bootstrap_table(table, 20)
    changes = selected_changes(boot)
    assert {"ID", "VAL", "OOD"} <= set(boot["set"])
    selected = changes[changes.choice == "ID-selected"]
    figures = [figure_alpha(boot), figure_alpha(boot, change=True)]
    figures.append(figure_sets(selected, ood_sets(changes["set"])))
    assert all(len(shown) for _, shown in figures)
    published = pd.read_csv(ROOT / "data/published/dino_knn.csv")
    renamed = table.assign(encoder="vit_base_patch16_224.dino=file")
    assert compare_published(renamed, published).ours.notna().sum() == 1


@pytest.mark.parametrize("method, supervision", [("FLYP", "prompts"), ("LP-FT", "labels")])
def test_labels_of_a_suite(data, tmp_path, method, supervision):
    options = dict(encoder="clip_openclipart", micro_batch_size=4)
    if method == "LP-FT":
        options = dict(encoder=f"test_vit={data / 'dino.pth'}", head_lr=0.01, c_values=2)
    params = dict(options, method=method, suite="living17", batch_size=8)
    run = load_run(train_run(params, tmp_path, data), tmp_path, data)
    assert run.info["n_images"] == 46  # two of 48 are ID validation
    assert run.info["corpus"] == f"living17-{supervision}"
    rows = alpha_sweep(run, suite_of(run, root=data), [0, 1])
    assert set(rows.scorer) == {"knn", "head"}
    assert set(rows["set"]) == {"id-val", "id-test", "living17"}


def test_rows_do_not_depend_on_workers(data, small):
    suite = load_suite("imagenet", data, 160)
    few = suite.images[suite.sets["id-test"]]
    encoder = load_encoder(small["encoder"], data)
    alone = extract_features(encoder, few, workers=0)
    assert torch.equal(extract_features(encoder, few, workers=2), alone)
    assert not torch.equal(extract_features(encoder, replace(few, crop=0.5)), alone)


def test_two_processes_train_what_one_does(data, small, tmp_path):
    params = {**small, "corpus": "coco10k", "adapter": "film", "lr": 0.01, "seed": 1}
    one = load_run(train_run(params, tmp_path / "one", data), tmp_path / "one", data)
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", "wlsft", "train"]
    for name, value in params.items():
        command += ["-p", name, str(value)]
    done = subprocess.run(
        [*command, "--runs", tmp_path / "two", "--data", data],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WLSFT_QUIET": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_run(one.name, tmp_path / "two", data)
    np.testing.assert_allclose(two.info["history"], one.info["history"], rtol=1e-4)
    moved = [key for key in one.theta_1 if not torch.equal(one.theta_0[key], one.theta_1[key])]
    assert moved
    for key in moved:  # AdamW divides by small numbers: rounding shows
        torch.testing.assert_close(two.theta_1[key], one.theta_1[key], atol=2e-4, rtol=1e-3)


def dry_run(*config):
    command = ["snakemake", "--workflow-profile", "profiles/gpu-node", "-n", "-p", "--quiet", "progress"]
    command += ["--config", *config]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_graph(data, tmp_path):
    everywhere = f"{{encoder: 'test_vit={data / 'dino.pth'}', n_pairs: 24, batch_size: 8}}"
    places = (f"data={data}", f"runs={tmp_path}")
    code, output = dry_run("study=coco10k", *places, "processes=2", f"set={everywhere}")
    assert code == 0, output[-2000:]
    assert "wlsft with-gpus 2 torchrun" in output  # the profile's GPUs, two of them to a run


def test_folds_end_with_their_rows(tmp_path):
    "Validation concepts alone have no figure in chapter 09."
    code, output = dry_run("study=folds", f"runs={tmp_path}")
    assert code == 0 and "studies/folds/rows.parquet" in output and "09_figures" not in output
    code, output = dry_run("study=rates", f"runs={tmp_path}")
    assert code == 0 and "09_figures" in output


PAIRS = dict(encoder="test_vit={}/dino.pth", n_pairs=24, memory_size=4, rank=8)
CLIP = dict(encoder="clip_openclipart", templates="{}/templates.txt", bf16=False)
MINIATURES = {  # study -> what replaces its size
    "lpft_published": dict(encoder="test_resnet={}/resnet.pth", method="LP-FT", lr=0.001, c_values=2),
    "wiseft": CLIP,
    "flyp_imagenet": CLIP,
    "imagenet20k": PAIRS,
    "cc20k": PAIRS,
    "coco10k": PAIRS,
}
FIGURES = {"alpha.png", "alpha.csv", "paths.png", "paths.csv", "methods.png", "k.png"}
ALL = os.environ.get("REQUIRE_STUDIES")
RUN = list(MINIATURES) if ALL else ["lpft_published"]


@pytest.mark.parametrize("study", RUN)
def test_a_study_on_a_miniature(data, tmp_path, study):
    "Train, sweep, collect two runs, draw; all studies with two processes; a second call finds nothing to do."
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    options = dict(epochs=1, batch_size=8, alpha_steps=1) | MINIATURES[study]
    everywhere = json.loads(json.dumps(options).replace("{}", str(data)))
    config = [f"study={study}", f"data={data}", "draws=20", f"set={json.dumps(everywhere)}"]
    config += ["seeds=2", f"processes={2 if ALL else 1}"]
    command = ["snakemake", "--snakefile", ROOT / "Snakefile", "--directory", tmp_path, "--cores", "2"]
    command += ["--workflow-profile", ROOT / "profiles/local", "--config", *config]
    options = dict(capture_output=True, text=True, timeout=3000)
    done = subprocess.run(command, cwd=tmp_path, **options)
    logs = "".join(path.read_text()[-500:] for path in tmp_path.rglob("*.log"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:] + logs
    assert FIGURES <= {path.name for path in (tmp_path / f"figures/{study}").iterdir()}
    rows = pd.read_parquet(tmp_path / f"runs/studies/{study}/rows.parquet")
    assert rows.value.notna().all() and set(rows.alpha) == {0.0, 1.0} and set(rows.study) == {study}
    assert set(rows.seed) == {0, 1}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*.*")}
    again = subprocess.run(command, cwd=tmp_path, **options)
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_graph_says_what_is_missing(tmp_path):
    (tmp_path / "encoders").mkdir()
    code, output = dry_run("study=cc20k", f"data={tmp_path}")
    assert code != 0 and "expected: the files of cc20k" in output


def test_flyp_on_imagenet(data, tmp_path):
    "ImageNet's list names two missiles and two sunglasses; the authors' settings, but for time."
    prompts = tmp_path / "templates.txt"
    prompts.write_text("a photo of a {}.\n")
    params = dict(protocol="flyp", method="FLYP", suite="imagenet", batch_size=8, epochs=1)
    params = with_protocol(params | dict(templates=str(prompts)))
    run = load_run(train_run(params, tmp_path, data), tmp_path, data)
    assert run.info["parameters"]["decay_all"] and run.info["parameters"]["views"] == "crop"
    rows = alpha_sweep(run, suite_of(run, root=data), [0], ["head"])
    assert rows[rows.metric == "accuracy"]["set"].nunique() == 6
