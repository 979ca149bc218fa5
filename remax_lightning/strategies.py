"""Training on several devices: fully sharded data parallelism (FSDP2) as a strategy of Lightning's trainer."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from remax_lightning.checkpoints.checkpoint_folder import load_folder
from remax_lightning.checkpoints.find_checkpoint import read_usable
from remax_lightning.checkpoints.safe_checkpoint_io import check_finite, safe_checkpoint_io
from remax_lightning.models.optimizer_state import keyed_by_index, keyed_by_name
from remax_lightning.models.parallelize import Sharding
from remax_lightning.modules.base import TrainableModule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer states over all ranks; ``--trainer.strategy fsdp2`` for short.

    The policy, the reference and the reward model are sharded block by block. Trained weights are float32 and gradients
    are reduced in float32, whatever the compute type, so leave ``--trainer.precision`` at 32-true.

    Args:
        compute_dtype: Type of the gathered parameters and of activations.
        replicas: Number of full copies of the parameters, each sharded over a group of ranks; gradients are averaged
            over the groups. With one group per machine, only gradients cross between machines.
        offload_frozen: Move the reference and the reward model to host memory while they are not used; needs a GPU.
        sync_every_micro_batch: Reduce and scatter gradients after each micro-batch, not once a step: more
            communication, but no rank ever has unsharded gradients.
        save_sharded: A checkpoint is a folder into which each rank writes its shards; if false, rank 0 gathers
            everything in host memory and writes one file.
        timeout_minutes: How long a rank waits for the others before it gives up: longer than a rollout takes.

    Raises:
        ValueError: If ``replicas`` is below 1 or the timeout is not positive.
    """

    def __init__(
        self,
        compute_dtype: Literal["float32", "bfloat16"] = "bfloat16",
        replicas: int = 1,
        offload_frozen: bool = False,
        sync_every_micro_batch: bool = False,
        save_sharded: bool = True,
        timeout_minutes: float = 60.0,
    ) -> None:
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, one copy of the parameters, got {replicas}")
        if not timeout_minutes > 0:
            raise ValueError(f"timeout_minutes must be positive, got {timeout_minutes}")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_sharded,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.compute_dtype, self.replicas = DTYPES[compute_dtype], replicas
        self.offload_frozen, self.sync_every_micro_batch = offload_frozen, sync_every_micro_batch

    def setup_environment(self) -> None:
        """Start the process group and tell the module how to shard its models.

        Raises:
            ValueError: If ``replicas`` does not divide the world size, or ``offload_frozen`` is set on a CPU.
        """
        # no output of a model is changed in place here
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self.world_size % self.replicas:
            raise ValueError(
                f"replicas must divide the number of ranks, {self.world_size}, got replicas={self.replicas}"
            )
        if self.offload_frozen and self.root_device.type == "cpu":
            raise ValueError("offload_frozen moves frozen models from a GPU to host memory; on a CPU set it to false")
        assert isinstance(self.lightning_module, TrainableModule)
        if self.compute_dtype is not torch.float32 and self.lightning_module.sharding is None:
            rank_zero_info(
                "fsdp2 computes in bfloat16 and trains float32 weights, though trainer.precision is "
                f"{self.precision_plugin.precision}; for float32 set trainer.strategy.compute_dtype to float32"
            )
        self.lightning_module.sharding = Sharding(
            mesh=self._sharding_mesh(),
            device=self.root_device,
            compute_dtype=self.compute_dtype,
            offload_frozen=self.offload_frozen,
            sync_every_micro_batch=self.sync_every_micro_batch,
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer: the shards of this rank by parameter name, or on rank 0 all of it by index."""
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        is_unsharded = not self._save_distributed_checkpoint
        assert self.model is not None
        options = StateDictOptions(full_state_dict=is_unsharded, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, raw, options=options)
        return keyed_by_index(state) if is_unsharded and self.is_global_zero else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to the path of rank 0: each rank its shards, or rank 0 all of it."""
        path, io = self.broadcast(filepath), safe_checkpoint_io(self.checkpoint_io)
        if self._save_distributed_checkpoint:
            io.save_sharded(checkpoint, path, storage_options)
        elif self.is_global_zero:
            io.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any world size into the model and its optimizers."""
        return read_usable(checkpoint_path, self._read_into_model)

    def _read_into_model(self, path: Path) -> dict[str, Any]:
        io = safe_checkpoint_io(self.checkpoint_io)
        assert self.model is not None
        assert self.lightning_module is not None
        options = StateDictOptions(strict=self.lightning_module.strict_loading, full_state_dict=not path.is_dir())
        checkpoint = io.read(path, shards=not path.is_dir())
        if path.is_dir():
            state = get_model_state_dict(self.model)
            live = [get_optimizer_state_dict(self.model, optimizer) for optimizer in self.optimizers]
            states = load_folder(path, state, live)
            check_finite(path, cast(Any, state))
        else:
            state = checkpoint["state_dict"]
            names = {id(value): name for name, value in self.lightning_module.named_parameters()}
            states = []
            for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
                groups = [[names[id(value)] for value in group["params"]] for group in optimizer.param_groups]
                states.append(keyed_by_name(saved, groups))
        set_model_state_dict(self.model, state, options=options)
        for optimizer, each in zip(self.optimizers, states, strict=True):
            set_optimizer_state_dict(self.model, optimizer, cast(Any, each), options=options)
        return checkpoint

    def _sharding_mesh(self) -> DeviceMesh:
        device_type, group = self.root_device.type, self.world_size // self.replicas
        if self.replicas == 1:
            return init_device_mesh(device_type, (group,), mesh_dim_names=("shard",))
        # groups with the timeout of the strategy; those that a mesh makes itself have torch's default
        ranks = torch.arange(self.world_size).view(self.replicas, group)
        groups = [
            dist.new_subgroups_by_enumeration(lists.tolist(), timeout=self._timeout)[0] for lists in (ranks.T, ranks)
        ]
        return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallelism by FSDP2")
