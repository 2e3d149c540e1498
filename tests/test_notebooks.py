"Every notebook with its default parameters, each in a process of its own."

import multiprocessing
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if "/." not in path.as_posix())
START = "fork" if sys.platform == "linux" else "spawn"


@pytest.fixture(scope="module", autouse=True)
def libraries():
    "Imported once a worker: a forked process has them."
    import matplotlib.pyplot  # noqa: F401
    import open_clip  # noqa: F401
    import seaborn  # noqa: F401
    import timm  # noqa: F401
    import wlsft.study.cli  # noqa: F401


def run(path):
    from nbdev import test
    from nbdev.config import get_config

    config = get_config()
    options = dict(skip_flags=config.tst_flags.split(), basepath=config.config_path)
    passed, _ = test.test_nb(path, **options)
    sys.exit(not passed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(NBS).with_suffix("").as_posix())
def test_a_notebook(path):
    process = multiprocessing.get_context(START).Process(target=run, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
