"The graph on a scheduler, two studies at once, and a kill of all of it: on a study of tiny runs, in a folder of its own."

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not os.environ.get("REQUIRE_CLUSTER"), reason="takes minutes; REQUIRE_CLUSTER=1 asks for it"
)
RUN = "{{encoder: 'test_vit={0}/vit.safetensors', adapter: film, corpus: 'mine={0}/captions.csv', suite: 'mine={0}/suite', steps: 1, batch_size: 16}}"
STUDIES = dict(
    one=("{lr: 0.01}",), two=("{lr: 1e-2, steps: 2}", "{lr: 0.02}")
)  # they share a run, and sweep it differently
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def home(folder, tiny):
    "The project's chapters, two small studies, and `runs` and `figures` of its own."
    (folder / "nbs/studies").mkdir(parents=True)
    for chapter in ("03_train", "05_interpolation", "09_figures"):
        (folder / f"nbs/{chapter}.ipynb").symlink_to(ROOT / f"nbs/{chapter}.ipynb")
    for name, runs in STUDIES.items():
        (folder / f"nbs/studies/{name}.yaml").write_text(
            f"defaults: {RUN.format(tiny)}\nruns:\n" + "".join(f"- {run}\n" for run in runs)
        )
    return folder


def graph(folder, study, *more, gpus=0):
    args = [
        "snakemake",
        "--snakefile",
        ROOT / "Snakefile",
        "--directory",
        folder,
        "--cores",
        "1",
        "--nolock",
        "--rerun-triggers",
        "mtime",
        "--rerun-incomplete",
        "--keep-incomplete",
        *more,
        "--config",
        f"study={study}",
    ]
    return subprocess.Popen(
        [*map(str, args), f"runs={folder / 'runs'}", f"gpus={gpus}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENV,
        start_new_session=True,
    )


def finished(p, seconds=600):
    out, _ = p.communicate(timeout=seconds)
    assert p.returncode == 0, out[-4000:]
    return out


def same_rows(a, b, study):
    a, b = (pd.read_parquet(folder / f"runs/studies/{study}/rows.parquet") for folder in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    "Both studies, one after the other."
    folder = home(tmp_path_factory.mktemp("whole"), tiny)
    for study in STUDIES:
        finished(graph(folder, study))
    return folder


def test_two_studies_at_once(whole, tiny, tmp_path):
    folder = home(tmp_path / "both", tiny)
    for p in [graph(folder, study) for study in STUDIES]:
        finished(p)
    assert len(list(folder.glob("runs/*/run.json"))) == 2  # the shared run is there once
    for study in STUDIES:
        same_rows(folder, whole, study)
        assert (folder / f"figures/{study}/alpha.csv").read_bytes() == (
            whole / f"figures/{study}/alpha.csv"
        ).read_bytes()


def test_kill_the_whole_graph(whole, tiny, tmp_path):
    folder, rng = home(tmp_path / "killed", tiny), random.Random(1)
    for _ in range(int(os.environ.get("KILLS", 12)) // 4):
        p = graph(folder, "one")
        time.sleep(rng.uniform(8, 40))
        os.killpg(p.pid, signal.SIGKILL)  # kernels have sessions of their own
        subprocess.run(["pkill", "-9", "-f", str(folder)])
        p.communicate()
    finished(graph(folder, "one"))
    same_rows(folder, whole, "one")


CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge.socket
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=9000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "A cluster of one machine with one (pretended) GPU, with its own configuration and daemons."
    d, host = Path("/tmp") / f"slurm-{os.getpid()}", socket.gethostname().split(".")[0]
    for sub in ("state", "spool"):
        (d / sub).mkdir(parents=True)
    (d / "key").write_bytes(os.urandom(1024))
    (d / "key").chmod(0o400)
    (d / "slurm.conf").write_text(CONF.format(host=host, d=d, ports=(free_port(), free_port())))
    (d / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
    monkeypatch.setitem(ENV, "SLURM_CONF", str(d / "slurm.conf"))
    place = Path("/etc/slurm/slurm.conf")  # the executor takes SLURM_ variables out of a job
    if place.exists() and not place.is_symlink():
        pytest.skip("this machine belongs to a cluster")
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(d / "slurm.conf")
    munge = [
        "munged",
        "--foreground",
        "--force",
        *(
            f"--{k}={d / v}"
            for k, v in {
                "key-file": "key",
                "socket": "munge.socket",
                "pid-file": "munge.pid",
                "log-file": "munge.log",
                "seed-file": "munge.seed",
            }.items()
        ),
    ]
    with open(d / "out", "w") as out:
        daemons = [
            subprocess.Popen(c, env=ENV, stdout=out, stderr=out)
            for c in (munge, ["slurmctld", "-D"], ["slurmd", "-D"])
        ]
        for _ in range(60):
            if (
                "idle"
                in subprocess.run(["sinfo", "-h", "-o", "%T"], env=ENV, capture_output=True, text=True).stdout
            ):
                break
            time.sleep(0.5)
        yield d
        for p in reversed(daemons):
            p.terminate()
            p.wait(20)
    place.unlink()
    shutil.rmtree(d)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts the daemons")
def test_slurm(whole, slurm, tiny, tmp_path):
    folder = home(tmp_path / "cluster", tiny)
    flags = [
        "--executor",
        "slurm",
        "--jobs",
        "2",
        "--slurm-status-command",
        "squeue",
        "--slurm-no-account",
        "--slurm-init-seconds-before-status-checks",
        "3",
        "--seconds-between-status-checks",
        "3",
    ]
    finished(graph(folder, "one", *flags, "--default-resources", "slurm_partition=main", gpus=1))
    same_rows(folder, whole, "one")
    jobs = subprocess.run(
        ["scontrol", "show", "job", "--oneliner"], env=ENV, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(jobs) == 3 and all("JobState=COMPLETED" in j and "mem=4000M" in j for j in jobs), (
        jobs
    )  # a run, its sweep, the figures
    asked = sorted(
        ("TimeLimit=02:00:00" in j, "TresPerJob=gres:gpu:1" in j, "TimeLimit=00:30:00" in j) for j in jobs
    )
    assert asked == [(False, False, True), (True, True, False), (True, True, False)], jobs
    states = subprocess.run(
        [
            sys.executable,
            "-c",
            "from wlsft.status import *; print(study_status(study_plan('nbs/studies/one.yaml'), 'runs').state.tolist())",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert "['swept']" in states.stdout, states.stderr[-2000:]
