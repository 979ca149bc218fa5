"""Sampled and greedy responses of 16 prompts: two calls of transformers' ``generate`` against the embedded engine.

A Llama with random weights (hidden 256, 4 layers), prompts of 32 to 64 tokens, 128 new tokens. In the mixed cases one
token in 32 ends a response. In the floor cases the peer is no decoder: it does only the matrix products of the same
shapes, linear layers and attention, with nothing between them, so that the ratio is the part of our time they take.

    python benchmarks/rollout.py --output benchmarks/results/rollout.json
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from harness import argument_parser, conclude, contend, measure, one_thread
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from remax_lightning.functional.sequence import left_pad
from remax_lightning.rollout import Sampling, TransformersEngine

CASES = [
    {"name": "equal 8k", "vocabulary": 8192, "prompts": 16, "mixed": False},
    {"name": "mixed 8k", "vocabulary": 8192, "prompts": 16, "mixed": True},
    {"name": "equal 50k", "vocabulary": 50304, "prompts": 16, "mixed": False},
    {"name": "mixed 50k", "vocabulary": 50304, "prompts": 16, "mixed": True},
    {"name": "equal 8k, 1 prompt", "vocabulary": 8192, "prompts": 1, "mixed": False},
    {"name": "equal 8k, 4 prompts", "vocabulary": 8192, "prompts": 4, "mixed": False},
    {"name": "floor 8k", "vocabulary": 8192, "prompts": 16, "mixed": False},
    {"name": "floor 50k", "vocabulary": 50304, "prompts": 16, "mixed": False},
]


def build(case: dict[str, Any]) -> tuple[LlamaForCausalLM, Tensor, Tensor, list[int]]:
    """Model, prompts, their mask and the stop tokens of a case."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case["vocabulary"],
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    lengths = torch.randint(32, 65, (case["prompts"],)).tolist()
    ids, mask = left_pad([torch.randint(0, case["vocabulary"], (n,)).tolist() for n in lengths], pad_token_id=0)
    stops = list(range(0, case["vocabulary"], 32)) if case["mixed"] else [case["vocabulary"]]
    return model, ids, mask, stops


def ours(case: dict[str, Any]) -> Callable[[int], list[list[int]]]:
    """The work, by the embedded engine."""
    model, ids, mask, stops = build(case)
    batch = {"prompt_ids": ids, "prompt_mask": mask, "prompt_index": torch.arange(len(ids))}

    def work(max_new_tokens: int) -> list[list[int]]:
        _, greedy = TransformersEngine().sample_and_greedy(model, batch, Sampling(max_new_tokens), stop_token_ids=stops)
        assert greedy is not None
        return [row[kept].tolist() for row, kept in zip(greedy.response_ids, greedy.response_mask, strict=True)]

    return work


def peer(case: dict[str, Any]) -> Callable[[int], list[list[int]]]:
    """The work, by transformers; in a floor case its matrix products alone."""
    model, ids, mask, stops = build(case)
    if case["name"].startswith("floor"):
        return floor(model, ids)

    @torch.no_grad()
    def work(max_new_tokens: int) -> list[list[int]]:
        answers = []
        for do_sample in (True, False):
            sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
            config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=0, **sampling)
            answers.append(model.generate(ids, attention_mask=mask.long(), generation_config=config))
        return [cut(row[ids.shape[1] :].tolist(), set(stops)) for row in answers[1]]

    return work


@torch.no_grad()
def floor(model: LlamaForCausalLM, ids: Tensor) -> Callable[[int], None]:
    """The matrix products of a rollout of equal lengths: prompts once, then two rows for each."""
    (num_prompts, width), config = ids.shape, model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    body, head = [module.weight.T for module in linear if module is not model.lm_head], model.lm_head.weight.T

    @torch.no_grad()
    def work(max_new_tokens: int) -> None:
        cache = torch.randn(config.num_hidden_layers, 2, 2 * num_prompts * heads, width + max_new_tokens, size)
        inputs = {n: torch.randn(num_prompts * width, n) for n in (256, 688)}
        for weight in body:
            inputs[len(weight)] @ weight
        for rows in cache[:, :, : num_prompts * heads, :width]:
            rows[0] @ rows[0].transpose(1, 2) @ rows[1]
        inputs = {n: torch.randn(2 * num_prompts, n) for n in (256, 688)}
        query = torch.randn(2 * num_prompts * heads, 1, size)
        for length in range(width + 1, width + max_new_tokens):
            for weight in body:
                inputs[len(weight)] @ weight
            for keys, values in cache[:, :, :, :length]:
                query @ keys.transpose(1, 2) @ values
            inputs[256] @ head

    return work


def cut(row: list[int], stops: set[int]) -> list[int]:
    """The tokens up to the first stop token."""
    end = next((position for position, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def main() -> None:
    """Run all cases, or one of them as a worker."""
    parser = argument_parser(__doc__)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.worker:
        one_thread()
        contender = {"peer": peer, "ours": ours}[arguments.worker]
        print(json.dumps(measure(lambda: contender(arguments.case), arguments.case["max_new_tokens"])))
        return
    cases = [{**case, "max_new_tokens": arguments.max_new_tokens} for case in CASES]
    conclude("rollout", [contend(__file__, case, arguments.repeats) for case in cases], arguments.output)


if __name__ == "__main__":
    main()
