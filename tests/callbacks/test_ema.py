from types import SimpleNamespace

import pytest
import torch

from srpo_lightning.callbacks import EMA, RunCheckpoint
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.faults import History


def by_hand(start: dict, after_steps: list[dict], decay: float, warmup: bool) -> dict:
    """average <- d average + (1 - d) weights, one number at a time in float64."""
    average = {name: p.double() for name, p in start.items()}
    for step, weights in enumerate(after_steps, 1):
        d = min(decay, (1 + step) / (10 + step)) if warmup else decay
        average = {name: d * average[name] + (1 - d) * weights[name].double() for name in average}
    return average


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_equals_a_loop_over_the_optimizer_steps(models, features, tmp_path, warmup, accumulate):
    module, ema, history = tiny.new_module(models), EMA(decay=0.5, warmup=warmup), History()
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.trainable_parameters()}
    trainer = tiny.new_trainer(tmp_path, [ema, history], max_steps=5, accumulate_grad_batches=accumulate)
    trainer.fit(module, tiny.new_data(models, features))
    assert history.steps == [(micro + 1) // accumulate for micro in range(5 * accumulate)]
    expected = by_hand(start, history.weights[accumulate - 1 :: accumulate], 0.5, warmup)
    assert ema.num_updates == 5
    for name, average in ema.weights.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)
        assert not average.requires_grad


def test_an_average_every_third_step_uses_the_third_power_of_the_decay(models, features, tmp_path):
    module, ema, history = tiny.new_module(models), EMA(decay=0.5, warmup=False, every_n_steps=3), History()
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.trainable_parameters()}
    tiny.new_trainer(tmp_path, [ema, history], max_steps=7).fit(module, tiny.new_data(models, features))
    expected = by_hand(start, history.weights[2::3], 0.5**3, warmup=False)
    assert ema.num_updates == 6
    for name, average in ema.weights.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"device": "host"}, {"dtype": "bfloat16", "device": "host"}]
)
def test_a_rounded_average_leaves_the_weights_bit_for_bit_as_they_were(models, features, tmp_path, settings):
    module, ema = tiny.new_module(models), EMA(decay=0.5, **settings)
    tiny.new_trainer(tmp_path, [ema], max_steps=2, limit_val_batches=1, val_check_interval=2).fit(
        module, tiny.new_data(models, features)
    )
    before = snapshot(module)
    with module.evaluated_weights()["ema"]():
        inside = snapshot(module)
    assert all(torch.equal(inside[name], ema.weights[name].to(inside[name])) for name in before)
    assert any(not torch.equal(inside[name], before[name]) for name in before)
    assert all(torch.equal(p, before[name]) for name, p in module.trainable_parameters())
    dtype = torch.bfloat16 if "dtype" in settings else torch.float32
    assert {average.dtype for average in ema.weights.values()} == {dtype}


@pytest.mark.parametrize(("evaluate", "shown"), [("both", ["policy", "ema"]), ("ema", ["ema"]), ("policy", ["policy"])])
def test_evaluation_shows_the_weights_that_were_asked_for(models, features, tmp_path, evaluate, shown):
    module = tiny.new_module(models)
    trainer = tiny.new_trainer(
        tmp_path, [EMA(evaluate=evaluate)], max_steps=1, limit_val_batches=1, val_check_interval=1
    )
    trainer.fit(module, tiny.new_data(models, features))
    assert list(module.evaluated_weights()) == shown


def fitted(models, features, folder, **settings):
    module, ema = tiny.new_module(models), EMA(decay=0.5)
    trainer = tiny.new_trainer(
        folder, [ema, RunCheckpoint(1)], max_steps=2, limit_val_batches=1, val_check_interval=2, **settings
    )
    trainer.fit(module, tiny.new_data(models, features))
    return module, ema


def snapshot(module) -> dict:
    return {name: p.detach().clone() for name, p in module.trainable_parameters()}


def test_the_average_stands_in_for_the_weights_and_leaves_them_as_they_were(models, features, tmp_path):
    """Bit for bit, also where sampling raises."""
    module, ema = fitted(models, features, tmp_path)
    before, average = snapshot(module), {name: t.clone() for name, t in ema.weights.items()}
    with module.evaluated_weights()["ema"]():
        inside = snapshot(module)
    with pytest.raises(RuntimeError, match="sampling"), module.evaluated_weights()["ema"]():
        raise RuntimeError("sampling")
    assert all(torch.equal(inside[name], average[name]) for name in before)
    assert any(not torch.equal(before[name], average[name]) for name in before)
    assert all(torch.equal(p, before[name]) for name, p in module.trainable_parameters())
    assert all(torch.equal(ema.weights[name], average[name]) for name in before)


def test_validation_draws_pictures_by_both_weights_in_the_same_noise(models, features, tmp_path):
    module, _ = fitted(models, features, tmp_path)
    batch = tiny.new_conditions(2)
    images = module.validation_step(batch, 0)
    assert images.keys() == {"policy", "ema"}
    assert torch.equal(images["policy"], module.sample(batch))
    with module.evaluated_weights()["ema"]():
        assert torch.equal(images["ema"], module.sample(batch))
    assert not torch.equal(images["policy"], images["ema"])


def test_the_average_travels_with_the_checkpoint_into_a_bare_evaluation(models, features, tmp_path):
    _, ema = fitted(models, features, tmp_path)
    module, loaded = tiny.new_module(models), EMA(decay=0.5)
    tiny.new_trainer(tmp_path, [loaded], limit_val_batches=1).validate(
        module, tiny.new_data(models, features), ckpt_path=RunFolder(tmp_path).checkpoint(2), verbose=False
    )
    assert "ema" in module.evaluated_weights()
    assert loaded.num_updates == 2
    assert all(torch.equal(loaded.weights[name], t) for name, t in ema.weights.items())


def test_without_a_checkpoint_evaluation_knows_no_average(models, features, tmp_path):
    module = tiny.new_module(models)
    tiny.new_trainer(tmp_path, [EMA()], limit_val_batches=1).validate(
        module, tiny.new_data(models, features), verbose=False
    )
    assert module.evaluated_weights().keys() == {"policy"}


@pytest.mark.parametrize("restored", [True, False], ids=["with an average", "without one"])
def test_an_average_that_a_checkpoint_brings_after_fit_has_begun_is_in_place_before_a_step(models, restored):
    """ShardedStrategy reads then. Tensors made in an evaluation's inference mode could not be stepped."""
    module, ema = tiny.new_module(models), EMA(dtype="float32", every_n_steps=1)
    module.configure_model()
    ema.on_fit_start(None, module)
    kept = {name: parameter.detach().bfloat16() for name, parameter in module.trainable_parameters()}
    ema.on_load_checkpoint(None, module, {"ema": kept} if restored else {})
    if restored:
        ema.num_updates = 1
        with torch.inference_mode():
            ema.on_validation_start(None, module)
    ema.on_train_start(None, module)
    ema.on_train_batch_end(SimpleNamespace(global_step=2), module, None, None, 0)
    assert {tensor.dtype for tensor in ema.weights.values()} == {torch.float32}
    assert ema.weights.keys() == kept.keys()
