"""One training step of ReMax from the command line against a bare loop over the same functions.

The peer here is the same work without Lightning, data module, logging, metrics, callbacks and checks: the functions of
``rollout``, ``models`` and ``functional`` one after the other on prompts tokenized beforehand. Model, prompts, reward
and what is measured are those of ``step.py``. A time ratio of 0.95 says that the product costs 5 % more.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import argument_parser, conclude, contend, one_thread
from step import CLOCK, KL_COEF, NEW_TOKENS, OPTIMIZER, PROMPTS, Phases, distinct_words, ours, prepare
from step import work as timed
from torch import Tensor
from transformers import AutoTokenizer, get_scheduler

from remax_lightning.functional import left_pad, remax_advantages
from remax_lightning.models.language_model import frozen_copy, load_language_model
from remax_lightning.models.next_token import log_probs_of, policy_gradient_of
from remax_lightning.models.source import ModelSource
from remax_lightning.rollout import Rollout, Sampling, TransformersEngine

CASES = [{"name": "overhead 8k", "vocabulary": 8192}, {"name": "overhead 50k", "vocabulary": 50304}]
__all__ = ["Phases"]  # the command line finds it here


def peer(case: dict[str, Any]) -> None:
    """ReMax as a script."""
    folder = Path(case["folder"])
    source = ModelSource(path=str(folder / "model"))
    policy, tokenizer = load_language_model(source).train(), AutoTokenizer.from_pretrained(folder / "model")
    reference = frozen_copy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), **OPTIMIZER)
    schedule = get_scheduler("cosine", optimizer, 0, case["steps"])
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for step in range(case["steps"]):
        batch = prompts[step * PROMPTS : (step + 1) * PROMPTS]
        update(policy, optimizer, collect(policy, tokenizer, reference, batch, step))
        schedule.step()
        CLOCK.end_step()


def collect(policy: Any, tokenizer: Any, reference: Any, prompts: list[str], step: int) -> Rollout:
    """Sampled responses with rewards, baselines and log-probs of the reference."""
    ids, mask = left_pad([tokenizer(prompt)["input_ids"] for prompt in prompts], tokenizer.pad_token_id)
    inputs = {"prompt_ids": ids, "prompt_mask": mask, "prompt_index": torch.arange(PROMPTS) + step * PROMPTS}
    sampled, greedy = TransformersEngine().sample_and_greedy(
        policy, inputs, Sampling(NEW_TOKENS), stop_token_ids=[tokenizer.eos_token_id], step=step
    )
    texts = [tokenizer.batch_decode(each.response_ids, skip_special_tokens=True) for each in (sampled, greedy)]
    rewards, baselines = torch.tensor(distinct_words(prompts * 2, texts[0] + texts[1])).chunk(2)
    with torch.no_grad():
        ref_log_probs = sampled.at_tokens(log_probs_of(reference, *sampled.sequences()))
    return sampled.scored(rewards, baselines, ref_log_probs)


def update(policy: Any, optimizer: torch.optim.Optimizer, rollout: Rollout) -> None:
    """One optimizer step."""
    mask = rollout.response_mask
    advantages: Tensor = remax_advantages(
        rollout.rewards,
        rollout.baselines,
        mask,
        log_probs=rollout.log_probs,
        ref_log_probs=rollout.ref_log_probs,
        kl_coef=KL_COEF,
    )
    policy_gradient_of(policy, *rollout.sequences(), advantages[mask] / mask.sum()).loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def work(case: dict[str, Any], contender: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train; the fastest step after the first one."""
    result = timed(case, contender)
    result.pop("phases")
    return result


def run_case(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Run a case in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(case, Path(folder))
        return contend(__file__, {**case, "folder": folder}, repeats)


def main() -> None:
    """Run all cases, or one of them as a worker."""
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps, the first of which is a warm-up")
    arguments = parser.parse_args()
    if arguments.worker:
        one_thread()
        print(json.dumps(work(arguments.case, {"peer": peer, "ours": ours}[arguments.worker])))
        return
    cases = [run_case({**case, "steps": arguments.steps}, arguments.repeats) for case in CASES]
    conclude("overhead", cases, arguments.output)


if __name__ == "__main__":
    main()
