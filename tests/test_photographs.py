"The studies of photographs, from files in the exact formats, on a ViT/16 shrunk to 64 wide: train, sweep, tables; two processes; the graph."

import io
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
from wlsft.evaluation.stats import bootstrap_table, ood_sets, select_lr, selected_changes
from wlsft.reports.curves import figure_alpha, figure_sets
from wlsft.reports.tables import compare_published
from wlsft.flyp import train_image_text
from wlsft.study.sweep import alpha_sweep
from wlsft.lp_ft import train_classifier
from wlsft.datasets.corpora import imagenet_ids
from wlsft.study.runs import load_run
from wlsft.study.plan import expand_study
from wlsft.datasets.suites import load_suite, write_checksums
from wlsft.study.runs import train_run

ROOT = Path(__file__).resolve().parent.parent
STUDIES = {
    "imagenet20k": ("token-replay", "full"),
    "cc20k": ("token-replay",),
    "coco10k": ("film",),
}  # the talk's cells, and one full


def picture(path, colour, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-60, 60, (90, 120, 3)) + 60 * np.eye(3)[colour] + 90
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, seed = tmp_path_factory.mktemp("daten-ü"), iter(range(10_000))
    for folder, n in (
        ("imagenet/train", 24),
        ("imagenet/val", 6),
        ("imagenet-r", 4),
        ("imagenet-a", 4),
        ("sketch", 4),
    ):
        for c in range(3):
            for i in range(n):
                picture(root / folder / imagenet_ids()[c] / f"{i:03}.JPEG", c, next(seed))
    for c in range(3):
        picture(root / f"imagenetv2-matched-frequency-format-val/{c}/0.jpeg", c, next(seed))
    (root / "cc3m").mkdir()
    with tarfile.open(root / "cc3m/00000.tar", "w") as tar:
        for i in range(40):
            image = picture(root / "x.jpg", i % 3, next(seed)).read_bytes()
            for suffix, content in (
                ("jpg", image if i % 9 else image[:500]),
                ("txt", f"a {['red', 'green', 'blue'][i % 3]} thing".encode()),
            ):
                info = tarfile.TarInfo(f"{i:09}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    images = [
        dict(id=i, file_name=picture(root / f"coco/train2017/{i:012}.jpg", i % 3, next(seed)).name)
        for i in range(40)
    ]
    said = [
        dict(image_id=i, caption=f"{j} {['red', 'green', 'blue'][i % 3]} things")
        for i in range(40)
        for j in range(5)
    ]
    (root / "coco/annotations").mkdir()
    (root / "coco/annotations/captions_train2017.json").write_text(
        json.dumps(dict(images=images, annotations=said))
    )
    (root / "breeds").mkdir()
    (root / "breeds/living17.json").write_text(
        json.dumps(
            dict(
                fish=[[imagenet_ids()[0]], [imagenet_ids()[1]]],
                bird=[[imagenet_ids()[2]], [imagenet_ids()[2]]],
            )
        )
    )
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0)
    torch.save(
        dict(teacher={f"module.backbone.{k}": v for k, v in vit.state_dict().items()}), root / "dino.pth"
    )
    write_checksums("imagenet", root)
    return root


@pytest.fixture(scope="module")
def small(data):
    return dict(encoder=f"test_vit={data / 'dino.pth'}", images=24, epochs=1, batch_size=8, memory=4, rank=8)


@pytest.fixture(scope="module")
def swept(data, small, tmp_path_factory):
    "Rows of one run of every study and adapter above."
    runs, parts = tmp_path_factory.mktemp("runs"), []
    suite = load_suite("imagenet", data, 160)
    for study in STUDIES:
        spec = {p["adapter"]: p for p in reversed(expand_study(ROOT / f"nbs/studies/{study}.yaml", 1, small))}
        for adapter in STUDIES[study]:
            p = {k: v for k, v in spec[adapter].items() if k not in ("suite", "steps")}
            run = load_run(train_run(p, runs, data), runs, data)
            parts.append(
                alpha_sweep(run, suite, [0, 0.5, 1], study, scratch=tmp_path_factory.mktemp("scratch"))
            )
            assert run.info["pairs"] == 24 and (run.info["left_out"]["n"] > 0) == (study == "cc20k")
    return pd.concat(parts, ignore_index=True)


def test_every_study_has_every_row(swept):
    main = swept[(swept.k == 20) & (swept.protocol == "id")]
    assert main.groupby(["corpus", "adapter", "alpha"])["set"].nunique().eq(6).all()
    assert set(main.corpus) == set(STUDIES) and main.adapter.nunique() == 3
    zero = main[main.alpha == 0].groupby("set").value
    assert zero.nunique().eq(1).all()  # one pretrained encoder, whatever the study
    assert main[main["set"] == "id-test"].value.min() > 60  # the classes are colours; chance is a third


def test_the_figures_take_them(swept):
    t = select_lr(swept)
    boot = bootstrap_table(t, 20)
    changes = selected_changes(boot)
    assert {"ID", "VAL", "OOD"} <= set(boot["set"])
    for figure in (
        figure_alpha(boot),
        figure_alpha(boot, change=True),
        figure_sets(changes[changes.choice == "ID-selected"], ood_sets(changes["set"])),
    ):
        assert len(figure[1])
    published = pd.read_csv(ROOT / "data/published/dino_knn.csv")
    renamed = t.assign(encoder="vit_base_patch16_224.dino=file")
    assert compare_published(renamed, published).ours.notna().sum() == 1


@pytest.mark.parametrize("method", ["FLYP", "LP-FT"])
def test_labels_of_a_suite(data, tmp_path, method):
    kind = (
        dict(encoder="clip_emojishift", micro=4)
        if method == "FLYP"
        else dict(encoder=f"test_vit={data / 'dino.pth'}", head_lr=0.01)
    )
    train = train_image_text if method == "FLYP" else train_classifier
    run = load_run(
        train(
            {**kind, "method": method, "suite": "living17", "batch_size": 8, "strengths": 2}, tmp_path, data
        ),
        tmp_path,
        data,
    )
    cfg = run.encoder.pretrained_cfg
    suite = load_suite("living17", data, cfg["input_size"][-1], cfg["crop_pct"])
    assert run.info["images"] == 46 and run.info["parameters"]["corpus"].startswith(
        "living17-"
    )  # two of 48 are ID validation
    rows = alpha_sweep(run, suite, [0, 1], "labels")
    assert set(rows.protocol) == {"id", "head"} and set(rows["set"]) == {"id-val", "id-test", "living17"}


def test_rows_do_not_depend_on_workers(data, small):
    suite = load_suite("imagenet", data, 160)
    from wlsft.models.encoders import load_encoder
    from wlsft.models.features import extract_features

    few = suite.images[suite.sets["id-test"]]
    encoder = load_encoder(small["encoder"], data)
    assert torch.equal(extract_features(encoder, few, workers=2), extract_features(encoder, few, workers=0))
    assert not torch.equal(extract_features(encoder, replace(few, crop=0.5)), extract_features(encoder, few))


def test_two_processes_train_what_one_does(data, small, tmp_path):
    p = {**small, "corpus": "coco10k", "adapter": "film", "lr": 0.01, "seed": 1}
    one = load_run(train_run(p, tmp_path / "one", data), tmp_path / "one", data)
    flags = [x for k, v in {**p, "runs": tmp_path / "two", "data": data}.items() for x in ("-p", k, str(v))]
    done = subprocess.run(
        ["torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", "wlsft-train", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WLSFT_QUIET": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_run(one.name, tmp_path / "two", data)
    np.testing.assert_allclose(two.info["history"], one.info["history"], rtol=1e-4)
    moved = [k for k in one.theta_1 if not torch.equal(one.theta_0[k], one.theta_1[k])]
    assert moved
    for k in moved:  # AdamW divides by small numbers: rounding shows
        torch.testing.assert_close(two.theta_1[k], one.theta_1[k], atol=2e-4, rtol=1e-3)


def test_the_graph(data, tmp_path):
    everywhere = f"{{encoder: 'test_vit={data / 'dino.pth'}', images: 24}}"
    done = subprocess.run(
        [
            "snakemake",
            "--cores",
            "1",
            "-n",
            "--quiet",
            "--config",
            "study=coco10k",
            f"data={data}",
            f"runs={tmp_path}",
            "processes=2",
            f"set={everywhere}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_graph_says_what_is_missing(tmp_path):
    (tmp_path / "encoders").mkdir()
    done = subprocess.run(
        ["snakemake", "--cores", "1", "-n", "--config", "study=cc20k", f"data={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "expected: the files of cc20k" in done.stdout + done.stderr
