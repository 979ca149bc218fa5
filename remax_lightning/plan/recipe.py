"""What a plan has to know of a run, read from its parsed configuration; no module is built."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from remax_lightning.models.lora import LoRA
from remax_lightning.models.source import ModelSource
from remax_lightning.plan.models import ModelSpec, Optimizer, import_class
from remax_lightning.rollout.types import Sampling
from remax_lightning.supported import check_supported


@dataclass(frozen=True)
class Layout:
    """How a run is spread over GPUs and in which types it computes.

    Args:
        gpus: Number of GPUs.
        shards: GPUs that one copy of the parameters is sharded over.
        itemsize: Bytes of a number in the computation under FSDP2; None without.
        autocast: Weights in float32, computation under bfloat16 autocast.
        offload_frozen: Frozen models are in host memory while they are not used.
        sync_every_micro_batch: Gradients are reduced to shards after each micro-batch, not once a step.
        has_buckets: DDP has a second copy of the gradients, which it sends.
    """

    gpus: int
    shards: int = 1
    itemsize: int | None = None
    autocast: bool = False
    offload_frozen: bool = False
    sync_every_micro_batch: bool = False
    has_buckets: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards the models."""
        return self.itemsize is not None


@dataclass(frozen=True)
class Scorer:
    """A reward by a model.

    Args:
        spec: The model.
        batch_size: Conversations scored at once.
        max_length: Longest conversation, tokens; None for no limit.
    """

    spec: ModelSpec
    batch_size: int
    max_length: int | None


@dataclass(frozen=True)
class Recipe:
    """A run.

    Args:
        name: Name of the module's class.
        model: What is trained; pairs are learned from if it has a scalar head.
        optimizer: What trains it.
        layout: How it is spread over GPUs.
        batch_size: Prompts, demonstrations or pairs of one GPU's step.
        prompt_length: Longest prompt, tokens.
        length: Longest sequence, tokens.
        micro_batch_size: Rows of a pass, at most.
        micro_batch_tokens: Tokens of a pass, at most.
        sampling: How responses are drawn; None if none are drawn in training.
        decodes_greedy: Whether each prompt has a greedy response beside the sampled ones.
        engine: What draws the responses: the embedded engine, the same with a cache that outlives the rollout, or
            another one, whose memory is not counted.
        scorers: Rewards by models, the one that trains first.
        has_reference: Whether there is a KL penalty.
        reference: The reference, if it is not the policy as it starts.
        trains_value: Whether a value model is trained too.
    """

    name: str
    model: ModelSpec
    optimizer: Optimizer
    layout: Layout
    batch_size: int
    prompt_length: int
    length: int
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    sampling: Sampling | None = None
    decodes_greedy: bool = False
    engine: Literal["embedded", "compiled", "other"] = "embedded"
    scorers: tuple[Scorer, ...] = ()
    has_reference: bool = False
    reference: ModelSpec | None = None
    trains_value: bool = False

    @property
    def learned_rows(self) -> int:
        """Rows (responses, demonstrations, pairs) that one GPU learns from in a step, at most."""
        return self.batch_size * (1 if self.sampling is None else self.sampling.num_samples)

    @property
    def decoded_rows(self) -> int:
        """Rows that one GPU decodes together."""
        return self.learned_rows + (self.batch_size if self.decodes_greedy else 0)

    @property
    def learned_length(self) -> int:
        """Last positions of a row that are learned from, at most."""
        return self.length - 1 if self.sampling is None else self.sampling.max_new_tokens

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of full length; a pair has two sequences."""
        return self.length * (2 if self.model.is_scalar else 1)

    @property
    def micro_rows(self) -> int:
        """Rows of the largest micro-batch, when all are of full length."""
        size = self.learned_rows if self.micro_batch_size is None else min(self.micro_batch_size, self.learned_rows)
        return (
            size if self.micro_batch_tokens is None else max(min(size, self.micro_batch_tokens // self.row_tokens), 1)
        )

    @property
    def num_passes(self) -> int:
        """Micro-batches of a step."""
        return -(-self.learned_rows // self.micro_rows)


def read(config: Mapping[str, Any], gpus: int) -> Recipe:
    """The run that a configuration describes.

    A module is known by its arguments: ``model`` is trained on pairs, ``policy`` on responses if there is a ``reward``
    and on demonstrations otherwise, and a ``value_model`` is trained beside it.

    Args:
        config: The parsed configuration, as nested dictionaries, with the defaults of all arguments.
        gpus: Number of GPUs.

    Raises:
        ValueError: If it is of a kind whose memory is not known.
    """
    module, data = config["model"]["init_args"], config["data"]["init_args"]
    module_class = import_class(config["model"]["class_path"])
    trained = next((name for name in ("model", "policy") if name in module), None)
    if trained is None:
        raise ValueError(f"plan knows modules that train a policy or a model, got {module_class.__name__}")
    layout = read_layout(config["trainer"], gpus)
    model = ModelSpec(
        _source(module[trained]),
        f"model.{trained}",
        is_scalar=trained == "model",
        is_trained=True,
        is_checkpointed=module.get("activation_checkpointing", False),
        lora=None if module.get("lora") is None else LoRA(**module["lora"]),
    )
    if model.source.quantization is not None:
        raise ValueError(f"plan does not know what weights in {model.source.quantization} take; set it to null")
    recipe = Recipe(
        name=module_class.__name__,
        model=model,
        optimizer=_optimizer(module["optimizer"]),
        layout=layout,
        batch_size=data["batch_size"],
        prompt_length=data["max_prompt_length"],
        length=data.get("max_length", 0),
        micro_batch_size=module["micro_batch_size"],
        micro_batch_tokens=module["micro_batch_tokens"],
    )
    is_online = trained == "policy" and "reward" in module
    return _with_rollouts(recipe, module, module_class.decodes_greedy) if is_online else recipe


def _with_rollouts(recipe: Recipe, module: Mapping[str, Any], decodes_greedy: bool) -> Recipe:
    sampling, engine = Sampling(**module["sampling"]), module.get("engine") or {"class_path": "TransformersEngine"}
    is_compiled = (engine.get("init_args") or {}).get("compile", False)
    longest = max(sampling.max_new_tokens, module.get("greedy_max_new_tokens") or 0)
    reference = module.get("reference")
    return replace(
        recipe,
        sampling=replace(sampling, max_new_tokens=longest),
        decodes_greedy=decodes_greedy,
        engine="other" if _name(engine) != "TransformersEngine" else "compiled" if is_compiled else "embedded",
        length=recipe.prompt_length + longest,
        scorers=tuple(scorer for name in ("reward", "judge") for scorer in _scorers(module.get(name), f"model.{name}")),
        has_reference=module["kl_coef"] > 0,
        reference=None if reference is None else ModelSpec(_source(reference), "model.reference"),
        trains_value="value_model" in module,
    )


def read_layout(trainer: Mapping[str, Any], gpus: int) -> Layout:
    """How a trainer would spread a run over GPUs.

    Raises:
        ValueError: If the strategy or the precision is refused, or does not fit the number of GPUs.
    """
    strategy = trainer["strategy"]
    given: Mapping[str, Any] = strategy if isinstance(strategy, Mapping) else {"class_path": strategy}
    arguments = given.get("init_args") or {}
    kind, precision = check_supported(_name(given), trainer["precision"])
    if kind == "fsdp2":
        replicas = arguments.get("replicas", 1)
        if gpus % replicas:
            raise ValueError(f"replicas must divide the number of GPUs, {gpus}, got replicas={replicas}")
        return Layout(
            gpus,
            shards=gpus // replicas,
            itemsize=4 if arguments.get("compute_dtype") == "float32" else 2,
            offload_frozen=arguments.get("offload_frozen", False),
            sync_every_micro_batch=arguments.get("sync_every_micro_batch", False),
        )
    is_ddp = kind == "ddp" or gpus > 1
    has_buckets = is_ddp and not arguments.get("gradient_as_bucket_view", False)
    return Layout(gpus, autocast=precision == "bf16-mixed", has_buckets=has_buckets)


def _name(given: Mapping[str, Any]) -> str:
    """Short name of a class in a configuration."""
    return str(given["class_path"]).rpartition(".")[2]


def _source(given: Mapping[str, Any] | str) -> ModelSource:
    return ModelSource(path=given) if isinstance(given, str) else ModelSource(**given.get("init_args", given))


def _optimizer(given: Any) -> Optimizer:
    """The optimizer as it is configured, or as the default of a module makes it."""
    if not callable(given):
        return Optimizer(given["class_path"], given.get("init_args") or {})
    default = given([nn.Parameter(torch.empty(1, device="meta"))])
    accepted = inspect.signature(type(default)).parameters
    arguments = {name: value for name, value in default.defaults.items() if name in accepted}
    return Optimizer(f"{type(default).__module__}.{type(default).__name__}", arguments)


def _scorers(given: Any, name: str) -> Iterator[Scorer]:
    """All rewards by a model in a part of a configuration, however they are combined."""
    if isinstance(given, Mapping) and _name({"class_path": "", **given}) == "ModelReward":
        arguments = given["init_args"]
        source = ModelSource(**{key: arguments[key] for key in ModelSource.__dataclass_fields__ if key in arguments})
        spec = ModelSpec(source, name, is_scalar=True, label=arguments["label"])
        yield Scorer(spec, arguments["batch_size"], arguments["max_length"])
    elif isinstance(given, Mapping):
        for key, value in given.items():
            yield from _scorers(value, name if key == "init_args" else f"{name}.{key}")
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from _scorers(value, f"{name}.{number}")
