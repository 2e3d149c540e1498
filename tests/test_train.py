"The training loop on tiny encoders: resumed runs, weights that stay, penalties, compilation, micro-batches."

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from wlsft.adapters import FiLM, Full, TokenReplay, adapt
from wlsft.datasets.base import DataError, PairCorpus
from wlsft.evaluation.probe import ridge_regression
from wlsft.models.features import extract_features
from wlsft.models.loop import Batch, checkpointed, finetune, train_step
from wlsft.models.optimizer import make_optimizer, set_rates
from wlsft.models.text import TextEmbeddings
from wlsft.losses import consistency_penalty
from wlsft.train import PairHead, pair_objective

SIDE = 32
N_TEXTS = 16
LOOP = dict(epochs=2, batch_size=16, lr=1e-2, seed=3)  # two steps an epoch
TINY_REPLAY = functools.partial(TokenReplay, memory_size=8, rank=8)


@pytest.fixture(scope="module")
def pairs():
    "Noise in pairs that share a text."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * N_TEXTS, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    group = torch.arange(2 * N_TEXTS) // 2
    return PairCorpus("noise", images, group, [[str(i)] for i in range(N_TEXTS)])


@pytest.fixture(scope="module")
def texts():
    "One random vector a text."
    vectors = torch.randn(N_TEXTS, 12, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(N_TEXTS)
    return TextEmbeddings(F.normalize(vectors, dim=1), rows, torch.ones_like(rows))


def make_encoder(name):
    torch.manual_seed(0)
    options = dict(img_size=SIDE, depth=3) if "vit" in name else {}
    encoder = timm.create_model(name, num_classes=0, **options).eval()
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (3, SIDE, SIDE)}
    return encoder


@pytest.fixture
def prepare(pairs, texts):
    "What `finetune` takes: an adapted encoder, its head, the images and the objective."

    def make(name, adapter, penalty=float, batch_norm="frozen"):
        encoder = adapt(make_encoder(name), adapter, pairs.images)
        features = extract_features(encoder, pairs.images)
        head = PairHead(*ridge_regression(features, texts.mean(pairs.group)))
        encoder.train(batch_norm == "running")
        return encoder, head, pairs.images, pair_objective(head, pairs, texts, penalty=penalty)

    return make


class Interrupted(Exception):
    "Stands for the end of a process."


def interrupt_at(step):
    "A penalty that is zero until a step, where it raises."
    calls = []

    def penalty():
        calls.append(step)
        if len(calls) == step:
            raise Interrupted
        return 0.0

    return penalty


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


CASES = {
    "FiLM": ("test_resnet", FiLM, "frozen"),
    "FiLM, running BatchNorm": ("test_resnet", FiLM, "running"),
    "full": ("test_vit", Full, "frozen"),
    "token replay": ("test_vit", TINY_REPLAY, "frozen"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_resumes_to_the_same_bits(prepare, tmp_path, name):
    encoder, adapter, batch_norm = CASES[name]
    checkpoint = tmp_path / "state.pt"
    whole = prepare(encoder, adapter(), batch_norm=batch_norm)
    losses = finetune(*whole, **LOOP)
    with pytest.raises(Interrupted):  # in the second step of epoch two
        finetune(*prepare(encoder, adapter(), interrupt_at(4), batch_norm), checkpoint=checkpoint, **LOOP)
    resumed = prepare(encoder, adapter(), batch_norm=batch_norm)
    assert finetune(*resumed, checkpoint=checkpoint, **LOOP) == losses
    assert same_bits(resumed[0], whole[0])
    assert same_bits(resumed[1], whole[1])


def test_a_cut_checkpoint_and_that_of_another_model_are_refused(prepare, tmp_path):
    checkpoint = tmp_path / "state.pt"
    finetune(*prepare("test_vit", FiLM()), checkpoint=checkpoint, **LOOP)
    before = checkpoint.read_bytes()
    with pytest.raises(DataError, match="belongs to another model"):
        finetune(*prepare("test_vit", TINY_REPLAY()), checkpoint=checkpoint, **LOOP)
    assert checkpoint.read_bytes() == before
    checkpoint.write_bytes(before[:500])
    with pytest.raises(DataError, match="cannot be read"):
        finetune(*prepare("test_vit", FiLM()), checkpoint=checkpoint, **LOOP)


@pytest.mark.parametrize("batch_norm", ["frozen", "running"])
def test_film_moves_no_pretrained_weight_or_statistic(prepare, batch_norm):
    "Unless BatchNorm's statistics may follow the batches; then nothing else moves."
    pretrained = make_encoder("test_resnet").state_dict()
    encoder, *rest = prepare("test_resnet", FiLM(), batch_norm=batch_norm)
    start = {key: value.clone() for key, value in encoder.state_dict().items()}
    finetune(encoder, *rest, **LOOP)
    tuned = encoder.state_dict()
    moved = {key for key, value in tuned.items() if not torch.equal(value, start[key])}
    assert pretrained.keys() < tuned.keys()
    assert any(".film." in key for key in moved)
    statistics = {key.rpartition(".")[2] for key in moved & pretrained.keys()}
    expected = {"running_mean", "running_var", "num_batches_tracked"}
    assert statistics == (expected if batch_norm == "running" else set())


def test_replay_consistency_stays_small_where_the_adapter_moves(prepare):
    encoder, head, images, _ = prepare("test_vit", TINY_REPLAY())
    start = {name: p.detach().clone() for name, p in encoder.named_parameters() if p.requires_grad}
    penalty = consistency_penalty(encoder, 1.0)
    assert penalty().item() == 0
    _, _, _, objective = prepare("test_vit", TINY_REPLAY(), penalty)
    finetune(encoder, head, images, objective, epochs=1, batch_size=len(images))
    moved = [name for name, p in encoder.named_parameters() if name in start and (p != start[name]).any()]
    assert moved
    assert 0 < penalty().item() < 1


@pytest.mark.parametrize("adapter", [FiLM, TINY_REPLAY], ids=["FiLM", "token replay"])
def test_a_compiled_encoder_trains_as_it_does_plainly(prepare, adapter):
    "Forward and backward pass are traced; no code is generated, which would take minutes."
    losses = []
    for compiled in (False, True):
        encoder, *rest = prepare("test_vit", adapter())
        encoder.load_state_dict(random_weights(encoder))
        encoder.compile = functools.partial(encoder.compile, backend="aot_eager")
        losses.append(finetune(encoder, *rest, compiled=compiled, **LOOP))
        assert (encoder._compiled_call_impl is not None) == compiled
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def random_weights(encoder):
    "Weights with which an adapter is not the identity."
    found = {}
    for key, value in encoder.state_dict().items():
        generator = torch.Generator().manual_seed(value.numel())
        found[key] = torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5
    return found


def test_micro_batches_have_the_gradients_of_the_whole_batch():
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
    x, gradients = torch.randn(10, 5), {}
    for size in (0, 4):
        tower.zero_grad()
        scores = checkpointed(tower, x, size) @ checkpointed(tower, x, size).T  # every row meets every other
        F.cross_entropy(scores, torch.arange(10)).backward()
        gradients[size] = torch.cat([p.grad.flatten() for p in tower.parameters()])
    torch.testing.assert_close(gradients[4], gradients[0])


def test_a_step_in_micro_batches_has_the_gradients_of_a_whole_step(prepare):
    gradients = {}
    for size in (0, 3):
        encoder, head, images, objective = prepare("test_vit", Full())
        optimizer = make_optimizer(encoder, head, 1e-3, 1e-3, 0.01)
        batch = Batch(images[:8] / 255, torch.arange(8), torch.Generator().manual_seed(0))
        set_rates(optimizer, 0.0)
        train_step(encoder, optimizer, objective, batch, micro_batch_size=size)
        gradients[size] = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[3], gradients[0], atol=1e-5, rtol=1e-3)
