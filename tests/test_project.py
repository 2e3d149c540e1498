"What holds the project together: rooms and imports, parameter cells, outputs, dependencies, studies."

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from wlsft.build.book import ROOMS, book, contents, sidebar
from wlsft.build.outputs import check_outputs
from wlsft.study.notebooks import notebook_parameters
from wlsft.study.plan import expand_study, study_plan
from wlsft.study.schema import all_parameters, resolve

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SPINE = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
PARAMETERISED = SPINE + sorted(NBS.glob("build/*.ipynb")) + sorted(NBS.glob("reports/*.ipynb"))
BOOK = [NBS / chapter.path for chapter in book()]
TABLES_ONLY = ("reports/plots", "reports/tables")  # rooms of functions without parameters of their own


def name_of(path):
    return path.relative_to(NBS).with_suffix("").as_posix()


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    return cfg["DEFAULT"]


def has_parameters(path):
    cells = nbformat.read(path, as_version=4).cells
    return any("parameters" in cell.metadata.get("tags", []) for cell in cells)


# Rooms and imports


FLOORS = [
    {"core"},
    {"datasets"},
    {"models"},
    {"adapters", "interpolation"},
    {"losses", "evaluation"},
    {"train", "knn_eval"},
    {"lp_ft"},
    {"flyp"},
    {"rivals"},
    {"study"},
    {"reports"},
]
FLOOR = {}
for floor, rooms in enumerate(FLOORS):
    FLOOR |= dict.fromkeys(rooms, floor)


def imported_rooms(module):
    "Rooms whose names a module imports, with absolute names."
    package = module.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(module.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        parts = [*base, *(node.module or "").split(".")]
        if parts[0] == "wlsft" and len(parts) > 1:
            yield parts[1]


MODULES = sorted(p for p in (ROOT / "wlsft").rglob("*.py") if not p.name.startswith("_"))


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down(module):
    room = module.relative_to(ROOT / "wlsft").with_suffix("").parts[0]
    for other in imported_rooms(module):
        if room == "theory":
            assert other == "core"
        elif room != "build" and other != room:
            assert FLOOR[other] < FLOOR[room], f"{room} imports {other}"


def test_every_number_stands_once_and_every_notebook_has_a_place():
    numbers = [path.name.partition("_")[0] for path in NBS.glob("[0-9]*.ipynb")]
    assert len(numbers) == len(set(numbers))
    placed = {path for path in NBS.rglob("*.ipynb") if not re.search(r"/[._]", str(path))}
    assert placed == {*BOOK, NBS / "index.ipynb"}
    assert set(ROOMS) == {path.parent.name for path in placed if path.parent != NBS}


def test_sidebar_and_index_have_the_order_of_the_files():
    assert (NBS / "sidebar.yml").read_text() == sidebar()
    shown = []
    for cell in nbformat.read(NBS / "index.ipynb", as_version=4).cells:
        shown += [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])]
    assert contents() in shown


# Notebooks


@pytest.mark.parametrize("path", PARAMETERISED, ids=name_of)
def test_one_tagged_parameter_cell_of_literals(path):
    if name_of(path) not in TABLES_ONLY and (path.parent.name != "reports" or has_parameters(path)):
        assert notebook_parameters(
            path
        )  # raises unless exactly one cell is tagged and all values are literals


@pytest.mark.parametrize("path", BOOK, ids=name_of)
def test_a_chapter_says_what_it_does(path):
    cells = nbformat.read(path, as_version=4).cells
    assert re.match(r"# [^\n]+\n\n> [^\n]+", cells[0].source)
    if path in SPINE:
        for word in ("**Question.**", "**Method.**", "**What you will see.**"):
            assert word in cells[1].source  # in a cell of its own: the site drops what follows the summary


@pytest.mark.parametrize("path", [NBS / "000_tour.ipynb", *SPINE], ids=name_of)
def test_a_code_host_shows_the_book(path):
    nb = nbformat.read(path, as_version=4)
    visible = [cell.outputs for cell in nb.cells if cell.cell_type == "code" and cell.outputs]
    assert len(visible) >= 4
    outputs = itertools.chain.from_iterable(visible)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    check_outputs(nb, path.name)


def links(path):
    "Links and images of a notebook's texts and outputs."
    for cell in nbformat.read(path, as_version=4).cells:
        texts = [cell.source] if cell.cell_type == "markdown" else []
        for output in cell.get("outputs", []):
            texts.append("".join(output.get("data", {}).get("text/markdown", "")))
        for text in texts:
            yield from re.findall(r"\]\(([^)\s]+)", re.sub(r"```.*?```", "", text, flags=re.S))


@pytest.mark.parametrize("path", [NBS / "index.ipynb", *BOOK], ids=name_of)
def test_links_lead_somewhere(path):
    for link in links(path):
        if not re.match(r"[a-z]+:|#", link):
            assert (path.parent / unquote(link.partition("#")[0])).exists(), link


def test_nbdev_clean_keeps_the_parameters_tag(tmp_path):
    copy = tmp_path / SPINE[0].name
    copy.write_bytes(SPINE[0].read_bytes())
    subprocess.run(["nbdev_clean", "--fname", str(copy)], cwd=ROOT, check=True)
    assert notebook_parameters(copy) == notebook_parameters(SPINE[0])


def test_every_notebook_is_valid():
    for path in NBS.rglob("*.ipynb"):
        nbformat.validate(json.loads(path.read_text(encoding="utf-8")))


# The schema of runs


NOT_OF_A_RUN = {"device", "data", "runs", "query_stride", "bank_stride"}
SMALLER = dict(n_pairs=0)  # what a chapter has less of than a study
CHAPTERS = {
    "03_train": ["WLSFT"],
    "06_lp_ft": ["LP-FT", "FT", "LP"],
    "07_flyp": ["FLYP", "L2-SP", "FT", "LP-FT", "LP"],
}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_the_parameters_of_its_methods(chapter):
    cell = notebook_parameters(NBS / f"{chapter}.ipynb")
    cell = {name: SMALLER.get(name, value) for name, value in cell.items()}
    known = all_parameters(CHAPTERS[chapter])
    assert set(cell) - NOT_OF_A_RUN == set(known)
    for name, defaults in known.items():
        assert cell[name] in defaults, name
    main = resolve(dict(method=cell["method"], adapter=cell["adapter"], encoder=cell["encoder"]))
    assert main == {name: cell[name] for name in main}


STUDIES = sorted(p.stem for p in (NBS / "studies").glob("*.yaml"))


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_made_of_known_parameters(study):
    path = NBS / f"studies/{study}.yaml"
    runs = expand_study(path, 2)
    if study in ("imagenet20k", "cc20k", "coco10k"):
        assert len(runs) > 10  # names need the files: tests/test_photographs.py
    else:
        assert len(study_plan(path, 2)) == len(runs)


# Dependencies, sizes, types


REQUIREMENTS = ["requirements"]
REQUIREMENTS += [f"{extra}_requirements" for extra in ("study", "notebooks", "docs", "onnx", "dev")]


def test_environment_yml_names_the_same_dependencies():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    wanted = " ".join(settings()[kind] for kind in REQUIREMENTS).split()
    assert sorted(pip) == sorted(wanted)


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = " ".join(settings()[kind] for kind in (*REQUIREMENTS, "bench_requirements")).split()
    assert {re.split("[<>=]", name)[0].lower().replace("_", "-") for name in wanted} <= pins


def test_sizes_in_git():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    sizes = {f: (ROOT / f).stat().st_size for f in done.stdout.splitlines() if (ROOT / f).is_file()}
    encoder = sizes.pop("data/encoders/dinov2_small.safetensors")
    assert encoder < 45e6 and max(sizes.values()) < 15e6 and encoder + sum(sizes.values()) < 150e6


def test_every_figure_has_its_table():
    for png in (ROOT / "figures").rglob("*.png"):
        assert png.with_suffix(".csv").is_file() or png.stem in ("contact_sheet", "method"), png


def test_types_agree():
    done = subprocess.run([sys.executable, "-m", "mypy", "wlsft"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


def test_records_of_shipped_runs_are_resolved():
    for record in (ROOT / "data/runs").glob("*/run.json"):
        p = json.loads(record.read_text())["parameters"]
        assert {name: resolve(p)[name] for name in p} == p


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    "The wheel's content in a folder of its own, with no repository beside it."
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    files = ["wlsft", "setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"]
    tracked = subprocess.run(
        ["git", "ls-files", *files], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for f in tracked.stdout.split():
        (source / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, source / f)
    build = ["uv", "build", "--wheel", "--quiet", "--out-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", *build], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run_installed(site, code, folder):
    "What a program prints that imports the installed package."
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_imports_without_the_notebooks(installed, tmp_path):
    paths = sorted(p for p in (installed / "wlsft").rglob("*.py") if not p.name.startswith("_"))
    modules = [".".join(p.relative_to(installed).with_suffix("").parts) for p in paths]
    code = "\n".join(f"import {m}" for m in modules) + "\nprint(sys.modules['wlsft'].__file__)"
    assert str(installed) in run_installed(installed, code, tmp_path)
    assert len(modules) > 40 and (installed / "wlsft/py.typed").is_file()


OUTSIDE = """
import numpy as np, timm, wlsft
from PIL import Image
from safetensors.torch import save_file

rng = np.random.default_rng(0)
for i in range(16):
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(f"{i}.png")
with open("titles.csv", "w") as f:
    print("image;caption", *(f"{i}.png;thing {i}" for i in range(16)), sep="\\n", file=f)
save_file(timm.create_model("test_vit", num_classes=0).state_dict(), "vit.safetensors")
own = dict(encoder="test_vit=vit.safetensors", corpus="mine=titles.csv")
run = wlsft.finetune(**own, adapter="film", held_out=0.25, batch_size=4)
print(len(wlsft.sweep(run, alpha_steps=1)), wlsft.export(run, "model", alpha=0.5))
try:
    wlsft.finetune()
except RuntimeError as error:
    print(error)
"""


def test_a_run_trains_outside_of_a_clone(installed, tmp_path):
    printed = run_installed(installed, OUTSIDE, tmp_path)
    assert 'timm.create_model("local-dir:model"' in printed
    assert "ships with the repository and not with the package; clone https://" in printed
    assert len(list((tmp_path / "runs").glob("*/run.json"))) == 1
