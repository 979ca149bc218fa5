"""Parameters, gradients and optimizer states are counted to the byte."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import SHAPES, VOCABULARY
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from remax_lightning.models.lora import LoRA, add_lora
from remax_lightning.models.parallelize import Sharding, blocks, gathered, shard, sync_gradients
from remax_lightning.models.source import ModelSource
from remax_lightning.plan.cache import DryRunCache
from remax_lightning.plan.models import ModelSpec, Optimizer, Weights, weights
from remax_lightning.plan.recipe import Layout

ADAMW = Optimizer("torch.optim.AdamW", {"lr": 1e-3})
WORLD = 3  # divides few of the shapes


def build(model_type: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    config = AutoConfig.for_model(
        model_type, **SHAPES[model_type], vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """One real step; the bytes of the gradients."""
    model(input_ids=torch.zeros(2, 3, dtype=torch.long)).logits.sum().backward()
    gradients = sum(local(each.grad).nbytes for each in model.parameters() if each.grad is not None)
    optimizer.step()
    return gradients


def states(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local(value).nbytes for value in values if isinstance(value, torch.Tensor))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "arguments"), [("AdamW", {"lr": 1e-3}), ("AdamW", {"amsgrad": True}), ("SGD", {"momentum": 0.9})]
)
def test_bytes_of_one_gpu(model_type: str, dtype: torch.dtype, name: str, arguments: dict[str, Any]) -> None:
    model = build(model_type, dtype)
    optimizer = getattr(torch.optim, name)(model.parameters(), **arguments)
    gradients = step(model, optimizer)
    planned = weights(build(model_type, dtype, "meta"), Optimizer(f"torch.optim.{name}", arguments), 1, None)
    assert planned.masters == sum(each.nbytes for each in model.parameters())
    assert planned.gradients == gradients
    assert planned.optimizer == states(optimizer)
    assert planned.gathered == planned.working == planned.reduced == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_adapters(dtype: torch.dtype) -> None:
    lora = LoRA(rank=3, target_modules=["q_proj", "down_proj"])
    model = add_lora(build("llama", dtype), lora)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    gradients = step(model, optimizer)
    planned = weights(add_lora(build("llama", dtype, "meta"), lora), ADAMW, 1, None)
    assert planned.masters == sum(each.nbytes for each in model.parameters())
    assert planned.gradients == gradients == sum(each.nbytes for each in trained)
    assert planned.optimizer == states(optimizer)
    assert planned.head == 0


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (WORLD,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_bytes_of_a_sharded_model(model_type: str, mesh: Any) -> None:
    model = build(model_type)
    sharding = Sharding(mesh=mesh, device=torch.device("cpu"), compute_dtype=torch.bfloat16)
    sizes = sorted(sum(each.numel() for each in block.parameters()) for block in blocks(model))
    shard(model, sharding)
    planned = sharded(model_type)
    assert planned.masters == sum(local(each).nbytes for each in model.parameters())
    with gathered(model):
        assert planned.gathered == sum(each.nbytes for each in model.parameters())
        assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert planned.gradients == step(model, optimizer)
    assert planned.optimizer == states(optimizer)
    assert planned.working == planned.gathered - 2 * sum(sizes[:-2])
    assert planned.reduced == 6 * sum(sizes[-2:])


def test_gradients_of_a_sharded_model_while_they_are_added_up(mesh: Any) -> None:
    model = build("llama")
    sharding = Sharding(mesh=mesh, device=torch.device("cpu"), compute_dtype=torch.bfloat16)
    shard(model, sharding)
    sync_gradients(model, sharding, is_last=False)
    model(input_ids=torch.zeros(2, 3, dtype=torch.long)).logits.sum().backward()
    assert sharded("llama").unsharded_gradients == sum(each.nbytes for each in gradients_before_reduction(model))


def sharded(model_type: str) -> Weights:
    return weights(build(model_type, device="meta"), ADAMW, WORLD, 2)


def gradients_before_reduction(model: nn.Module) -> list[torch.Tensor]:
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    parameters = [each for unit in units for each in unit._get_fsdp_state()._fsdp_param_group.fsdp_params]
    return [each.unsharded_accumulated_grad_data for each in parameters]


def test_a_fused_optimizer_steps_in_place() -> None:
    model = build("llama", device="meta")
    assert weights(model, ADAMW, 1, None).step == weights(model, ADAMW, 1, None).gradients > 0
    assert weights(model, Optimizer("torch.optim.AdamW", {"lr": 1e-3, "fused": True}), 1, None).step == 0


def test_an_8bit_optimizer_has_two_bytes_and_scales() -> None:
    parameter = nn.Parameter(torch.empty(1000, 256, device="meta"))
    optimizer = Optimizer("torchao.optim.AdamW8bit", {"lr": 1e-3})
    assert optimizer.state_bytes([parameter]) == 2 * 256_000 + 2 * 4 * 1000


def test_an_offloaded_frozen_model_takes_nothing_while_it_waits() -> None:
    source = ModelSource(config={"model_type": "llama", **SHAPES["llama"], "vocab_size": VOCABULARY}, tokenizer="none")
    spec, cache = ModelSpec(source, "model.policy"), DryRunCache()
    layout = Layout(WORLD, shards=WORLD, itemsize=2)
    assert cache.frozen(spec, layout) == sharded("llama").masters
    assert cache.frozen(spec, replace(layout, offload_frozen=True)) == 0
