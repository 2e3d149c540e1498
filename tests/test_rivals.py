"Rivals train, are saved and load again, and do what their papers say."

import pytest
import torch
from wlsft.core.params import ParameterError
from wlsft.interpolation import changed_keys
from wlsft.study.derived import at_epoch, lines, mean_of_epochs, random_direction, run_to_sweep, soup
from wlsft.study.runs import load_run, train_run
from wlsft.study.schema import resolve


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    "A function from parameters to a run."
    runs = tmp_path_factory.mktemp("runs")
    given = dict(encoder=f"test_vit={tiny / 'vit.safetensors'}", corpus=f"mine={tiny / 'captions.csv'}")
    given |= dict(batch_size=16, lr=1e-3)

    def train(**params):
        chosen = {name: value for name, value in (given | params).items() if value is not None}
        return load_run(train_run(chosen, runs), runs)

    train.runs = runs
    return train


def update(run, key="blocks.0.attn.qkv.weight"):
    return run.theta_1[key] - run.theta_0[key]


def length(run):
    moved = [(run.theta_1[k] - run.theta_0[k]).square().sum() for k in changed_keys(run.theta_0, run.theta_1)]
    return torch.stack(moved).sum().sqrt().item()


def test_a_run_of_lora_is_a_difference_of_its_rank(trained):
    run = trained(adapter="lora", lora_rank=3, lr=0.01)
    values = torch.linalg.svdvals(update(run).double())
    assert values[2] > 1e-4 * values[0] and values[3] < 1e-5 * values[0]
    assert not any("lora" in key for key in run.theta_1)
    assert all(key.startswith("blocks.") for key in changed_keys(run.theta_0, run.theta_1))


@pytest.mark.parametrize(
    "adapter, ends", [("bitfit", ("bias",)), ("ln-tune", ("weight", "bias")), ("locked", ())]
)
def test_a_selection_trains_nothing_else(trained, adapter, ends):
    run = trained(adapter=adapter)
    changed = changed_keys(run.theta_0, run.theta_1)
    assert bool(changed) == bool(ends) and all(key.endswith(ends) for key in changed)
    if adapter == "ln-tune":
        assert all("norm" in key for key in changed)


def test_penalties_shorten_the_update(trained):
    free, held, near = (
        trained(adapter="full"),
        trained(adapter="full", l2=100.0),
        trained(adapter="full", ldifs=100.0),
    )
    assert length(held) < 0.9 * length(free)
    x = torch.rand(8, 3, 160, 160, generator=torch.Generator().manual_seed(0))

    def moved(run):
        outputs = []
        for theta in (run.theta_0, run.theta_1):
            run.encoder.load_state_dict(theta)
            with torch.no_grad():
                outputs.append(run.encoder(x))
        return (outputs[1] - outputs[0]).norm().item()

    assert moved(near) < 0.9 * moved(free)
    with pytest.raises(ParameterError, match="micro_batch_size = 0"):
        trained(adapter="full", ldifs=1.0, micro_batch_size=4)


def test_a_sweep_averages_two_seeds(trained):
    one, two = trained(adapter="full", seed=0), trained(adapter="full", seed=1)
    sweep = dict(epoch=0, after="soup", with_seed=1)
    mean = run_to_sweep(one.name, ("", ""), sweep, trained.runs)
    key = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(mean.theta_1[key], (one.theta_1[key] + two.theta_1[key]) / 2)
    for key, tensor in mean.head_1.items():
        torch.testing.assert_close(tensor, (one.head_1[key] + two.head_1[key]) / 2)
    stock = run_to_sweep(one.name, ("", ""), sweep | dict(after="stock"), trained.runs)
    assert 0 < length(stock) <= length(mean) < max(length(one), length(two))
    with pytest.raises(ParameterError, match="is the seed of the run itself"):
        run_to_sweep(two.name, ("", ""), sweep, trained.runs)


def test_epochs_are_kept_and_the_last_is_the_end(trained):
    run = trained(adapter="film", epochs=3, keep_epochs=True)
    last = at_epoch(run.name, 3, trained.runs)
    first = at_epoch(run.name, 1, trained.runs)
    assert not changed_keys(run.theta_1, last.theta_1) and changed_keys(run.theta_1, first.theta_1)
    assert torch.equal(last.head_1["weight"], run.head_1["weight"])
    assert len({r.info["theta"] for r in (run, first, last)}) == 3
    mean = mean_of_epochs(run.name, trained.runs)
    kept = [at_epoch(run.name, epoch, trained.runs).theta_1 for epoch in (1, 2, 3)]
    for key in changed_keys(run.theta_0, run.theta_1):
        torch.testing.assert_close(mean.theta_1[key], (kept[0][key] + kept[1][key] + kept[2][key]) / 3)
    asked = run_to_sweep(run.name, ("", ""), dict(epoch=0, after="epochs", with_seed=-1), trained.runs)
    assert asked.info["derived"] == "mean of epochs" and asked.info["theta"] == mean.info["theta"]
    with pytest.raises(ParameterError, match="takes whole runs"):
        run_to_sweep(run.name, ("", ""), dict(epoch=2, after="epochs", with_seed=-1), trained.runs)
    with pytest.raises(ParameterError, match="epoch = 7"):
        at_epoch(run.name, 7, trained.runs)
    with pytest.raises(ParameterError, match="keep_epochs"):
        resolve(dict(adapter="lora", keep_epochs=True))


def test_runs_made_from_runs(trained):
    one, two = trained(adapter="full"), trained(adapter="full", seed=1)
    mean = soup([one, two])
    key = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(update(mean), (update(one) + update(two)) / 2)
    first, last = f"blocks.0{key[8:]}", [k for k in one.theta_1 if k.startswith("blocks.")][-1]
    scaled = lines(one)
    assert torch.equal(scaled.theta_1[first], one.theta_0[first])
    torch.testing.assert_close(scaled.theta_1[last], one.theta_1[last])
    other = random_direction(one)
    torch.testing.assert_close(update(other).norm(), update(one).norm())
    assert abs(torch.cosine_similarity(update(other).flatten(), update(one).flatten(), dim=0)) < 0.1


def test_controls_without_words(trained, tiny):
    images = trained(method="SimCLR", adapter="full")
    labels = trained(method="SupCon", adapter="full", suite=f"mine={tiny / 'suite'}", corpus=None)
    for run in (images, labels):
        assert changed_keys(run.theta_0, run.theta_1) and all(loss > 0 for loss in run.info["history"])
