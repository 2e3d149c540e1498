"What holds the project together: parameter cells, dependency lists, sizes, and a study's graph."

import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from wlsft.study import notebook_parameters

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
BUILD = sorted((ROOT / "nbs/build").glob("*.ipynb"))


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    return cfg["DEFAULT"]


@pytest.mark.parametrize("path", CHAPTERS + BUILD, ids=lambda p: p.stem)
def test_one_tagged_parameter_cell_of_literals(path):
    assert notebook_parameters(path)  # raises unless exactly one cell is tagged and all values are literals


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_is_a_chapter(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ") and "\n> " in cells[0].source
    for word in ("**Question.**", "**Method.**", "**What you will see.**"):
        assert (
            word in cells[1].source
        )  # a cell of its own: nbdev's site drops what follows the summary in the title's cell
    exported = [c.source.count("\n") + 1 for c in cells if c.source.startswith("#| export")]
    assert max(exported, default=0) <= 60 and (
        exported or path.stem in ("09_rivals", "10_benchmarks", "11_your_own")
    )  # which only report or use
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    lines = sum(c.source.count("\n") + 1 for c in cells if c.cell_type == "code")
    assert words > 1.5 * lines


def test_nbdev_clean_keeps_the_parameters_tag(tmp_path):
    copy = tmp_path / CHAPTERS[0].name
    copy.write_bytes(CHAPTERS[0].read_bytes())
    subprocess.run(["nbdev_clean", "--fname", str(copy)], cwd=ROOT, check=True)
    assert notebook_parameters(copy) == notebook_parameters(CHAPTERS[0])


def test_environment_yml_names_the_same_dependencies():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert sorted(pip) == sorted(settings()["requirements"].split() + settings()["dev_requirements"].split())


def test_constraints_pin_every_dependency():
    pins = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = " ".join(
        settings()[k] for k in ("requirements", "dev_requirements", "bench_requirements")
    ).split()
    assert {re.split("[<>=]", w)[0].lower().replace("_", "-") for w in wanted} <= pins


def test_sizes_in_git():
    files = [
        ROOT / f
        for f in subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    sizes = {f: f.stat().st_size for f in files if f.is_file()}
    assert max(sizes.values()) < 15e6 and sum(sizes.values()) < 100e6


def test_every_figure_has_its_table():
    for png in (ROOT / "figures").rglob("*.png"):
        assert png.with_suffix(".csv").is_file() or png.stem == "contact_sheet", png


@pytest.mark.parametrize("study", sorted(p.stem for p in (ROOT / "nbs/studies").glob("*.yaml")))
def test_study_expands_to_known_parameters(study):
    from wlsft.flyp import run_name_of, settled
    from wlsft.interpolation import SWEEP, resolve_sweep
    from wlsft.pairs import DISK_CORPORA
    from wlsft.study import _lean, check_parameters, expand_study

    runs, names = expand_study(ROOT / f"nbs/studies/{study}.yaml", 2), set()
    for run in runs:
        chapter, known = settled(
            {k: v for k, v in run.items() if k not in SWEEP or k == "suite" and "method" in run}
        )
        check_parameters(known, notebook_parameters(ROOT / f"nbs/{chapter}.ipynb"))
        _lean(ROOT / f"nbs/{chapter}.ipynb", known)  # refuses what only a demonstration would use
        resolve_sweep({k: v for k, v in run.items() if k in SWEEP})
        names.add(
            str(known) if study in DISK_CORPORA else run_name_of(known)
        )  # names need the files: tests/test_photographs.py
    assert len(names) == len(runs)


@pytest.mark.parametrize(
    "chapter, module, name, other",
    [
        ("03_train", "train", "DEFAULTS", set()),
        ("06_lp_ft", "lp_ft", "CLASSIFIER", {"strengths"}),
        ("07_flyp", "flyp", "FLYP", {"strengths"}),
    ],
)
def test_chapter_defaults_are_the_library_defaults(chapter, module, name, other):
    library, defaults = (
        getattr(importlib.import_module(f"wlsft.{module}"), name),
        notebook_parameters(ROOT / f"nbs/{chapter}.ipynb"),
    )
    assert {k for k in library if k in defaults and defaults[k] != library[k]} == other
    assert "adapter" in library and "adapter" in defaults


def test_exported_code_is_lint_free_and_its_types_agree():
    for command in (["ruff", "check", "wlsft", "tests"], ["mypy", "wlsft"]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


def test_wheel_imports_without_the_notebooks(tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "wlsft", "setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for f in tracked.stdout.split():
        (source / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, source / f)
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--wheel", "--quiet", "--out-dir", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    modules = sorted(p.stem for p in (tmp_path / "site/wlsft").glob("*.py") if not p.stem.startswith("_"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        + "".join(f"import wlsft.{m}\n" for m in modules)
        + "print(wlsft.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr[-2000:]
    assert len(modules) > 25
