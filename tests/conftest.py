"What several tests run on."

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (  # names of tests and notebooks, longest first
    "miniature",
    "07_flyp",
    "000_tour",
    "03_train",
    "06_lp_ft",
    "test_readme",
    "10_benchmarks",
    "11_your_own",
    "test_kills",
    "08_theory",
    "alpha_features",
    "04_knn_eval",
    "study/export",
)


QUICK = ("test_style", "test_project", "test_golden")  # what a change breaks first


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="QUICK, and the notebooks that git sees changed")


def changed_notebooks():
    "Names of notebooks, as tests have them, that differ from the last commit."
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    paths = re.findall(r"nbs/(\S+)\.ipynb", status.stdout)
    return [f"[{path}]" for path in paths]


def pytest_collection_modifyitems(config, items):
    "The longest first, so that no worker is left with one at the end."

    def place(item):
        return next((i for i, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))

    items.sort(key=place)
    if config.getoption("--fast"):
        kept = [*QUICK, *changed_notebooks()]
        wanted = re.compile("|".join(map(re.escape, kept)))
        left = [item for item in items if not wanted.search(item.nodeid)]
        config.hook.pytest_deselected(items=left)
        items[:] = list(filter(lambda item: wanted.search(item.nodeid), items))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "Captions, a suite and an encoder's weights with which a whole run takes seconds."
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    colours = dict(red=(220, 30, 30), green=(30, 200, 40), blue=(30, 60, 230))
    lines = ["image,text"]
    for split, n in (("images", 16), ("suite/train", 12), ("suite/id-test", 5), ("suite/noisy", 5)):
        for name, colour in colours.items():
            for i in range(n):
                path = folder / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(
                    np.array(colour) + rng.normal(0, 90 if "noisy" in split else 30, (48, 48, 3)), 0, 255
                )
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                if split == "images":
                    lines.append(f"images/{name}/{i}.png,a {name} square number {i}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "vit.safetensors")
    return folder
