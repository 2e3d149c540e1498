"Every notebook, each in a process of its own; those that take long with fewer images than they show."

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if "/." not in path.as_posix())
START = "fork" if sys.platform == "linux" else "spawn"
SMALLER = {  # notebook -> parameters under test; REQUIRE_DEFAULTS=1 leaves them as they are
    "000_tour": dict(n_pairs=128, query_stride=24, bank_stride=24),
    "03_train": dict(n_pairs=128),
    "04_knn_eval": dict(query_stride=16, bank_stride=8),
    "05_interpolation": dict(query_stride=48, bank_stride=16),
    "06_lp_ft": dict(n_pairs=128, query_stride=48, bank_stride=24),
    "07_flyp": dict(n_pairs=64, batch_size=64, query_stride=60, bank_stride=24),
    "08_theory": dict(seeds=2),
    "11_your_own": dict(epochs=1),
    "12_findings": dict(draws=200),
    "build/clip": dict(n_pairs=64),
    "index": dict(draws=200),
    "reports/alpha_neighbours": dict(stride=12),
    "reports/calibration": dict(steps=1),
    "reports/few_shot": dict(steps=2),
    "reports/neighbours": dict(stride=48),
}


@pytest.fixture(scope="module", autouse=True)
def libraries():
    "Imported and read once a worker: a forked process has them."
    import IPython.core.completer  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import matplotlib_inline.backend_inline  # noqa: F401
    import open_clip  # noqa: F401
    import papermill  # noqa: F401
    import PIL.Image
    import seaborn  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import timm  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401
    import wlsft.study.cli  # noqa: F401
    from wlsft.datasets.emojishift import load_emojishift

    PIL.Image.init()  # its plugins
    load_emojishift()


def name_of(path):
    return path.relative_to(NBS).with_suffix("").as_posix()


def with_parameters(path, given, folder):
    "A copy of the notebook, as papermill would run it."
    import papermill
    from wlsft.core.params import check_parameters
    from wlsft.study.notebooks import notebook_parameters

    check_parameters(given, notebook_parameters(path))
    copy = folder / path.name
    papermill.execute_notebook(path, copy, given, prepare_only=True, progress_bar=False)
    return copy


def run(path, given, folder):
    from nbdev import test
    from nbdev.config import get_config

    config = get_config()
    path = with_parameters(path, given, folder) if given else path
    options = dict(skip_flags=config.tst_flags.split(), basepath=config.config_path)
    passed, _ = test.test_nb(path, **options)
    sys.exit(not passed)


def exit_code(path, given, folder):
    process = multiprocessing.get_context(START).Process(target=run, args=(path, given, folder))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook(path, tmp_path):
    given = {} if os.environ.get("REQUIRE_DEFAULTS") else SMALLER.get(name_of(path), {})
    assert exit_code(path, given, tmp_path) == 0


@pytest.mark.parametrize(
    "chapter, name, value, message",
    [
        ("01_adapters", "encoder", "vit_enormous", "encoder = 'vit_enormous' is not known"),
        (
            "00_data",
            "corpus",
            "emojishift-poems",
            "corpus = 'emojishift-poems' is not known (did you mean emojishift-prompts?)",
        ),
    ],
)
def test_a_chapter_refuses_a_wrong_value(chapter, name, value, message, tmp_path, capfd):
    assert exit_code(NBS / f"{chapter}.ipynb", {name: value}, tmp_path) == 1
    assert message in capfd.readouterr().err
