"The graph on a scheduler, two studies at once, and a kill of all of it, on tiny runs in a separate folder."

import json
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
STUDIES = {  # they share a run, and sweep it differently
    "one": ("{lr: 0.01}",),
    "two": ("{lr: 1e-2, alpha_steps: 2}", "{lr: 0.02}"),
}
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def home(folder, tiny):
    "The chapter of figures, two small studies, and `runs` and `figures` of its own."
    defaults = dict(
        encoder=f"test_vit={tiny}/vit.safetensors",
        adapter="film",
        corpus=f"mine={tiny}/captions.csv",
        suite=f"mine={tiny}/suite",
        alpha_steps=1,
        batch_size=16,
    )
    (folder / "nbs/studies").mkdir(parents=True)
    (folder / "nbs/09_figures.ipynb").symlink_to(ROOT / "nbs/09_figures.ipynb")
    for name, runs in STUDIES.items():
        lines = [f"defaults: {json.dumps(defaults)}", "runs:", *(f"- {run}" for run in runs)]
        (folder / f"nbs/studies/{name}.yaml").write_text("\n".join(lines) + "\n")
    return folder


def graph(folder, study, *more, gpus=0):
    command = ["snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder, "--cores", "1"]
    command += ["--nolock", "--rerun-triggers", "mtime", "--rerun-incomplete", "--keep-incomplete", *more]
    command += ["--config", f"study={study}", f"runs={folder / 'runs'}", f"gpus={gpus}"]
    return subprocess.Popen(
        [*map(str, command)],
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
        table = f"figures/{study}/alpha.csv"
        assert (folder / table).read_bytes() == (whole / table).read_bytes()


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


def munge_command(place):
    files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    return ["munged", "--foreground", "--force", *(f"--{k}={place / v}" for k, v in files.items())]


def write_configuration(place):
    host = socket.gethostname().split(".")[0]
    for sub in ("state", "spool"):
        (place / sub).mkdir(parents=True)
    (place / "key").write_bytes(os.urandom(1024))
    (place / "key").chmod(0o400)
    ports = (free_port(), free_port())
    (place / "slurm.conf").write_text(CONF.format(host=host, d=place, ports=ports))
    (place / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")


def wait_for_nodes():
    command = ["sinfo", "-h", "-o", "%T"]
    for _ in range(60):
        if "idle" in subprocess.run(command, env=ENV, capture_output=True, text=True).stdout:
            break
        time.sleep(0.5)


@pytest.fixture
def slurm(monkeypatch):
    "A cluster of one machine with one (pretended) GPU, with its configuration and daemons."
    place = Path("/tmp") / f"slurm-{os.getpid()}"
    write_configuration(place)
    monkeypatch.setitem(ENV, "SLURM_CONF", str(place / "slurm.conf"))
    system = Path("/etc/slurm/slurm.conf")  # the executor takes SLURM_ variables out of a job
    if system.exists() and not system.is_symlink():
        pytest.skip("this machine belongs to a cluster")
    system.parent.mkdir(exist_ok=True)
    system.unlink(missing_ok=True)
    system.symlink_to(place / "slurm.conf")
    daemons = []
    with open(place / "out", "w") as out:
        for command in (munge_command(place), ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(subprocess.Popen(command, env=ENV, stdout=out, stderr=out))
        wait_for_nodes()
        yield place
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)
    system.unlink()
    shutil.rmtree(place)


def jobs_of_slurm():
    command = ["scontrol", "show", "job", "--oneliner"]
    return subprocess.run(command, env=ENV, capture_output=True, text=True).stdout.splitlines()


STATES = """
from wlsft.study.plan import study_plan
from wlsft.study.status import study_status
print(study_status(study_plan("nbs/studies/one.yaml"), "runs").state.tolist())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts the daemons")
def test_slurm(whole, slurm, tiny, tmp_path):
    folder = home(tmp_path / "cluster", tiny)
    flags = ["--executor", "slurm", "--jobs", "2", "--slurm-status-command", "squeue", "--slurm-no-account"]
    flags += ["--slurm-init-seconds-before-status-checks", "3", "--seconds-between-status-checks", "3"]
    finished(graph(folder, "one", *flags, "--default-resources", "slurm_partition=main", gpus=1))
    same_rows(folder, whole, "one")
    jobs = jobs_of_slurm()
    assert len(jobs) == 3, jobs  # a run, its sweep, the figures
    assert all("JobState=COMPLETED" in job and "mem=4000M" in job for job in jobs), jobs
    gpu = ["TresPerJob=gres:gpu:1" in job for job in jobs]
    two_hours = ["TimeLimit=02:00:00" in job for job in jobs]
    half_an_hour = ["TimeLimit=00:30:00" in job for job in jobs]
    found = sorted(zip(two_hours, gpu, half_an_hour))
    assert found == [(False, False, True), (True, True, False), (True, True, False)], jobs
    command = [sys.executable, "-c", STATES]
    states = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENV)
    assert "['swept']" in states.stdout, states.stderr[-2000:]
