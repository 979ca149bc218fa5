"""Runs of one process and of two, each with the same global batch, whose results are compared.

``python -m torch.distributed.run --nproc_per_node=2 scenarios.py FOLDER`` runs them all and leaves what each process
found as ``result<rank>.pt``.
"""

import os
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import reward_functions  # noqa: F401 (found by its name)
import tiny
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from remax_lightning import strategies
from remax_lightning.callbacks import Checkpoint, HFExport, RankAgreement, SelfCheck, rendezvous, signal_guard
from remax_lightning.checkpoints import checkpoint_folder, find_checkpoint, safe_checkpoint_io
from remax_lightning.checkpoints.find_checkpoint import check_ranks_agree
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO
from remax_lightning.checkpoints.synced_file import remove
from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
from remax_lightning.models.language_model import freeze, load_language_model
from remax_lightning.models.lora import LoRA
from remax_lightning.models.parallelize import Sharding, blocks, full_tensor, gathered, sharded_units
from remax_lightning.models.scalar_model import load_reward_model
from remax_lightning.models.sharded_loading import load_sharded, stored_keys, weights_folder
from remax_lightning.models.source import ModelSource
from remax_lightning.models.weight_sample import weight_sample
from remax_lightning.modules import PPO, RLOO, SFT, KLControl, PolicyGradientModule, Reinforce, ReMax, RewardModel
from remax_lightning.modules.base import TrainableModule
from remax_lightning.rewards import FunctionReward, ModelReward
from remax_lightning.rollout import Rollout, Sampling
from remax_lightning.strategies import FSDP2Strategy

BATCH = 4
STEPS = 10
WORDS = ["Go", "Tell me more", "a", "What is it", "Sing.", "no", "Yes or no", "up"]
UNSCORED = (2, 3)
LOADED: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in ("llama", "gpt2", "opt", "qwen2", "mistral", "gemma2")},
    "tied": ("llama", {"tie_word_embeddings": True}),
    "scaled_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
}
Results = dict[str, Any]


class Watch(Callback):
    """Metrics of every step, the rollouts, and how many micro-batches a process had."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.responses: list[dict[int, list[list[int]]]] = []
        self.num_micro_batches: list[int] = []
        self.num_scored: list[int] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if isinstance(pl_module, PolicyGradientModule):
            pl_module.collect = partial(self.collect, pl_module.collect)  # type: ignore[method-assign]
        pl_module.micro_batches = partial(self.micro_batches, pl_module.micro_batches)

    def collect(self, collect: Callable[..., Rollout], batch: dict[str, Any]) -> Rollout:
        rollout = collect(batch)
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        size = len(rows) // len(batch["prompt_index"])
        indices = batch["prompt_index"].tolist()
        self.num_scored.append(int(rollout.rewards.isfinite().sum()))
        self.responses.append({index: rows[n * size : (n + 1) * size] for n, index in enumerate(indices)})
        return rollout

    def micro_batches(self, split: Callable[[Tensor], list[Tensor]], lengths: Tensor) -> list[Tensor]:
        parts = split(lengths)
        self.num_micro_batches.append(len(parts))
        return parts

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer(
    folder: Path, world: int, steps: int = STEPS, callbacks: Sequence[Callback] = (), **options: Any
) -> Trainer:
    """A quiet trainer of as many processes."""
    strategy = {"compute_dtype": "float32", **options.pop("strategy", {})}
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FSDP2Strategy(**strategy) if world > 1 else "auto",
        max_steps=steps,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        **options,
    )


def remax(folder: Path, **options: Any) -> ReMax:
    defaults: dict[str, Any] = {
        "sampling": Sampling(max_new_tokens=10, num_samples=2),
        "kl_coef": 0.2,
        "micro_batch_size": 1,
        "max_grad_norm": 5.0,
        "optimizer": tiny.sgd(0.1),
        "lr_schedule": "linear",
    }
    reward = options.pop("reward", ModelReward(str(folder / "reward_model")))
    return tiny.remax(options.pop("policy", str(folder / "policy")), reward, **{**defaults, **options})


def prompts(folder: Path, world: int, name: str = "prompts") -> PromptDataModule:
    train, held_out = str(folder / f"{name}.jsonl"), str(folder / "held_out.jsonl")
    return PromptDataModule(
        train=train, validation=held_out, predict=held_out, batch_size=BATCH // world, eval_batch_size=2
    )


class Digested(PromptDataModule):
    """Prompts with a digest of their rows that a test chooses."""

    digest = ""


def weights(module: TrainableModule) -> dict[str, Tensor]:
    """All parameters, whole."""
    return {name: full_tensor(value.detach()).clone() for name, value in module.trained_model.named_parameters()}


def fit(module: TrainableModule, data: LightningDataModule, run: Path, world: int, **options: Any) -> Results:
    """Train; metrics, rollouts, weights."""
    watch = Watch()
    options["callbacks"] = [watch, *options.pop("callbacks", ())]
    resume_from = options.pop("resume_from", None)
    own = trainer(run, world, **options)
    own.fit(module, datamodule=data, ckpt_path=resume_from)
    return {
        "steps": watch.steps,
        "responses": watch.responses,
        "num_micro_batches": watch.num_micro_batches,
        "num_scored": watch.num_scored,
        "weights": weights(module),
    }


def full(folder: Path, world: int) -> Results:
    return fit(remax(folder), prompts(folder, world), folder, world)


def lora(folder: Path, world: int) -> Results:
    return fit(remax(folder, lora=LoRA(rank=4)), prompts(folder, world), folder, world)


def dropped(folder: Path, world: int) -> Results:
    """One step has no usable row in one of two processes."""
    reward = FunctionReward("reward_functions.with_gaps")
    return fit(remax(folder, reward=reward), prompts(folder, world, "gaps"), folder, world)


def uneven(folder: Path, world: int) -> Results:
    """Without a KL penalty rows that equal the greedy response are left out; the rest is cut by tokens."""
    module = remax(folder, kl_coef=0.0, micro_batch_size=None, micro_batch_tokens=24)
    return fit(module, prompts(folder, world), folder, world)


def recomputed(folder: Path, world: int) -> Results:
    """Activation checkpointing, and gradients split after each micro-batch."""
    module = remax(folder, activation_checkpointing=True)
    return fit(module, prompts(folder, world), folder, world, strategy={"sync_every_micro_batch": True})


def replicated(folder: Path, world: int) -> Results:
    """Each process holds all parameters."""
    return fit(remax(folder), prompts(folder, world), folder, world, strategy={"replicas": world})


def tied(folder: Path, world: int) -> Results:
    """Head and embeddings share a weight."""
    return fit(remax(folder, policy=str(folder / "gpt2")), prompts(folder, world), folder, world)


def half(folder: Path, world: int) -> Results:
    """Computed in bfloat16, kept in float32."""
    module, told = remax(folder), []
    strategies.rank_zero_info, original = told.append, strategies.rank_zero_info
    found = fit(module, prompts(folder, world), folder, world, strategy={"compute_dtype": "bfloat16"}, steps=3)
    trainer(folder, world, strategy={"compute_dtype": "bfloat16"}).validate(module, prompts(folder, world))
    strategies.rank_zero_info, found["told"] = original, told
    assert module.reference is not None
    found["dtypes"] = [
        {str(value.dtype) for value in model.parameters()} for model in (module.policy, module.reference.model)
    ]
    return found


def sft(folder: Path, world: int) -> Results:
    module = SFT(
        policy=ModelSource(path=str(folder / "policy")),
        optimizer=tiny.sgd(0.1),
        micro_batch_size=1,
        lr_schedule="constant",
    )
    data = DemonstrationDataModule(train=str(folder / "demonstrations.jsonl"), batch_size=BATCH // world)
    return fit(module, data, folder, world)


def reward_model(folder: Path, world: int) -> Results:
    module = RewardModel(
        model=ModelSource(path=str(folder / "reward_model")),
        optimizer=tiny.sgd(0.1),
        micro_batch_size=1,
        lr_schedule="constant",
    )
    data = PreferenceDataModule(train=str(folder / "preferences.jsonl"), batch_size=BATCH // world)
    return fit(module, data, folder, world)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Its state matters, and no step of it is larger for a smaller gradient."""
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-2)


def saving(folder: Path, world: int, lora: LoRA | None = None, **options: Any) -> Results:
    """Six steps with a checkpoint after the third, then evaluations, and the exported folder."""
    run = folder / f"saving{world}{'_lora' if lora else ''}{'_file' if options else ''}"
    module, data = remax(folder, optimizer=adam, lora=lora), prompts(folder, world)
    callbacks = [Checkpoint(str(run / "checkpoints"), every_n_train_steps=3, save_top_k=-1), HFExport(), SelfCheck()]
    found = fit(module, data, run, world, steps=6, callbacks=callbacks, **options)
    own = trainer(run, world, **options)
    found["validation"] = own.validate(module, datamodule=data, verbose=False)[0]
    path = run / "checkpoints" / "step=6.ckpt"
    fresh, evaluation = remax(folder, optimizer=adam, lora=lora), trainer(run, world, **options)
    found["validation of it"] = evaluation.validate(fresh, datamodule=data, ckpt_path=path, verbose=False)[0]
    found["predictions"] = [row for batch in own.predict(module, datamodule=data) or [] for row in batch]
    return found


def resumed(folder: Path, world: int, checkpoint: Path, lora: LoRA | None = None) -> Results:
    """From the checkpoint after the third step to the sixth."""
    module, run = remax(folder, optimizer=adam, lora=lora), folder / "resumed"
    return fit(module, prompts(folder, world), run, world, steps=6, resume_from=checkpoint, callbacks=[Checkpoint(run)])


class Collectives(TorchDispatchMode):
    """Counts what processes exchange, by the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def collectives(folder: Path, world: int) -> Results:
    """What processes exchange while a rollout is collected, for two lengths of it, and how many units models have."""
    found: Results = {}
    for length in (4, 10):
        module = remax(folder, sampling=Sampling(max_new_tokens=length))
        collect, mode = module.collect, Collectives()

        def counted(batch: Any, collect: Any = collect, mode: Any = mode) -> Rollout:
            with mode:
                return collect(batch)

        module.collect = counted  # type: ignore[method-assign]
        fit(module, prompts(folder, world), folder, world, steps=1)
        models = (module.policy, module.reference.model, module.reward.model)  # type: ignore[attr-defined]
        found["units"] = sum(len(sharded_units(model)) for model in models)
        found[str(length)] = dict(mode.counts)
    return found


def sharding_of(world: int) -> Sharding:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    return Sharding(mesh=mesh, device=torch.device("cpu"), compute_dtype=torch.float32)


def in_slices(source: ModelSource) -> bool:
    """Whether the files of a source hold its parameters as they are."""
    files = weights_folder(source)
    return files is not None and stored_keys(load_language_model(source, on_meta=True), files, None) is not None


def loading(folder: Path, world: int) -> Results:
    """Models loaded in slices, or handed out, against the same ones loaded whole."""
    sharding, found = sharding_of(world), {}
    ids = torch.arange(2, 22).view(2, 10)
    tokenizer = str(folder / "policy")
    sources = {
        path.name: ModelSource(path=str(path), tokenizer=tokenizer) for path in sorted((folder / "loaded").iterdir())
    }
    for name, source in sources.items():
        expected = load_language_model(source).eval()
        model = load_sharded(load_language_model, source, sharding).eval()
        state = {key: full_tensor(value.detach()) for key, value in model.named_parameters()}
        with torch.no_grad(), gathered(model):
            logits = model(input_ids=ids).logits
            difference = (logits - expected(input_ids=ids).logits).abs().max()
        found[name] = {
            "is_sliced": in_slices(source),
            "same_names": state.keys() == dict(expected.named_parameters()).keys(),
            "equal": all(torch.equal(state[key], value) for key, value in expected.named_parameters()),
            "difference": float(difference),
            "stops": model.generation_config.eos_token_id == expected.generation_config.eos_token_id,
            "same_sample": torch.equal(*(weight_sample(freeze(each))["values"] for each in (model, expected))),
        }
    return found


def broken(folder: Path, world: int) -> Results:
    """What is left of a model whose use raised while it was gathered."""
    model = load_sharded(load_language_model, ModelSource(path=str(folder / "policy")), sharding_of(world))
    sizes = [value.to_local().numel() for value in model.parameters()]  # type: ignore[attr-defined]
    try:
        with gathered(model):
            inside = [value.numel() for value in model.parameters()]
            raise KeyError("in a rollout")
    except KeyError:
        pass
    after = [value.to_local().numel() for value in model.parameters()]  # type: ignore[attr-defined]
    mode = Collectives()
    with torch.no_grad(), mode:
        model(input_ids=torch.ones(1, 1, dtype=torch.long))
        model(input_ids=torch.ones(1, 1, dtype=torch.long))
    return {
        "before": sizes,
        "inside": inside,
        "after": after,
        "gathers": dict(mode.counts),
        "blocks": len(blocks(model)),
    }


class SigtermToFirst(Callback):
    """SIGTERM comes to process 0 in the second step's update."""

    def on_before_optimizer_step(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(folder: Path, world: int) -> Results:
    """What is left of a run of which one process is told to end."""
    run, module, data = folder / "terminated", remax(folder), prompts(folder, world)
    own = trainer(run, world, callbacks=[Checkpoint(str(run), every_n_train_steps=5), SigtermToFirst()])
    status = None
    try:
        own.fit(module, datamodule=data)
    except SystemExit as end:
        status = end.code
    return {"status": status, "weights": weights(module), "files": sorted(path.name for path in run.iterdir())}


class Acts(Callback):
    """Acts in a hook of the step after some others, in each process."""

    def __init__(self, hook: str, step: int, act: Callable[[int], None]) -> None:
        self.step, self.act = step, act
        setattr(self, hook, self.call)

    def call(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self.act(trainer.global_rank)


def interrupted(folder: Path, world: int) -> Results:
    """What is saved of runs that end by a signal to one process, or by an error or a signal in both of them."""

    def send_to_first(rank: int) -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def fail(rank: int) -> None:
        raise KeyError("in both processes")

    def fail_apart(rank: int) -> None:
        time.sleep(4 * rank)
        raise KeyError("one after the other")

    def hang(rank: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    signal_guard.PATIENCE_SECONDS, patience = 0.5, signal_guard.PATIENCE_SECONDS
    rendezvous.SECONDS_TO_MEET, seconds = 2.0, rendezvous.SECONDS_TO_MEET
    found = Results()
    for name, callback in (
        ("SIGINT", Acts("on_before_optimizer_step", 1, send_to_first)),
        ("error", Acts("on_after_backward", 2, fail)),
        ("hanging", Acts("on_train_batch_start", 2, hang)),
        ("apart", Acts("on_train_batch_start", 2, fail_apart)),
    ):
        run, module, status = folder / "interrupted" / name, remax(folder, optimizer=adam), None
        saves = Checkpoint(str(run / "checkpoints"), every_n_train_steps=5)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                trainer(run, world, 4, [callback, saves]).fit(module, datamodule=prompts(folder, world))
            except SystemExit as end:
                status = end.code
            except KeyError:
                status = "error"
        dist.barrier()
        found[name] = {
            "status": status,
            "weights": weights(module),
            "files": names(run / "checkpoints"),
            "told": [str(each.message) for each in told if "could not be saved" in str(each.message)],
        }
    signal_guard.PATIENCE_SECONDS, rendezvous.SECONDS_TO_MEET = patience, seconds
    return found


def evaluated_last(folder: Path, world: int) -> Results:
    """The last thing before the export is a forward pass in bfloat16, which leaves a part of the model gathered."""
    run = folder / "evaluated_last"
    module = SFT(policy=ModelSource(path=str(folder / "policy")), optimizer=tiny.sgd(0.1))
    data = DemonstrationDataModule(train=str(folder / "demonstrations.jsonl"), batch_size=BATCH // world)

    class Forward(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.policy(input_ids=torch.ones(1, 1, dtype=torch.long))

    options: dict[str, Any] = {"strategy": {"compute_dtype": "bfloat16"}, "steps": 1}
    found = fit(module, data, run, world, callbacks=[Forward(), HFExport()], **options)
    for unit in sharded_units(module.policy):
        unit.reshard()
    return {**found, "weights": weights(module)}


def failing_saves(folder: Path, world: int) -> Results:
    """A process fails at other moments of a save."""
    found = {}
    checkpoint = {"state_dict": {"a": torch.ones(1)}, "optimizer_states": [], "global_step": 1}
    for rank, name in ((0, "write_synced"), (1, "sync_folder"), (0, "write_manifest")):

        def fail(*args: Any) -> Any:
            raise OSError(28, "No space left on device")

        module = checkpoint_folder if name == "write_synced" else safe_checkpoint_io
        original = getattr(module, name)
        path = folder / "failing" / f"{name}.ckpt"
        if dist.get_rank() == rank:
            setattr(module, name, fail)
        try:
            SafeCheckpointIO().save_sharded(checkpoint, path)
        except OSError as error:
            found[name] = str(error)
        setattr(module, name, original)
        dist.barrier()
        found[f"{name} left"] = [each.name for each in path.parent.glob(f"{name}*.partial")]
    return found


class Gate:
    """Lets a number of writes of shards pass and holds the next one until it is opened."""

    def __init__(self, passes: int = 0) -> None:
        self.passes, self.event, self.write = passes, threading.Event(), FileSystemWriter.write_data
        self.before: Callable[[], None] = lambda: None

    def __enter__(self) -> "Gate":
        gate = self

        def write(writer: Any, *args: Any) -> Any:
            gate.before()
            gate.passes -= 1
            if gate.passes < 0 and not gate.event.wait(60):
                raise TimeoutError("nobody has opened the gate")
            return gate.write(writer, *args)

        FileSystemWriter.write_data = write  # type: ignore[method-assign]
        return self

    def __exit__(self, *args: object) -> None:
        FileSystemWriter.write_data = self.write  # type: ignore[method-assign]


class At(Callback):
    """Calls a function at the end of a step, before the checkpoint callback does anything."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self.act()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def in_background(folder: Path, world: int) -> Results:
    """Four steps, each saved; the second save cannot write anything before the third step has been taken."""
    run, found = folder / "in_background", Results()
    saves = Checkpoint(str(run), every_n_train_steps=1, async_save=True)

    with Gate(passes=1) as gate:

        def look() -> None:
            dist.barrier()
            found["while saving"] = names(run)
            if dist.get_rank() == 0:
                shutil.copytree(run, folder / "killed")
            dist.barrier()
            gate.event.set()

        def look_before() -> None:
            if gate.event.is_set() and "before the next save" not in found and (run / "step=2.ckpt").exists():
                found["before the next save"] = names(run)[:4]

        def keep() -> None:
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.copytree(run / "step=2.ckpt", folder / "saved_during_a_step" / "step=2.ckpt")
                shutil.copy(run / "step=2.ckpt.json", folder / "saved_during_a_step")

        gate.before = look_before
        original, paths = FSDP2Strategy.broadcast, []

        def broadcast(self: Any, value: Any, src: int = 0) -> Any:
            value = original(self, value, src)
            paths.extend([Path(value).name] if str(value).endswith(".ckpt") else [])
            return value

        FSDP2Strategy.broadcast = broadcast  # type: ignore[method-assign]
        module, data = remax(folder, optimizer=adam), prompts(folder, world)
        found |= fit(module, data, run, world, steps=4, callbacks=[At(3, look), At(4, keep), saves])
        FSDP2Strategy.broadcast = original  # type: ignore[method-assign]
    dist.barrier()
    return {**found, "paths": paths, "at the end": names(run)}


def from_background(folder: Path, world: int, name: str) -> Results:
    """The rest of the four steps, from the newest complete checkpoint in a folder."""
    module, data = remax(folder, optimizer=adam), prompts(folder, world)
    callbacks = [Checkpoint(str(folder / f"from_{name}"))]
    return fit(module, data, folder, world, steps=4, resume_from=folder / name, callbacks=callbacks)


def background_error(folder: Path, world: int) -> Results:
    """One rank cannot write its shards in the background."""
    run, message = folder / "background_error", ""

    def fail() -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")

    with Gate(passes=9) as gate:
        gate.before = fail
        try:
            saves = Checkpoint(str(run), every_n_train_steps=1, async_save=True)
            fit(remax(folder), prompts(folder, world), run, world, steps=2, callbacks=[saves])
        except OSError as error:
            message = str(error)
    dist.barrier()
    return {"message": message, "files": names(run)}


def awaited(folder: Path, world: int) -> Results:
    """What is there when training ends while a save is in the background, for three reasons to end."""
    found, opened = Results(), threading.Event()

    def stop() -> None:
        threading.Timer(1, opened.set).start()  # the save cannot end before the error
        raise KeyError("in a step")

    for name, steps, callback in (
        ("terminated", 9, SigtermToFirst()),
        ("raised", 9, At(3, stop)),
        ("ended", 2, Callback()),
    ):
        run = folder / "awaited" / name
        with Gate() as gate, suppress(SystemExit, KeyError):
            gate.event.set()
            gate.before = partial(opened.wait, 60) if name == "raised" else partial(time.sleep, 0.3)
            saves = Checkpoint(str(run), every_n_train_steps=2, async_save=True)
            own = trainer(run, world, steps=steps, callbacks=[callback, saves])
            own.fit(remax(folder), datamodule=prompts(folder, world))
        dist.barrier()
        found[name] = names(run)
    return found


def verifying(folder: Path, world: int) -> Results:
    """A folder of single files whose newest is damaged, and later all of them: what each rank verifies and reads."""
    copy, found = folder / "verifying" / "checkpoints", Results()
    if dist.get_rank() == 0:
        shutil.copytree(folder / "saving2_file" / "checkpoints", copy)
        os.truncate(copy / "step=6.ckpt", 1000)
    dist.barrier()
    original, verified = find_checkpoint.integrity_error, []

    def noted(path: Path, manifest: Any) -> str | None:
        verified.append(path.name)
        return original(path, manifest)

    find_checkpoint.integrity_error = noted
    saves = Checkpoint(str(copy))
    module = remax(folder, optimizer=adam)
    found["steps"] = len(
        fit(module, prompts(folder, world), folder, world, steps=6, resume_from="last", callbacks=[saves])["steps"]
    )
    found["verified"], found["read"] = list(verified), Path(saves.store.resumed_from).name
    find_checkpoint.integrity_error = original
    dist.barrier()
    if dist.get_rank() == 0:
        for path in copy.glob("*.ckpt"):
            remove(path)
            path.write_text("damaged")
    dist.barrier()
    try:
        trainer(folder, world, callbacks=[Checkpoint(str(copy))]).fit(
            remax(folder, optimizer=adam), datamodule=prompts(folder, world), ckpt_path="last"
        )
    except ValueError as error:
        found["message"] = str(error)
    found["flipped"] = flipped_bit(folder, world)
    saves = Checkpoint(str(folder / "flipped"))
    module = remax(folder, optimizer=adam)
    again = fit(module, prompts(folder, world), folder, world, steps=6, resume_from="last", callbacks=[saves])
    found["after a flipped bit"] = {**again, "read": Path(saves.store.resumed_from).name}
    return found


def flipped_bit(folder: Path, world: int) -> str:
    """What all ranks say of a folder in which one bit of a shard of rank 1 is flipped."""
    path = folder / "flipped" / "step=6.ckpt"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "saving2" / "checkpoints" / "step=6.ckpt", path)
        shutil.copy(folder / "saving2" / "checkpoints" / "step=6.ckpt.json", path.parent)
        shutil.copytree(folder / "saving2" / "checkpoints" / "step=3.ckpt", path.parent / "step=3.ckpt")
        shutil.copy(folder / "saving2" / "checkpoints" / "step=3.ckpt.json", path.parent)
        content = bytearray((path / "__1_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (path / "__1_0.distcp").write_bytes(content)
    dist.barrier()
    try:
        module, data = remax(folder, optimizer=adam), prompts(folder, world)
        trainer(folder, world).fit(module, datamodule=data, ckpt_path=path)
    except ValueError as error:
        return str(error)
    return ""


def agreed_rewards(folder: Path, world: int) -> Results:
    """Rewards of 0 in one process and of 1 in the other tell responses apart."""
    module = remax(folder, reward=FunctionReward("reward_functions.by_process"), kl_coef=0.0)
    return fit(module, prompts(folder, world), folder, world, steps=1, callbacks=[SelfCheck()])


def full_disk(folder: Path, world: int) -> Results:
    """One process cannot write the second checkpoint."""
    run, rank, message = folder / "full_disk", dist.get_rank(), ""
    own = trainer(run, world, steps=2, callbacks=[Checkpoint(str(run), every_n_train_steps=1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 1 and rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    own.callbacks.append(Limit())  # type: ignore[attr-defined]
    try:
        own.fit(remax(folder), datamodule=prompts(folder, world))
    except OSError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    return {"message": message, "files": sorted(path.name for path in run.iterdir())}


def refused(folder: Path, world: int) -> Results:
    """What the strategy says to what it cannot do."""
    found = {}
    for name, options in {
        "replicas": {"strategy": {"replicas": 3}},
        "offload": {"strategy": {"offload_frozen": True}},
        "precision": {"precision": "bf16-mixed"},
        "one_file": {
            "strategy": {"save_sharded": False},
            "callbacks": [Checkpoint(str(folder / "refused"), async_save=True)],
        },
        "plugin": {"plugins": [AsyncCheckpointIO()], "callbacks": [Checkpoint(str(folder / "refused"))]},
    }.items():
        try:
            trainer(folder, world, **options).fit(remax(folder), datamodule=prompts(folder, world))
        except ValueError as error:
            found[name] = str(error)
    other = Digested(train=str(folder / "prompts.jsonl"), batch_size=1)
    other.digest = f"rows{dist.get_rank()}"
    for name, rate, data in (("settings", dist.get_rank() / 4, prompts(folder, world)), ("rows", 0.0, other)):
        agreement = RankAgreement(
            {"model.init_args.kl_coef": rate, "data.init_args.train": f"/of/{dist.get_rank()}"}, data
        )
        try:
            trainer(folder, world, callbacks=[agreement]).fit(remax(folder), datamodule=data)
        except ValueError as error:
            found[name] = str(error)
    try:
        check_ranks_agree(f"run{dist.get_rank()}")
    except ValueError as error:
        found["paths"] = str(error)
    try:
        load_sharded(
            partial(load_reward_model, trained=True), ModelSource(path=str(folder / "policy")), sharding_of(world)
        )
    except ValueError as error:
        found["head"] = str(error)
    return found


def make(folder: Path) -> None:
    """Models and data of all scenarios."""
    tiny.save_model(folder / "policy")
    tiny.save_model(folder / "gpt2", "gpt2")
    tiny.save_reward_model(folder / "reward_model")
    for name, (model_type, options) in LOADED.items():
        tiny.save_model(folder / "loaded" / name, model_type, **options)
    shutil.copytree(folder / "loaded" / "llama", folder / "loaded" / "old_format")
    old = folder / "loaded" / "old_format" / "model.safetensors"
    torch.save(load_file(old), old.with_name("pytorch_model.bin"))
    old.unlink()
    load_language_model(ModelSource(path=str(folder / "policy"))).save_pretrained(
        folder / "loaded" / "in_parts", max_shard_size="20KB"
    )
    tiny.tokenizer().save_pretrained(folder / "loaded" / "in_parts")
    rows = [{"prompt": word, "gap": ""} for word in WORDS]
    tiny.write_rows(folder / "prompts.jsonl", rows)
    tiny.write_rows(folder / "held_out.jsonl", rows[:5])
    gaps = [{**row, "gap": "nan" if number in UNSCORED else ""} for number, row in enumerate(rows)]
    tiny.write_rows(folder / "gaps.jsonl", gaps)
    tiny.write_rows(
        folder / "demonstrations.jsonl", [{"prompt": "ab" * n, "response": " c" * (9 - n)} for n in range(1, 9)]
    )
    tiny.write_rows(
        folder / "preferences.jsonl",
        [{"prompt": "ab" * n, "chosen": "c" * (9 - n), "rejected": " d" * n} for n in range(1, 9)],
    )


def sibling(kind: Any, folder: Path, world: int, **options: Any) -> Results:
    values: dict[str, Any] = {
        "policy": ModelSource(path=str(folder / "policy")),
        "reward": ModelReward(str(folder / "reward_model")),
        "sampling": Sampling(max_new_tokens=10, num_samples=2),
        "kl_coef": 0.2,
        "micro_batch_size": 3,
        "optimizer": tiny.sgd(0.05),
    }
    return fit(kind(**{**values, **options}), prompts(folder, world), folder, world)


def reinforce(folder: Path, world: int) -> Results:
    """Baselines over the batch of all processes, and a weight of the KL that follows the KL of all of them."""
    control = KLControl(target=0.01, horizon=100)
    return sibling(Reinforce, folder, world, baseline="batch_mean", kl=control)


def rloo(folder: Path, world: int) -> Results:
    return sibling(RLOO, folder, world)


def ppo(folder: Path, world: int) -> Results:
    """Two trained models and several optimizer steps on a rollout, adapters on both."""
    return sibling(PPO, folder, world, num_epochs=2, lora=LoRA(rank=4))


FAULTS = (evaluated_last, failing_saves, agreed_rewards, in_background, background_error, awaited, interrupted)
BOTH = (
    full,
    lora,
    dropped,
    uneven,
    recomputed,
    replicated,
    tied,
    half,
    sft,
    reward_model,
    saving,
    reinforce,
    rloo,
    ppo,
)


def main(folder: Path) -> None:
    """Run all scenarios in this process, one of two; one process alone has run its own before."""
    found = {
        scenario.__name__: scenario(folder, 2)
        for scenario in (*BOTH, collectives, loading, broken, terminated, full_disk, refused, *FAULTS)
    }
    adapters = LoRA(rank=4)
    found["saving_lora"] = saving(folder, 2, adapters)
    found["saving_file"] = saving(folder, 2, strategy={"save_sharded": False})
    found["resumed"] = resumed(folder, 2, folder / "saving2" / "checkpoints" / "step=3.ckpt")
    found["resumed_lora"] = resumed(folder, 2, folder / "saving2_lora" / "checkpoints" / "step=3.ckpt", adapters)
    found["resumed_from_one"] = resumed(folder, 2, folder / "saving1" / "checkpoints" / "step=3.ckpt")
    for name in ("killed", "saved_during_a_step"):
        found[name] = from_background(folder, 2, name)
    found["from_error"] = from_background(folder, 2, "interrupted/error/checkpoints")
    found["verifying"] = verifying(folder, 2)
    torch.save(found, folder / f"result{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
