"Two gloo processes: loss and gradients are those of one process with the whole batch, and of open_clip."

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import ClipLoss
from wlsft.core.distributed import all_gather
from wlsft.losses import contrastive_loss
from wlsft.models.features import extract_features, extract_features_to

N, WIDE, SCALE = 8, 5, 7.0


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, WIDE, generator=g), torch.randn(N, WIDE, generator=g), torch.arange(N) // 2


def tower():
    torch.manual_seed(1)
    return torch.nn.Linear(WIDE, 4)


def pictures():
    torch.manual_seed(2)
    return timm.create_model("test_vit", num_classes=0), torch.randint(
        0, 256, (21, 3, 32, 32), dtype=torch.uint8
    )


def loss_of(net, image, text, group, collisions):
    return contrastive_loss(
        all_gather(net(image)), all_gather(net(text)), SCALE, all_gather(group) if collisions else None
    )


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    image, text, group = (t[rank * N // 2 : (rank + 1) * N // 2] for t in batch())
    out = {}
    for collisions in (False, True):
        net = torch.nn.parallel.DistributedDataParallel(tower())
        loss = loss_of(net, image, text, group, collisions)
        loss.backward()
        out[collisions] = (loss.detach(), net.module.weight.grad.clone())
    net, unit = tower(), torch.nn.functional.normalize
    out["open_clip"] = ClipLoss(gather_with_grad=True, rank=rank, world_size=2)(
        unit(net(image), dim=1), unit(net(text), dim=1), SCALE
    ).detach()
    features = extract_features_to(*pictures(), f"{folder}/features.npy", batch_size=4)
    assert torch.equal(
        features, extract_features_to(*pictures(), f"{folder}/features.npy")
    )  # the second time it is read
    if rank == 0:
        torch.save(out, f"{folder}/out.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return {
        **torch.load(folder / "out.pt", weights_only=True),
        "features": np.load(folder / "features.npy"),
        "files": sorted(f.name for f in folder.iterdir()),
    }


@pytest.mark.parametrize("collisions", [False, True])
def test_two_processes_equal_one(two, collisions):
    net = tower()
    loss = loss_of(net, *batch(), collisions)
    loss.backward()
    torch.testing.assert_close(two[collisions][0], loss.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(two[collisions][1], net.weight.grad, atol=1e-6, rtol=1e-5)


def test_two_processes_equal_open_clip(two):
    torch.testing.assert_close(two[False][0], two["open_clip"], atol=1e-6, rtol=0)


def test_two_processes_share_an_extraction(two):
    np.testing.assert_allclose(two["features"], extract_features(*pictures()).numpy(), atol=1e-5, rtol=1e-4)
    assert two["files"] == ["features.npy", "out.pt"]  # no notes, no halves


BREAKS = """
import os, sys
from wlsft.models import loop
from wlsft.study.cli import main
step = loop.train_step
def breaks(*args, **options):
    if os.environ["RANK"] == "1": raise RuntimeError("rank 1 lost its disk")
    return step(*args, **options)
loop.train_step = breaks
main(sys.argv[1:])
"""


def start_training(tiny, folder, program):
    "`wlsft train` for far too many epochs, in two processes of `torchrun`."
    params = dict(
        encoder=f"test_vit={tiny / 'vit.safetensors'}",
        corpus=f"mine={tiny / 'captions.csv'}",
        batch_size=16,
        epochs=5000,
        lr=0.01,
    )
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", *program, "train"]
    for name, value in params.items():
        command += ["-p", name, str(value)]
    return subprocess.Popen(
        [*command, "--runs", folder / "runs", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WLSFT_QUIET": "1"},
    )


def root_cause(job, folder):
    "The output of a job that fails, from where `torchrun` names the cause; no run is there."
    output, _ = job.communicate(timeout=240)
    assert job.returncode != 0 and not list(folder.glob("runs/*/run.json"))
    return output[output.index("Root Cause") :]


def test_a_rank_that_is_killed_ends_the_job(tiny, tmp_path):
    job = start_training(tiny, tmp_path, ["--no-python", "wlsft"])
    while not list(tmp_path.glob("runs/*/state.pt")):
        assert job.poll() is None
        time.sleep(0.2)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    start = time.time()
    assert "SIGKILL" in root_cause(job, tmp_path)
    assert time.time() - start < 60
    assert list(tmp_path.glob("runs/*/state.pt"))  # what was whole is kept


def test_a_rank_that_raises_ends_the_job_with_its_message(tiny, tmp_path):
    (tmp_path / "breaks.py").write_text(BREAKS)
    job = start_training(tiny, tmp_path, [str(tmp_path / "breaks.py")])
    assert "rank 1 lost its disk" in root_cause(job, tmp_path)
