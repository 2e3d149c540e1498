"What a GPU computes, beside the CPU. Skipped where there is no GPU."

import pytest
import torch
import torch.nn.functional as F
from wlsft.evaluation.knn_search import knn_screened, knn_search
from wlsft.models.base import preprocess
from wlsft.models.encoders import load_encoder
from wlsft.models.features import extract_features
from wlsft.study.runs import load_run, train_run
from wlsft.study.sweep import alpha_sweep, suite_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def single_precision():
    "Convolutions round their inputs to TF32 by default."
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def clustered(n, dim, seed):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(50, dim, generator=g)
    return centers[torch.randint(50, (n,), generator=g)] + torch.randn(n, dim, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("excluded", [False, True])
def test_search_is_exact(dtype, excluded):
    bank, query = clustered(40_000, 192, 0), clustered(500, 192, 1)
    exclude = torch.arange(len(query)) if excluded else None
    if excluded:
        query = bank[: len(query)]
    exact = F.normalize(query.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    if excluded:
        exact[exclude, exclude] = -2
    where = None if exclude is None else exclude.cuda()
    values, rows = knn_screened(query.cuda(), bank.cuda(), 20, where, dtype)
    expected = exact.topk(20, 1).values
    assert torch.allclose(values.cpu().double(), expected, atol=2e-6)
    assert torch.allclose(exact.gather(1, rows.cpu()), expected, atol=2e-6)


def test_search_refuses_what_the_cpu_refuses():
    bank = clustered(100, 8, 0).cuda()
    bank[7] = float("nan")
    with pytest.raises(Exception, match="7"):
        knn_search(bank[:5], bank, 3)


def test_duplicates_go_to_the_lower_row():
    bank = clustered(20_000, 64, 0)
    bank[10_000:] = bank[:10_000]
    _, rows = knn_screened(bank[:200].cuda(), bank.cuda(), 2)
    assert torch.equal(rows.cpu(), torch.stack([torch.arange(200), torch.arange(200) + 10_000], 1))


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    "The same run on both devices; names of runs do not depend on the device."
    made = {}
    encoder = f"test_vit={tiny / 'vit.safetensors'}"
    p = dict(adapter="full", corpus=f"tiny={tiny / 'captions.csv'}", encoder=encoder, text_tower="one-hot")
    p |= dict(batch_size=16, lr=0.001, epochs=2)
    for device in ("cpu", "cuda"):
        folder = tmp_path_factory.mktemp(device)
        made[device] = load_run(train_run(p, runs=folder, device=device), folder)
    return made


def test_training_is_the_cpu_s(runs):
    on_cpu, on_gpu = runs["cpu"], runs["cuda"]
    assert on_cpu.name == on_gpu.name
    assert on_gpu.info["history"] == pytest.approx(on_cpu.info["history"], rel=1e-3)
    for key, value in on_cpu.theta_1.items():
        start = on_cpu.theta_0[key]
        moved = (value - start).norm()
        assert (on_gpu.theta_1[key] - value).norm() <= 0.05 * moved + 1e-6, key


@pytest.mark.parametrize("bf16", [False, True])
def test_sweep_is_the_cpu_s_and_leaves_the_encoder(runs, tiny, bf16):
    run = runs["cpu"]
    suite = suite_of(run, f"tiny={tiny / 'suite'}")
    tables = {}
    for device in ("cpu", "cuda"):
        run.encoder.to(device)
        tables[device] = alpha_sweep(run, suite, [0, 0.5, 1], scorers=["knn"], bf16=bf16)
        for key, value in run.encoder.state_dict().items():
            assert value.device.type == device
            assert torch.equal(value.cpu(), run.theta_0[key])
    run.encoder.cpu()
    difference = (tables["cuda"].value - tables["cpu"].value).abs()
    assert difference.max() <= (10 if bf16 else 0)


@pytest.mark.parametrize("adapter", ["film", "token-replay", "lora", "bitfit", "ln-tune"])
def test_adapters_start_from_the_pretrained_features(adapter, tiny, tmp_path):
    p = dict(adapter=adapter, corpus=f"tiny={tiny / 'captions.csv'}", text_tower="one-hot", batch_size=16)
    p |= dict(encoder=f"test_vit={tiny / 'vit.safetensors'}", lr=0.01)
    run = load_run(train_run(p, runs=tmp_path, device="cuda"), tmp_path)
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    plain = load_encoder(p["encoder"]).cuda()
    assert torch.equal(extract_features(run.encoder.cuda(), images), extract_features(plain, images))


def test_bfloat16_is_as_far_off_as_on_the_cpu():
    encoder = load_encoder("dinov2_small")
    images = torch.randint(0, 256, (16, 3, 70, 70), dtype=torch.uint8)
    exact = extract_features(encoder, images)
    half = extract_features(encoder.cuda(), images, bf16=True).cpu()
    single = extract_features(encoder, images).cpu()
    assert F.cosine_similarity(single, exact).min() > 0.999999
    assert F.cosine_similarity(half, exact).min() > 0.99


def test_preprocessing_is_the_cpu_s():
    encoder = load_encoder("dinov2_small")
    views = torch.rand(4, 3, 128, 128)
    on_cpu = preprocess(encoder, views)
    assert torch.allclose(preprocess(encoder.cuda(), views.cuda()).cpu(), on_cpu, atol=1e-4)
