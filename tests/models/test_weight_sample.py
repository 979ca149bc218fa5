"""A sample of frozen weights tells whether others were loaded, and nothing else."""

import copy

import pytest
import tiny
import torch

from remax_lightning.models.language_model import freeze
from remax_lightning.models.lora import LoRA, add_lora
from remax_lightning.models.weight_sample import changed_parameters, weight_sample


def test_equal_weights_are_equal_in_any_type_and_under_adapters() -> None:
    plain = weight_sample(freeze(tiny.language_model()))
    half = weight_sample(freeze(tiny.language_model().bfloat16()))
    adapted = weight_sample(add_lora(tiny.language_model(), LoRA(rank=2)))
    for other in (half, adapted):
        assert other["names"] == plain["names"]
        assert torch.equal(other["values"], plain["values"])
        assert changed_parameters(plain, other) == []
    assert set(plain["names"]) == {name for name, _ in tiny.language_model().named_parameters()}


def test_what_is_trained_is_left_out() -> None:
    sample = weight_sample(tiny.language_model())
    assert (sample["names"], sample["counts"], sample["values"].numel()) == ([], [], 0)
    assert changed_parameters(sample, sample) == []


def test_last_bits_do_not_count() -> None:
    """A merge of adapters gives others on another machine."""
    model = freeze(tiny.language_model())
    before = weight_sample(model)
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-7
    assert changed_parameters(before, weight_sample(model)) == []


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_training_is_seen(size: float) -> None:
    """Also that at a rate so small that few values change in bfloat16: relative to the weights, a ten thousandth."""
    model = freeze(tiny.language_model())
    before = weight_sample(model)
    trained = copy.deepcopy(model)
    for parameter in trained.parameters():
        parameter.data *= 1 + size * torch.randn(parameter.shape)
    assert changed_parameters(before, weight_sample(trained))


def test_one_layer_is_seen() -> None:
    model = freeze(tiny.language_model())
    before = weight_sample(model)
    weight = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    weight.data = torch.randn(weight.shape)
    assert changed_parameters(before, weight_sample(model)) == ["model.layers.1.mlp.up_proj.weight"]
    weight.data = torch.randn(3, 3)
    assert changed_parameters(before, weight_sample(model)) == ["model.layers.1.mlp.up_proj.weight"]
