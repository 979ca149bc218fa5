"""Head and policy-gradient loss, forward and backward: log-softmax over all the logits against the chunked function.

8 rows of 192 positions, 64 of the prompt and 128 of the response, hidden size 256, float32, gradients of the hidden
states and of the weight. The peer has the logits of all positions and weighs those of the prompt by 0; ours is given
the positions of the response. In the cases named ``every position`` there is no prompt: what is left is the chunked
function against log-softmax, and two thirds of the peer's time are matrix products that ours needs too. The peak memory
is what comes on top of the inputs: the gradient of the weight (V x 256) counts for both. Ours returns the entropy too.

    python benchmarks/head.py --output benchmarks/results/head.json
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import argument_parser, chosen, conclude, contend, one_thread, peak_mib
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.functional import fused_policy_gradient_loss

CASES = [
    {"name": "head 50k", "vocabulary": 50304, "prompt": 64},
    {"name": "head 150k", "vocabulary": 152064, "prompt": 64},
    {"name": "every position 50k", "vocabulary": 50304, "prompt": 0},
    {"name": "every position 150k", "vocabulary": 152064, "prompt": 0},
]
ROWS, LENGTH, HIDDEN_SIZE = 8, 192, 256
TOLERANCE = 1e-5


def build(vocabulary: int, prompt: int = 64, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, tokens and coefficients, without a temporary tensor that would count as memory."""
    torch.manual_seed(0)
    hidden = torch.empty(rows, LENGTH, HIDDEN_SIZE).normal_().requires_grad_()
    weight = torch.empty(vocabulary, HIDDEN_SIZE).normal_(std=HIDDEN_SIZE**-0.5).requires_grad_()
    tokens, coefficients = torch.randint(0, vocabulary, (rows, LENGTH)), torch.randn(rows, LENGTH)
    coefficients[:, :prompt] = 0
    return hidden, weight, tokens, coefficients


def peer(hidden: Tensor, weight: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
    """The loss over all the logits."""
    log_probs = F.linear(hidden, weight).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -(coefficients * log_probs).sum()


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
    """The loss over the positions of the response, chunk by chunk."""
    start = int((coefficients[0] != 0).nonzero()[0])
    return fused_policy_gradient_loss(hidden[:, start:], weight, tokens[:, start:], coefficients[:, start:])


CONTENDERS: dict[str, Callable[..., Tensor]] = {"peer": peer, "ours": ours}


def measure(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of a contender, and its peak memory beyond that of the inputs, MiB."""
    loss, inputs = CONTENDERS[name], build(case["vocabulary"], case["prompt"])
    loss(*build(vocabulary=1000, rows=1)).backward()  # warm-up
    before = peak_mib()
    start = time.process_time()
    loss(*inputs).backward()
    seconds = time.process_time() - start
    return {"cpu_seconds": seconds, "peak_mib": peak_mib() - before, "answer": None}


def gradient_error(case: dict[str, Any]) -> float:
    """Largest difference between the gradients of the two, relative to the largest entry of the gradient."""
    inputs = build(case["vocabulary"], case["prompt"])
    gradients = [torch.autograd.grad(loss(*inputs), inputs[:2]) for loss in CONTENDERS.values()]
    return max(((one - other).abs().max() / one.abs().max()).item() for one, other in zip(*gradients, strict=True))


def compare(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Run a case; equal are gradients up to the tolerance."""
    error = gradient_error(case)
    return {**contend(__file__, case, repeats), "gradient_error": error, "is_equal": error < TOLERANCE}


def main() -> None:
    """Run all cases, or one of them as a worker."""
    arguments = argument_parser(__doc__, repeats=5).parse_args()
    one_thread()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.case)))
        return
    conclude("head", [compare(case, arguments.repeats) for case in chosen(CASES, arguments)], arguments.output)


if __name__ == "__main__":
    main()
