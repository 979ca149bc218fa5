"""What a plan has to know of a run, read from its parsed configuration; nothing is instantiated."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from remax_lightning.models.lora import LoRA
from remax_lightning.models.source import ModelSource
from remax_lightning.plan.models import Optimizer
from remax_lightning.rollout.types import Sampling

Method = Literal["ReMax", "PolicyGradientModule", "SFT", "RewardModel"]
METHODS: tuple[Method, ...] = ("ReMax", "PolicyGradientModule", "SFT", "RewardModel")


@dataclass(frozen=True)
class Layout:
    """How a run is spread over GPUs and in which types it computes.

    Args:
        gpus: Number of GPUs.
        strategy: ``one`` GPU, ``ddp`` with all on each, or ``fsdp2`` with everything split.
        shards: GPUs that one copy of the parameters is split over.
        itemsize: Bytes of a number in the computation of ``fsdp2``.
        autocast: Weights in float32, computation under bfloat16 autocast.
        offload_frozen: Frozen models are in host memory while they are not used.
        sync_every_micro_batch: Gradients are split after each micro-batch, not once a step.
        has_buckets: DDP keeps a second copy of the gradients, which it sends.
    """

    gpus: int
    strategy: Literal["one", "ddp", "fsdp2"] = "one"
    shards: int = 1
    itemsize: int = 4
    autocast: bool = False
    offload_frozen: bool = False
    sync_every_micro_batch: bool = False
    has_buckets: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 splits the models."""
        return self.strategy == "fsdp2"


@dataclass(frozen=True)
class Scorer:
    """A reward by a model.

    Args:
        source: The model.
        name: Its argument in the configuration.
        batch_size: Conversations scored at once.
        max_length: Longest conversation, tokens; None for no limit.
        label: As in ModelReward.
    """

    source: ModelSource
    name: str
    batch_size: int
    max_length: int | None
    label: int | None


@dataclass(frozen=True)
class Recipe:
    """A run.

    Args:
        method: What is trained and how.
        name: Name of the module's class.
        source: The model that is trained.
        optimizer: What trains it.
        layout: How it is spread over GPUs.
        batch_size: Prompts, demonstrations or pairs of one GPU's step.
        prompt_length: Longest prompt, tokens.
        length: Longest sequence, tokens.
        micro_batch_size: Rows of a pass, at most.
        micro_batch_tokens: Tokens of a pass, at most.
        activation_checkpointing: Whether blocks compute their activations again.
        lora: Adapters that are trained in place of the weights.
        sampling: How responses are drawn.
        scorers: Rewards by models, the one that trains first.
        has_reference: Whether there is a KL penalty.
        reference: The reference's own source, if it is not the policy as it starts.
        keeps_cache: Whether key-value caches outlive a rollout.
        has_engine: Whether the embedded engine draws the responses.
        trains_value: Whether a value model is trained too.
    """

    method: Method
    name: str
    source: ModelSource
    optimizer: Optimizer
    layout: Layout
    batch_size: int
    prompt_length: int
    length: int
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    activation_checkpointing: bool = False
    lora: LoRA | None = None
    sampling: Sampling = Sampling(max_new_tokens=1)  # noqa: RUF009 (it is frozen)
    scorers: tuple[Scorer, ...] = ()
    has_reference: bool = False
    reference: ModelSource | None = None
    keeps_cache: bool = False
    has_engine: bool = True
    trains_value: bool = False

    @property
    def has_rollouts(self) -> bool:
        """Whether the model responds to prompts while it is trained."""
        return self.method in ("ReMax", "PolicyGradientModule")

    @property
    def learned_rows(self) -> int:
        """Rows (responses, demonstrations, pairs) that one GPU learns from in a step, at most."""
        return self.batch_size * (self.sampling.num_samples if self.has_rollouts else 1)

    @property
    def decoded_rows(self) -> int:
        """Rows that one GPU decodes together."""
        return self.learned_rows + (self.batch_size if self.method == "ReMax" else 0)

    @property
    def micro_rows(self) -> int:
        """Rows of the largest micro-batch, when all are of full length."""
        size = self.learned_rows if self.micro_batch_size is None else min(self.micro_batch_size, self.learned_rows)
        if self.micro_batch_tokens is None:
            return size
        row = self.length * (2 if self.method == "RewardModel" else 1)
        return max(min(size, self.micro_batch_tokens // row), 1)

    @property
    def num_passes(self) -> int:
        """Micro-batches of a step."""
        return -(-self.learned_rows // self.micro_rows)


def read(config: Mapping[str, Any], gpus: int) -> Recipe:
    """The run that a configuration describes.

    Args:
        config: The parsed configuration, as nested dictionaries.
        gpus: Number of GPUs.

    Raises:
        ValueError: If it is of a kind whose memory is not known.
    """
    module, data = config["model"]["init_args"], config["data"]["init_args"]
    ancestors = _ancestors(config["model"]["class_path"])
    method = next((each for each in METHODS if each in ancestors), None)
    if method is None:
        raise ValueError(f"plan knows modules that are built on {', '.join(METHODS)}, got {ancestors[0]}")
    layout = read_layout(config["trainer"], gpus)
    source = _source(module["model" if method == "RewardModel" else "policy"])
    if source.quantization is not None:
        raise ValueError(f"plan does not know what weights in {source.quantization} take; set quantization to null")
    if config["trainer"]["precision"] == "bf16-true":
        source = replace(source, dtype="bfloat16")
    recipe = Recipe(
        method=method,
        name=ancestors[0],
        source=source,
        optimizer=_optimizer(module["optimizer"]),
        layout=layout,
        batch_size=data["batch_size"],
        prompt_length=data["max_prompt_length"],
        length=data.get("max_length", 0),
        micro_batch_size=module["micro_batch_size"],
        micro_batch_tokens=module["micro_batch_tokens"],
        activation_checkpointing=module.get("activation_checkpointing", False),
        lora=None if module.get("lora") is None else LoRA(**module["lora"]),
        trains_value="PPO" in ancestors,
    )
    return _with_rollouts(recipe, module) if recipe.has_rollouts else recipe


def _with_rollouts(recipe: Recipe, module: Mapping[str, Any]) -> Recipe:
    sampling, engine = Sampling(**module["sampling"]), module.get("engine") or {"class_path": "TransformersEngine"}
    is_embedded = engine["class_path"].endswith("TransformersEngine")
    longest = max(sampling.max_new_tokens, module.get("greedy_max_new_tokens") or 0)
    return replace(
        recipe,
        sampling=replace(sampling, max_new_tokens=longest),
        length=recipe.prompt_length + longest,
        scorers=tuple(scorer for name in ("reward", "judge") for scorer in _scorers(module.get(name), f"model.{name}")),
        has_reference=module["kl_coef"] > 0,
        reference=None if module.get("reference") is None else _source(module["reference"]),
        has_engine=is_embedded,
        keeps_cache=is_embedded and bool((engine.get("init_args") or {}).get("compile")),
    )


def read_layout(trainer: Mapping[str, Any], gpus: int) -> Layout:
    """How a trainer would spread a run over GPUs.

    Raises:
        ValueError: If the strategy or the precision is not one whose memory is known.
    """
    strategy = trainer["strategy"]
    given: Mapping[str, Any] = strategy if isinstance(strategy, Mapping) else {"class_path": strategy}
    name, arguments = given["class_path"].rpartition(".")[2], given.get("init_args") or {}
    autocast = _autocast(trainer["precision"])
    if name in ("fsdp2", "FSDP2Strategy"):
        replicas = arguments.get("replicas", 1)
        if gpus % replicas:
            raise ValueError(f"replicas must divide the number of GPUs, {gpus}, got replicas={replicas}")
        if autocast or trainer["precision"] == "bf16-true":
            raise ValueError(f"under fsdp2 trainer.precision must be 32-true, got {trainer['precision']}")
        return Layout(
            gpus,
            "fsdp2",
            shards=gpus // replicas,
            itemsize=4 if arguments.get("compute_dtype") == "float32" else 2,
            offload_frozen=arguments.get("offload_frozen", False),
            sync_every_micro_batch=arguments.get("sync_every_micro_batch", False),
        )
    if name == "auto" and gpus == 1:
        return Layout(gpus, autocast=autocast)
    if name == "auto" or name.startswith(("ddp", "DDP")):
        return Layout(gpus, "ddp", autocast=autocast, has_buckets=not arguments.get("gradient_as_bucket_view", False))
    raise ValueError(f"plan knows the strategies auto, ddp and fsdp2, got {name}")


def _autocast(precision: object) -> bool:
    if precision in (None, 32, "32", "32-true", "bf16-true"):
        return False
    if precision in ("bf16", "bf16-mixed"):
        return True
    raise ValueError(f"plan knows the precisions 32-true, bf16-mixed and bf16-true, got {precision}")


def _optimizer(value: Any) -> Optimizer:
    """The optimizer as it is configured, or as the default of a module makes it."""
    if not callable(value):
        return Optimizer(value["class_path"], value.get("init_args") or {})
    made = value([nn.Parameter(torch.empty(1, device="meta"))])
    accepted = inspect.signature(type(made)).parameters
    arguments = {name: each for name, each in made.defaults.items() if name in accepted}
    return Optimizer(f"{type(made).__module__}.{type(made).__name__}", arguments)


def _ancestors(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return [each.__name__ for each in getattr(importlib.import_module(module), name).__mro__]


def _source(values: Mapping[str, Any]) -> ModelSource:
    return ModelSource(**values)


def _scorers(value: Any, name: str) -> Iterator[Scorer]:
    """All rewards by a model in a part of a configuration."""
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _scorers(each, f"{name}.{number}")
    if not isinstance(value, Mapping):
        return
    if str(value.get("class_path", "")).endswith("ModelReward"):
        own = {key: each for key, each in value["init_args"].items() if key in ModelSource.__dataclass_fields__}
        own["tokenizer"] = own.get("tokenizer") or own["path"]
        arguments = value["init_args"]
        yield Scorer(ModelSource(**own), name, arguments["batch_size"], arguments["max_length"], arguments.get("label"))
        return
    for key, each in value.items():
        yield from _scorers(each, name if key == "init_args" else f"{name}.{key}")
