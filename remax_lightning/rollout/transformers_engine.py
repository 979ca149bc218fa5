"""The embedded engine: one prefill for each prompt, sampled and greedy rows decoded together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.keyed_random import keyed_uniforms, row_keys
from remax_lightning.functional.sequence import length_mask
from remax_lightning.models.language_model import context_length, evaluating
from remax_lightning.rollout.engine import RolloutEngine
from remax_lightning.rollout.kv_cache import compaction
from remax_lightning.rollout.next_logits import Caches, CompiledNextLogits, NextLogits
from remax_lightning.rollout.sampling import sample_tokens
from remax_lightning.rollout.types import Responses, Samples, Sampling


@dataclass
class _Rows:
    """What is kept for each row while it is decoded; R rows, the sampled ones first."""

    prompt: Tensor  # the prompt of the row, (R,)
    greedy: Tensor  # (R,) bool
    limit: Tensor  # longest response, (R,)
    keys: Tensor  # key of the random stream, (R,)
    tokens: Tensor  # (R, T)
    log_probs: Tensor  # (R, T)
    lengths: Tensor  # (R,)
    stopped: Tensor  # ended by a stop token, (R,) bool
    failed: Tensor  # ended by logits that are not finite, (R,) bool


@dataclass
class TransformersEngine(RolloutEngine):
    """Decodes with the policy itself, through any causal language model of transformers with attention layers.

    Each prompt is prefilled once, into a key-value cache of fixed size. Its sampled and greedy rows are decoded in one
    batch, which a finished row leaves.

    Args:
        compile: Compile the decoding step, on a GPU into a CUDA graph: pays off in long runs of models whose step is
            short. Compiling takes up to a minute for each model, and again as the batch shrinks; on a CPU it needs a
            C++ compiler.
    """

    compile: bool = False
    caches: Caches = field(default_factory=dict, init=False, repr=False)

    def check(self, *, is_sharded: bool) -> None:
        """See :meth:`RolloutEngine.check`."""
        if is_sharded and self.compile:
            raise ValueError("engine.compile does not work under fsdp2, whose weights move; set it to false")

    def sample(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Tensor],
        sampling: Sampling,
        *,
        stop_token_ids: Sequence[int],
        seed: int = 0,
        step: int = 0,
    ) -> Samples:
        """See :meth:`RolloutEngine.sample`."""
        rows = _start(batch["prompt_index"], sampling, None, seed, step)
        prompts = self._decode(policy, batch, rows, sampling, stop_token_ids)
        return _samples(rows, *prompts)

    def sample_and_greedy(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Tensor],
        sampling: Sampling,
        *,
        stop_token_ids: Sequence[int],
        greedy_max_new_tokens: int | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> tuple[Samples, Responses]:
        """See :meth:`RolloutEngine.sample_and_greedy`."""
        greedy_limit = greedy_max_new_tokens or sampling.max_new_tokens
        rows = _start(batch["prompt_index"], sampling, greedy_limit, seed, step)
        prompts = self._decode(policy, batch, rows, sampling, stop_token_ids)
        return _samples(rows, *prompts), Responses(**_responses(rows, rows.greedy, *prompts))

    @torch.no_grad()
    def _decode(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Tensor],
        rows: _Rows,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Fill in the rows; the prompts without the columns that are padding in all of them, and their mask."""
        mask = batch["prompt_mask"].bool()
        _check(policy, mask, rows.tokens.shape[1])
        width = int(mask.sum(dim=1).max())
        prompt_ids, mask = batch["prompt_ids"][:, -width:], mask[:, -width:]
        with evaluating(policy):
            inputs = (policy, prompt_ids, mask, *rows.tokens.shape)
            next_logits = CompiledNextLogits(self.caches, *inputs) if self.compile else NextLogits(*inputs)
            _decode(next_logits, rows, sampling, stop_token_ids)
        return prompt_ids, mask


def _check(policy: PreTrainedModel, mask: Tensor, max_new_tokens: int) -> None:
    lengths = mask.sum(dim=1)
    if not bool((lengths > 0).all()):
        raise ValueError("every prompt needs at least one token, got an empty prompt; drop it from the data")
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError("prompts must be padded on the left, got a prompt_mask with padding after a token")
    longest, limit = int(lengths.max()), context_length(policy)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"prompt and response must fit the model's context of {limit} tokens, got a prompt of {longest} and "
            f"max_new_tokens={max_new_tokens}; lower max_new_tokens or the data's max_prompt_length"
        )


def _start(prompt_index: Tensor, sampling: Sampling, greedy_limit: int | None, seed: int, step: int) -> _Rows:
    """Rows before their first token: ``num_samples`` for each prompt, then a greedy one unless its limit is None."""
    num_prompts, device = len(prompt_index), prompt_index.device
    prompt = torch.arange(num_prompts, device=device)
    sample = torch.arange(sampling.num_samples, device=device).repeat(num_prompts)
    prompts = [prompt.repeat_interleave(sampling.num_samples)] + [prompt] * (greedy_limit is not None)
    prompt = torch.cat(prompts)  # (R,)
    sample = torch.cat([sample, sample.new_zeros(len(prompt) - len(sample))])
    is_greedy = torch.arange(len(prompt), device=device) >= num_prompts * sampling.num_samples
    limit = torch.where(is_greedy, greedy_limit or 0, sampling.max_new_tokens)
    shape = (len(prompt), max(sampling.max_new_tokens, greedy_limit or 0))
    return _Rows(
        prompt=prompt,
        greedy=is_greedy,
        limit=limit,
        keys=row_keys(seed, step, prompt_index[prompt], sample),
        tokens=torch.zeros(shape, dtype=torch.long, device=device),
        log_probs=torch.zeros(shape, device=device),
        lengths=limit.clone(),
        stopped=torch.zeros_like(is_greedy),
        failed=torch.zeros_like(is_greedy),
    )


def _decode(next_logits: NextLogits, rows: _Rows, sampling: Sampling, stop_token_ids: Sequence[int]) -> None:
    """Fill in the tokens, log-probs and lengths of all rows."""
    (num_rows, longest), device = rows.tokens.shape, rows.tokens.device
    stops = torch.tensor(list(stop_token_ids), device=device)
    uniforms = keyed_uniforms(rows.keys[:, None], torch.arange(longest, device=device)).t()  # (T, R)
    logits = next_logits.of_prompts(rows.prompt)
    slots = torch.arange(num_rows, device=device)  # the row that stands in each slot
    num_sampled = int((~rows.greedy).sum())
    for position in range(longest):
        sampled = slots[:num_sampled]
        drawn, log_probs = sample_tokens(logits[:num_sampled], uniforms[position, sampled], sampling)
        best = logits[num_sampled:].max(dim=-1)
        tokens = torch.cat([drawn, best.indices])
        rows.log_probs[sampled, position] = log_probs
        rows.tokens[slots, position] = tokens
        failed = ~torch.cat([log_probs, best.values.float()]).isfinite()
        stopped = torch.isin(tokens, stops) & ~failed
        finished = stopped | failed | (rows.limit[slots] == position + 1)
        if bool(finished.any()):
            rows.stopped[slots], rows.failed[slots] = stopped, failed
            rows.lengths[slots[finished]] = position + 1 - failed[finished].long()
            source, target = compaction(~finished, rows.greedy[slots])
            next_logits.move(source, target)
            tokens[target], slots[target] = tokens[source], slots[source]
            num_sampled = num_sampled - int(finished[:num_sampled].sum())
            num_live = len(slots) - int(finished.sum())
            tokens, slots = tokens[:num_live], slots[:num_live]
            if num_live == 0:
                return
        logits = next_logits.of_tokens(tokens)


def _responses(rows: _Rows, chosen: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> dict[str, Tensor]:
    """The fields of the chosen rows' responses, cut to the longest of them."""
    lengths, prompt = rows.lengths[chosen], rows.prompt[chosen]
    longest = max(int(lengths.max()), 1)
    mask = length_mask(lengths, longest)
    return {
        "prompt_ids": prompt_ids[prompt],
        "prompt_mask": prompt_mask[prompt],
        "response_ids": rows.tokens[chosen, :longest].masked_fill(~mask, 0),
        "response_mask": mask,
        "truncated": ~(rows.stopped | rows.failed)[chosen],
        "failed": rows.failed[chosen],
    }


def _samples(rows: _Rows, prompt_ids: Tensor, prompt_mask: Tensor) -> Samples:
    """The sampled rows."""
    fields = _responses(rows, ~rows.greedy, prompt_ids, prompt_mask)
    mask = fields["response_mask"]
    log_probs = rows.log_probs[~rows.greedy, : mask.shape[1]]
    return Samples(**fields, log_probs=log_probs.masked_fill(~mask, 0.0))  # NaN behind a row that failed
