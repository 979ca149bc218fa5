"""Decoding and whole ReMax steps on one GPU, for Llamas of about 0.5B, 1.5B and 7B parameters with random weights.

Prompts and responses of 256 tokens each, no stop token, no reward, no data, no trainer; each case in a process of its
own, so that its peak memory is its own. Without a GPU everything runs at toy size on the CPU, except CUDA graphs: the
step that is compiled there runs without code generation. Toy figures say nothing about a GPU.

Decoding, in bf16: milliseconds for one more token of the sampled and of the greedy response to each prompt, in two
passes or in one, from the difference between a full and a one-token rollout. The floor is the time to read the weights
and, at the mean length, the keys and values of all these rows once, at the bandwidth that a large copy reaches. First
rollout is what the first call takes longer than a later one: mostly compiling.

Steps, under bf16 autocast: rollout, reference and update with the fused head in micro-batches of constant tokens.
``adamw``: fp32 weights and AdamW, a bf16 copy as the reference. ``lora``: bf16 weights, adapters of rank 16 on the
attention projections; the policy without them is the reference. ``adamw8bit``: bf16 weights and gradients, states in 8
bits by torchao or bitsandbytes. Compiling and the optimizer's state fall into a warm-up step, which is not timed.

``--method ReMax PPO`` takes the steps of PPO as well, with one epoch of one minibatch: no greedy responses, but a value
model of the same size, trained in the same way, on the same prompts.

    python benchmarks/gpu.py --size 0.5B --output benchmarks/results/gpu.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import peak_mib
from machine import machine
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from scaling import KL_COEF, add_gradients, micro_batches, reference_log_probs
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
)

from remax_lightning.functional import clipped_policy_loss, generalized_advantages, kl_token_rewards, value_loss
from remax_lightning.models.head import plain_head
from remax_lightning.models.language_model import frozen_copy
from remax_lightning.models.next_token import log_probs_of
from remax_lightning.models.scalar_model import token_values
from remax_lightning.modules.ppo import ValuedRollout
from remax_lightning.rollout import Rollout, Sampling, TransformersEngine, next_logits


@dataclass(frozen=True)
class Size:
    """A model, its widths (hidden, intermediate, vocabulary) and counts (layers, heads, key heads); how to train it."""

    widths: tuple[int, int, int]
    counts: tuple[int, int, int]
    is_tied: bool
    prompts: int
    optimizers: tuple[str, ...]
    is_checkpointed: bool = True

    def config(self) -> LlamaConfig:
        """The configuration in transformers."""
        widths = dict(zip(("hidden_size", "intermediate_size", "vocab_size"), self.widths, strict=True))
        counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        widths |= dict(zip(counts, self.counts, strict=True))
        ends = {"bos_token_id": None, "eos_token_id": None}
        return LlamaConfig(**widths, tie_word_embeddings=self.is_tied, max_position_embeddings=4096, **ends)


SIZES = {
    "toy": Size((64, 128, 512), (2, 4, 2), True, 4, ("adamw", "lora", "adamw8bit")),
    "0.5B": Size((896, 4864, 151936), (24, 14, 2), True, 64, ("adamw",), is_checkpointed=False),
    "1.5B": Size((1536, 8960, 151936), (28, 12, 2), True, 32, ("adamw",)),
    "7B": Size((3584, 18944, 152064), (28, 28, 4), False, 16, ("lora", "adamw8bit")),
}
DECODERS = ("transformers, two passes", "engine, two passes", "engine, joint", "engine, joint, compiled")
EIGHT_BIT = {"torchao": "torchao.optim", "bitsandbytes": "bitsandbytes.optim"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Batch = dict[str, Tensor]


def build(size: Size, case: dict[str, Any], dtype: torch.dtype) -> tuple[PreTrainedModel, Batch]:
    """Model and prompts on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(size.config(), dtype=dtype)
        ids = torch.randint(0, model.config.vocab_size, (case["prompts"], case["prompt_length"]))
        index = torch.arange(len(ids))
    return model, {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids).bool(), "prompt_index": index}


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of the device, on a CPU those of the process."""
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if DEVICE == "cuda" else (time.process_time, lambda: None)
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


def device_peak_mib() -> float:
    """Peak memory of the device's allocator, on a CPU that of the process, MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else peak_mib()


def bandwidth() -> float:
    """Bytes read and written in a second by the fastest of ten copies."""
    source = torch.zeros(2**30 if DEVICE == "cuda" else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.ones_like(source)
    return 2 * len(source) / min(seconds_of(lambda: target.copy_(source)) for _ in range(10))


def floor_bytes(model: PreTrainedModel, case: dict[str, Any]) -> int:
    """Bytes that a step of two rows a prompt has to read: weights, and keys and values at the mean length."""
    config, weights = model.config, sum(each.numel() for each in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    each_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    mean_length = case["prompt_length"] + case["response_length"] // 2
    return model.dtype.itemsize * (weights + each_token * mean_length * 2 * case["prompts"])


def decoder(name: str, model: PreTrainedModel, batch: Batch) -> Callable[[int], Any]:
    """Sampled and greedy responses of a length."""
    engine, stops = TransformersEngine(compile=name.endswith("compiled")), [model.config.vocab_size]

    def by_engine(length: int) -> None:
        for _ in range(2 if "two passes" in name else 1):
            decode = engine.sample_and_greedy if "joint" in name else engine.sample
            decode(model, batch, Sampling(length), stop_token_ids=stops)

    def by_transformers(length: int) -> None:
        for sampling in ({"do_sample": True, "top_k": 0, "top_p": 1.0}, {"do_sample": False}):
            config = GenerationConfig(max_new_tokens=length, eos_token_id=stops, pad_token_id=0, **sampling)
            model.generate(batch["prompt_ids"], attention_mask=batch["prompt_mask"].long(), generation_config=config)

    return by_transformers if name.startswith("transformers") else by_engine


@torch.no_grad()
def decode(case: dict[str, Any]) -> dict[str, Any]:
    """Time of a decoding step against its floor, milliseconds."""
    model, batch = build(SIZES[case["size"]], case, torch.bfloat16)
    generate, length = decoder(case["way"], model.eval(), batch), case["response_length"]
    first = seconds_of(lambda: generate(length))
    prefill, whole = (min(seconds_of(lambda n=n: generate(n)) for _ in range(3)) for n in (1, length))
    peak, speed = device_peak_mib(), bandwidth()
    return {
        "step_ms": 1e3 * (whole - prefill) / (length - 1),
        "floor_ms": 1e3 * floor_bytes(model, case) / speed,
        "first_rollout_seconds": first - whole,
        "copy_gb_per_s": speed / 1e9,
        "peak_mib": peak,
    }


@dataclass
class State:
    """What a step works on.

    Args:
        policy: What is trained.
        reference: None if it is the policy without its adapters.
        value: The value model of PPO.
        optimizer: Of policy and value model.
        batch: Prompts.
    """

    policy: Any
    reference: PreTrainedModel | None
    value: Any
    optimizer: torch.optim.Optimizer
    batch: Batch

    @property
    def models(self) -> list[Any]:
        """All that is trained."""
        return [self.policy] if self.value is None else [self.policy, self.value]


def trained(case: dict[str, Any]) -> State:
    """The models of a case with their optimizer, and prompts."""
    size, kind = SIZES[case["size"]], case["optimizer"]
    dtype = torch.float32 if kind == "adamw" else torch.bfloat16
    policy, batch = build(size, case, dtype)
    value = value_model(size, dtype) if case["method"] == "PPO" else None
    reference = None if kind == "lora" else frozen_copy(policy).bfloat16()
    policy, value = (None if each is None else trainable(each, size, kind) for each in (policy, value))
    state = State(policy, reference, value, None, batch)
    parameters = [each for model in state.models for each in model.parameters() if each.requires_grad]
    state.optimizer = optimizer_class(kind)(parameters, lr=1e-6)
    return state


def value_model(size: Size, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a size with a scalar head."""
    config = size.config()
    config.num_labels, config.pad_token_id, config.use_cache = 1, 0, False
    with torch.device(DEVICE):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def trainable(model: PreTrainedModel, size: Size, kind: str) -> Any:
    """A model ready to be trained, with adapters or as it is."""
    if size.is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules=[f"{name}_proj" for name in "qkvo"]))
    return model.train()


def optimizer_class(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, with its states in 8 bits if asked for."""
    if kind != "adamw8bit":
        return torch.optim.AdamW
    module = next(module for package, module in EIGHT_BIT.items() if find_spec(package))
    return __import__(module, fromlist=["AdamW8bit"]).AdamW8bit


@torch.no_grad()
def expected_values(value: Any, rollout: Rollout, tokens: int) -> Tensor:
    """What the value model expects before each response token, (B, T), in micro-batches."""
    parts = micro_batches(rollout, tokens)
    return torch.cat([part.at_tokens(token_values(value, *part.sequences())) for part in parts])


def add_ppo_gradients(state: State, rollout: Rollout, tokens: int) -> None:
    """The gradients of both losses of PPO, in micro-batches."""
    mask, pair = rollout.response_mask, (rollout.log_probs, rollout.ref_log_probs)
    rewards = kl_token_rewards(rollout.rewards, mask, *pair, kl_coef=KL_COEF)
    _, returns = generalized_advantages(rewards, rollout.values, mask, gamma=1.0, gae_lambda=0.95)
    num_tokens = mask.sum()
    for part in micro_batches(replace(rollout, returns=returns), tokens):
        every = part.response_mask[part.response_mask]
        old, values, goals = (each[part.response_mask] for each in (part.log_probs, part.values, part.returns))
        log_probs = log_probs_of(state.policy, *part.sequences())
        clip = {"clip_range": 0.2, "num_tokens": num_tokens}
        clipped_policy_loss(log_probs, old, goals - values, every, **clip)[0].backward()
        value_loss(token_values(state.value, *part.sequences()), values, goals, every, **clip).backward()


def take_step(state: State) -> None:
    """Clip the gradients of each model, step, and drop them."""
    for model in state.models:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()


def one_step(case: dict[str, Any], engine: TransformersEngine, state: State) -> dict[str, float]:
    """Seconds of each phase of a step."""
    policy, reference, tokens, made = state.policy, state.reference, case["micro_batch_tokens"], {}

    def rollout() -> None:
        arguments = (policy, state.batch, Sampling(case["response_length"]))
        stops = [policy.config.vocab_size]
        if state.value is None:
            made["samples"], _ = engine.sample_and_greedy(*arguments, stop_token_ids=stops)
        else:
            made["samples"] = engine.sample(*arguments, stop_token_ids=stops)

    def score() -> None:
        with policy.disable_adapter() if reference is None else nullcontext():
            ref_log_probs = reference_log_probs(reference or policy, made["samples"], tokens)
        rewards, baselines = torch.randn(2, len(ref_log_probs), device=DEVICE)
        made["rollout"] = made["samples"].scored(rewards, baselines, ref_log_probs)

    def expect() -> None:
        values = expected_values(state.value, made["rollout"], tokens)
        made["rollout"] = ValuedRollout(**vars(made["rollout"]), values=values, returns=torch.zeros_like(values))

    def update() -> None:
        if state.value is None:
            add_gradients(policy, made["rollout"], tokens)
        else:
            add_ppo_gradients(state, made["rollout"], tokens)

    seconds = {"values": 0.0}
    with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):  # as Lightning has it
        seconds["rollout"], seconds["reference"] = seconds_of(rollout), seconds_of(score)
        if state.value is not None:
            seconds["values"] = seconds_of(expect)
        seconds["update"] = seconds_of(update)
    seconds["update"] += seconds_of(lambda: take_step(state))
    return seconds


def step(case: dict[str, Any]) -> dict[str, Any]:
    """The faster of two steps after a warm-up."""
    state, engine = trained(case), TransformersEngine(compile=case["way"] == "compiled")
    assert plain_head(state.policy) is not None, "the head of this policy is not fused"
    phases = min([one_step(case, engine, state) for _ in range(3)][1:], key=lambda each: sum(each.values()))
    return {**phases, "prompts_per_second": case["prompts"] / sum(phases.values()), "peak_mib": device_peak_mib()}


@cache
def traced_step(device_type: str) -> Callable[..., Tensor]:
    """The decoding step as the compiler sees it, without its code generation, which would take the toy minutes."""
    return torch.compile(next_logits.decoding_step, backend="eager")


def work(case: dict[str, Any]) -> dict[str, Any]:
    """The figures of a case."""
    if DEVICE == "cpu":
        next_logits.compiled_step = traced_step
    return decode(case) if case["kind"] == "decode" else step(case)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """A case in a process of its own; one that fails says why."""
    with ProcessPoolExecutor(1, get_context("spawn" if DEVICE == "cuda" else "fork")) as pool:
        try:
            return {**case, **pool.submit(work, case).result()}
        except Exception as error:
            print(f"{case} failed: {error}")
            return {**case, "failure": type(error).__name__}


def cases_of(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of a size."""
    size, (prompt_length, response_length) = SIZES[name], (16, 8) if name == "toy" else (256, 256)
    shared = {"size": name, "prompts": arguments.prompts or size.prompts, "prompt_length": prompt_length}
    shared |= {"response_length": response_length, "micro_batch_tokens": arguments.micro_batch_tokens}
    cases: list[dict[str, Any]] = [{"kind": "decode", **shared, "way": way} for way in DECODERS]
    for optimizer in size.optimizers:
        if optimizer != "adamw8bit" or any(map(find_spec, EIGHT_BIT)):
            steps = [(method, way) for method in arguments.method for way in ("eager", "compiled")]
            step = {"kind": "step", **shared, "optimizer": optimizer}
            cases += [{**step, "method": method, "way": way} for method, way in steps]
        else:
            print(f"{name}, adamw8bit: left out, since neither {' nor '.join(EIGHT_BIT)} is installed")
    return cases


def table(cases: list[dict[str, Any]], kind: str, columns: tuple[str, ...]) -> Table:
    """The figures of the cases of a kind."""
    result = Table("size", "prompts", "way", *columns, title=kind)
    for case in (each for each in cases if each["kind"] == kind):
        way = " ".join(filter(None, (case.get("method"), case.get("optimizer"), case["way"])))
        figures = (f"{case[name]:.2f}" if name in case else "failed" for name in columns)
        result.add_row(case["size"], str(case["prompts"]), way, *figures)
    return result


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = list(SIZES)[1:] if DEVICE == "cuda" else ["toy"]
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=default)
    parser.add_argument("--method", nargs="+", choices=["ReMax", "PPO"], default=["ReMax"], help="whose steps to take")
    parser.add_argument("--prompts", type=int, help="prompts of a step; the default depends on the size")
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    if DEVICE == "cpu":
        print("No GPU: these figures show that the script runs and say nothing about a GPU.")
    cases = [run(case) for name in arguments.size for case in cases_of(name, arguments)]
    Console().print(
        table(cases, "decode", ("step_ms", "floor_ms", "copy_gb_per_s", "first_rollout_seconds", "peak_mib"))
    )
    Console().print(
        table(cases, "step", ("rollout", "reference", "values", "update", "prompts_per_second", "peak_mib"))
    )
    result = {"name": "gpu", "command": " ".join(["python", *sys.argv]), **machine(), "device": device, "cases": cases}
    print(json.dumps(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
