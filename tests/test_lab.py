"What a lab brings: any encoder of timm, benchmarks with metrics of their own, systems that are not Linux."

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from wlsft.adapters import ADAPTERS, adapt
from wlsft.core.params import ParameterError
from wlsft.datasets.images import ImageFiles
from wlsft.datasets.suites import load_suite
from wlsft.evaluation.metrics import METRICS
from wlsft.models.base import input_options, preprocess
from wlsft.models.encoders import load_encoder
from wlsft.rivals.adapters import Selection
from wlsft.study.derived import run_between
from wlsft.study.cli import main
from wlsft.study.runs import Run, load_run, train_run
from wlsft.study.sweep import alpha_sweep, readable_suite

FEW = [  # ViTs, blocks in lists, RoPE, networks with and without BatchNorm, a wide end
    "test_vit",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "test_convnext",
    "test_resnet",
    "resnetv2_18",
    "lcnet_035",
    "test_nfnet",
]
BUILT_FOR = {"eva02_tiny_patch14_224": 56, "vit_small_patch16_dinov3": 64}  # another size than their own
SMALL = {**BUILT_FOR, "resnetv2_18": 64, "lcnet_035": 64}  # the size of the images
ADDING = [name for name, cls in ADAPTERS.items() if not issubclass(cls, Selection)]  # others add nothing
ALL = os.environ.get("REQUIRE_FAMILIES")
DECODE = ImageFiles.decode


def smallest(module):
    "The smallest model of a family that takes pictures of at most 256 pixels."
    found = []
    for name in timm.list_models(module=module):
        cfg = timm.get_pretrained_cfg(name)
        side = (cfg.input_size[-1] if cfg else 0) or 224
        if side <= 256:
            with torch.device("meta"):
                try:
                    model = timm.create_model(name, num_classes=0)
                except Exception:
                    continue
            found.append((sum(p.numel() for p in model.parameters()), name))
    return min(found)[1] if found else None


def families():
    if ALL and "," in ALL:
        return ALL.strip(",").split(",")
    if not ALL:
        return FEW
    return [name for name in map(smallest, timm.list_modules()) if name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Eighteen pictures of noise as a suite, six of them with captions."
    folder, rng = tmp_path_factory.mktemp("lab"), np.random.default_rng(0)
    lines = ["image,caption"]
    for part in ("train", "id-test", "snow"):
        for c in ("a", "b"):
            (folder / "suite" / part / c).mkdir(parents=True)
            for i in range(3):
                path = folder / "suite" / part / c / f"{i}.png"
                Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
                if part == "train":
                    lines.append(f"{path.relative_to(folder)},thing {c} {i}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder


def loaded(name, folder):
    "The encoder from a file that its own model wrote, with its classifier."
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    path = folder / f"{name}.safetensors"
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path)  # some share memory
    size = f"@{SMALL[name]}" if name in SMALL else ""
    return f"{name}{size}={path}"


@pytest.mark.parametrize("name", families())
def test_a_family(name, folder, tmp_path, monkeypatch):
    encoder = loaded(name, tmp_path)
    model = load_encoder(encoder)
    side = model.pretrained_cfg["input_size"][-1]
    with torch.no_grad():
        assert model(torch.zeros(1, 3, side, side)).shape == (1, model.num_features)
    trained = []
    for adapter in ADDING:
        read = []
        monkeypatch.setattr(ImageFiles, "decode", lambda self, i: read.append(i) or DECODE(self, i))
        params = dict(encoder=encoder, corpus=f"mine={folder / 't.csv'}", adapter=adapter, batch_size=2)
        if adapter == "token-replay":
            params |= dict(memory_size=2, rank=4)
        try:
            trained.append(train_run(params, tmp_path / "runs"))
        except ParameterError as error:
            assert "adapted" in str(error) and not read and adapter != "full"
    scorers = ["knn", "probe", "distortion"]
    for run in map(load_run, trained):
        suite = load_suite(f"mine={folder / 'suite'}", **input_options(run.encoder))
        rows = alpha_sweep(run, suite, [0, 1], scorers)
        assert {"id-test", "snow"} <= set(rows["set"]) and rows[rows.scorer == "knn"].value.notna().all()
        assert "feature" in set(rows[rows.scorer == "distortion"].layer)


@pytest.mark.parametrize("adapter", ["film", "token-replay"])
@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "resnetv2_18"])
def test_adapters_are_the_identity_and_have_a_gradient(name, adapter):
    torch.manual_seed(0)
    size = dict(img_size=BUILT_FOR[name]) if name in BUILT_FOR else {}
    model = timm.create_model(name, num_classes=0, **size).eval()
    side = SMALL.get(name, 64)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    images = torch.randint(0, 255, (4, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        before = model(preprocess(model, images))
    options = dict(memory_size=4, rank=8) if adapter == "token-replay" else {}
    adapt(model, ADAPTERS[adapter](**options), images)
    calls = []
    for module in model.modules():
        if hasattr(module, "replay"):
            module.replay.register_forward_hook(lambda *args: calls.append(1))
    after = model(preprocess(model, images))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    after.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert len(calls) == sum(hasattr(module, "replay") for module in model.modules())
    assert adapter == "film" or calls


def two_files(tmp_path):
    "Names of two random ViTs in files."
    names = []
    for end in "ab":
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / f"{end}.safetensors")
        names.append(f"test_vit={tmp_path / end}.safetensors")
    return names


def between(tmp_path):
    return run_between(*two_files(tmp_path))


def test_iwildcam_has_the_metric_that_is_published(folder, tmp_path):
    base, lines = tmp_path / "iwildcam_v2.0", ["filename,split,y,location_remapped"]
    (base / "train").mkdir(parents=True)
    for split in ("train", "id_val", "id_test", "test"):
        for i in range(24):
            noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(base / "train" / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,{split},{0 if i < 18 else i % 3},{i % 4}")
    (base / "metadata.csv").write_text("\n".join(lines))
    (base / "categories.csv").write_text("y,name\n0,empty\n1,cat\n2,deer\n")
    run = between(tmp_path)
    rows = alpha_sweep(run, load_suite("iwildcam", tmp_path, 160), [0], ["knn"])
    f1 = rows[(rows.metric == "macro_f1") & (rows["set"] == "id-test") & (rows.k == 1)]
    assert abs(f1.value.item() - 100) < 1e-6 and "mean_per_class" in METRICS


def test_unreadable_images_are_refused_or_counted(folder, tmp_path):
    copy = tmp_path / "suite"
    for path in sorted((folder / "suite").rglob("*.png")):
        target = copy / path.relative_to(folder / "suite")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for name in ("train/b/2.png", "snow/b/1.png"):
        (copy / name).write_bytes((copy / name).read_bytes()[:60])
    run = between(tmp_path)
    suite = load_suite(f"mine={copy}", **input_options(run.encoder))
    calls = []
    run.encoder.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(Exception, match="2 of .*train/b/2.png.*snow/b/1.png"):
        alpha_sweep(run, suite, [0], ["knn"])
    assert not calls
    rows = alpha_sweep(run, readable_suite(suite), [0], ["knn"])
    lost = rows[rows.scorer == "files"].set_index("set").value
    assert lost["snow"] == 1 and lost["id-test"] == 0 and rows[rows["set"] == "snow"].n.min() == 5


def test_words_of_an_image_text_model_do_not_train_beside_others(folder, tmp_path):
    params = dict(encoder="clip_openclipart", corpus=f"mine={folder / 't.csv'}", adapter="full", batch_size=2)
    run = train_run(params, tmp_path / "runs")
    encoder = load_run(str(run), tmp_path / "runs").encoder
    vision = sum(p.numel() for name, p in encoder.named_parameters() if name.startswith("clip.visual."))
    assert json.loads((run / "run.json").read_text())["trained"] == vision


@pytest.mark.parametrize("method", ["CLIP", "LiT"])
def test_captions_tune_the_towers(folder, tmp_path, method):
    params = dict(method=method, corpus=f"mine={folder / 't.csv'}", batch_size=3, lr=1e-3)
    run = load_run(train_run(params, tmp_path / "runs"))
    moved = {key for key, value in run.theta_1.items() if not torch.equal(value, run.theta_0[key])}
    images = {key for key in moved if key.startswith("clip.visual.")}
    assert moved - images and bool(images) == (method == "CLIP")


def test_blocks_of_full_fine_tuning(folder, tmp_path):
    encoder = loaded("test_vit", tmp_path)
    params = dict(
        encoder=encoder, corpus=f"mine={folder / 't.csv'}", adapter="full", blocks=[5], batch_size=3
    )
    run = load_run(train_run(params, tmp_path / "runs"))
    moved = {key for key, value in run.theta_1.items() if not torch.equal(value, run.theta_0[key])}
    assert moved and all(key.startswith("blocks.5.") for key in moved)


def test_a_suite_of_many_files_is_small(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    for part, n in (("train", 300), ("id-test", 20), ("snow", 20)):
        for c in range(10):
            (tmp_path / "suite" / part / f"n{c:08}").mkdir(parents=True)
            for i in range(n):
                (tmp_path / "suite" / part / f"n{c:08}" / f"n{c:08}_{i:08}.JPEG").write_bytes(content)
    load_suite(f"mine={tmp_path / 'suite'}", size=16)  # imports and caches
    tracemalloc.start()
    suite = load_suite(f"mine={tmp_path / 'suite'}", size=16)
    assert all(suite.images.name(i).endswith(".JPEG") for i in range(len(suite.images)))
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used / len(suite.images) < 300


WITHOUT = """
import builtins, importlib
real = builtins.__import__
def without(name, globals=None, *args, **kw):
    if name in ("fcntl", "resource") and str((globals or {}).get("__name__")).startswith("wlsft"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return real(name, globals, *args, **kw)
builtins.__import__ = without
for name in ("core.files", "models.encoders", "adapters", "study.runs", "study.cli"):
    importlib.import_module(f"wlsft.{name}")
print("imported")
"""
WORKERS = """
import multiprocessing, sys
from pathlib import Path
from PIL import Image

def main(method, folder):
    import torch
    from wlsft.datasets.images import FileSource, ImageFiles, image_batches
    multiprocessing.set_start_method(method, force=True)
    for i in range(12): Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / f"{i:02}.png")
    files = ImageFiles.from_source(FileSource(sorted(folder.glob("*.png"))), 16, 1.0)
    alone, shared = (torch.cat(list(image_batches(files, 8, workers=n))) for n in (0, 1))
    assert torch.equal(alone, shared) and len(alone) == 12
    print("equal")

if __name__ == "__main__": main(sys.argv[1], Path(sys.argv[2]))
"""


def printed(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout


def test_imports_without_what_windows_lacks():
    assert "imported" in printed("-c", WITHOUT)


def test_batches_do_not_depend_on_the_start_method(tmp_path):
    "Nothing is inherited under spawn (macOS), as under forkserver (Linux from Python 3.14 on)."
    (tmp_path / "go.py").write_text(WORKERS)
    assert "equal" in printed(str(tmp_path / "go.py"), "spawn", str(tmp_path))


def test_two_processes_share_a_sweep(folder, tmp_path):
    "`torchrun wlsft sweep` gives the rows of one process."
    names = two_files(tmp_path)
    sweep = ["sweep", "--from", names[0], "--to", names[1], "--suite", f"mine={folder / 'suite'}"]
    sweep += ["-p", "alpha_steps", "1", "--device", "cpu"]
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    main([*sweep, "--out", str(one), "--runs", str(tmp_path / "one")])
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", "wlsft", *sweep]
    torchrun += ["--out", str(two), "--runs", str(tmp_path / "two")]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    pd.testing.assert_frame_equal(pd.read_parquet(one), pd.read_parquet(two))


def test_a_run_between_checkpoints_ends_where_they_are(folder, tmp_path):
    run = between(tmp_path)
    assert isinstance(run, Run) and run.method.name == "WLSFT"
    suite = load_suite(f"mine={folder / 'suite'}", **input_options(run.encoder))
    rows = alpha_sweep(run, suite, [0, 0.5, 1], ["knn"])
    assert sorted(set(rows.alpha)) == [0, 0.5, 1]
    for key, value in run.encoder.state_dict().items():
        assert torch.equal(value, run.theta_0[key])
