"""The embedded engine: one prefill for each prompt, sampled and greedy rows decoded together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.keyed_random import keyed_uniforms, row_keys
from remax_lightning.functional.sequence import length_mask, position_ids
from remax_lightning.models.head import DecodingHead, plain_head, without_head
from remax_lightning.models.language_model import context_length, evaluating
from remax_lightning.rollout.engine import RolloutEngine
from remax_lightning.rollout.kv_cache import PreallocatedCache, compaction
from remax_lightning.rollout.sampling import sample_tokens
from remax_lightning.rollout.types import Rollout, Sampling


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


class TransformersEngine(RolloutEngine):
    """Decodes with the policy itself, through any causal language model of transformers with attention layers.

    Each prompt is prefilled once, into a key-value cache of fixed size. Its sampled and greedy rows are decoded in one
    batch, which a finished row leaves.
    """

    @torch.no_grad()
    def generate(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Tensor],
        sampling: Sampling,
        *,
        stop_token_ids: Sequence[int],
        greedy: bool = True,
        greedy_max_new_tokens: int | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> tuple[Rollout, Rollout | None]:
        """See :meth:`RolloutEngine.generate`."""
        mask = batch["prompt_mask"].bool()
        limits = (sampling.max_new_tokens, greedy_max_new_tokens or sampling.max_new_tokens)
        _check(policy, mask, max(limits) if greedy else limits[0])
        # columns that are padding in every row cost time and change nothing
        width = int(mask.sum(dim=1).max())
        prompt_ids, mask = batch["prompt_ids"][:, -width:], mask[:, -width:]
        rows = _start(batch["prompt_index"], sampling, greedy, limits, seed, step)
        with evaluating(policy):
            _decode(policy, prompt_ids, mask, rows, sampling, stop_token_ids)
        sampled = _rollout(rows, ~rows.greedy, prompt_ids, mask)
        return sampled, _rollout(rows, rows.greedy, prompt_ids, mask) if greedy else None


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


def _start(
    prompt_index: Tensor, sampling: Sampling, greedy: bool, limits: tuple[int, int], seed: int, step: int
) -> _Rows:
    num_prompts, device = len(prompt_index), prompt_index.device
    prompt = torch.arange(num_prompts, device=device)
    sample = torch.arange(sampling.num_samples, device=device).repeat(num_prompts)
    prompts = [prompt.repeat_interleave(sampling.num_samples)] + [prompt] * greedy
    prompt = torch.cat(prompts)
    sample = torch.cat([sample, sample.new_zeros(len(prompt) - len(sample))])
    is_greedy = torch.arange(len(prompt), device=device) >= num_prompts * sampling.num_samples
    limit = torch.where(is_greedy, limits[1], limits[0])
    shape = (len(prompt), int(limit.max()))
    return _Rows(
        prompt=prompt,
        greedy=is_greedy,
        limit=limit,
        keys=row_keys(seed, step, prompt_index[prompt], sample),
        tokens=torch.zeros(shape, dtype=torch.long, device=device),
        log_probs=torch.zeros(shape, device=device),
        lengths=limit.clone(),
        stopped=torch.zeros_like(is_greedy),
    )


def _decode(
    policy: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    rows: _Rows,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
) -> None:
    """Fill in the tokens, log-probs and lengths of all rows."""
    num_rows, longest = rows.tokens.shape
    next_logits = _Logits(policy, prompt_ids, prompt_mask, num_rows, longest)
    stops = torch.tensor(list(stop_token_ids), device=prompt_ids.device)
    uniforms = keyed_uniforms(rows.keys[:, None], torch.arange(longest, device=prompt_ids.device)).t()  # (T, R)
    logits = next_logits.of_prompts(rows.prompt)
    slots = torch.arange(num_rows, device=prompt_ids.device)  # the row that stands in each slot
    num_sampled = int((~rows.greedy).sum())
    for position in range(longest):
        sampled = slots[:num_sampled]
        drawn, log_probs = sample_tokens(logits[:num_sampled], uniforms[position, sampled], sampling)
        tokens = torch.cat([drawn, logits[num_sampled:].argmax(dim=-1)])
        rows.log_probs[sampled, position] = log_probs
        rows.tokens[slots, position] = tokens
        stopped = torch.isin(tokens, stops)
        finished = stopped | (rows.limit[slots] == position + 1)
        if bool(finished.any()):
            rows.stopped[slots] = stopped
            rows.lengths[slots[finished]] = position + 1
            source, target = compaction(~finished, rows.greedy[slots])
            next_logits.move(source, target)
            tokens[target], slots[target] = tokens[source], slots[source]
            num_sampled = num_sampled - int(finished[:num_sampled].sum())
            num_live = len(slots) - int(finished.sum())
            tokens, slots = tokens[:num_live], slots[:num_live]
            if num_live == 0:
                return
        logits = next_logits.of_tokens(tokens)


class _Logits:
    """The model with its cache: tokens in, the logits of the next ones out."""

    def __init__(
        self, policy: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, num_rows: int, max_new_tokens: int
    ) -> None:
        self.policy, self.prompt_ids, self.prompt_mask = policy, prompt_ids, prompt_mask
        self.width = prompt_ids.shape[1]
        num_layers = policy.config.get_text_config().num_hidden_layers
        self.cache = PreallocatedCache(num_layers, num_rows, self.width + max_new_tokens)
        head = plain_head(policy)
        self.head = None if head is None else DecodingHead(head, num_rows)

    def of_prompts(self, prompt: Tensor) -> Tensor:
        """Logits after each row's prompt, (R, V)."""
        self.mask: Tensor | None = None
        if not bool(self.prompt_mask.all()):
            ones = self.prompt_mask.new_ones(len(self.prompt_mask), self.cache.max_length - self.width)
            self.mask = torch.cat([self.prompt_mask, ones], dim=1)[prompt]
        self.positions = self.prompt_mask.sum(dim=1)[prompt, None]
        logits = self._logits(self.prompt_ids, self.prompt_mask, position_ids(self.prompt_mask))[prompt]
        self.cache.copy_rows(prompt, torch.arange(len(prompt), device=prompt.device))
        return logits

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Logits after the next token of each live row, (R, V)."""
        num_rows = len(tokens)
        mask = None if self.mask is None else self.mask[:num_rows, : self.cache.get_seq_length() + 1]
        logits = self._logits(tokens[:, None], mask, self.positions[:num_rows])
        self.positions = self.positions + 1
        return logits

    def move(self, source: Tensor, target: Tensor) -> None:
        """Put rows in the place of others."""
        self.cache.copy_rows(source, target)
        self.positions[target] = self.positions[source]
        if self.mask is not None:
            self.mask[target] = self.mask[source]

    def _logits(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if self.head is None:
            return self.policy(**values).logits[:, -1]
        with without_head(self.head.head):
            hidden = self.policy(**values).logits[:, -1]
        return self.head(hidden)


def _rollout(rows: _Rows, chosen: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> Rollout:
    """The chosen rows as a rollout, cut to its longest response."""
    lengths, prompt = rows.lengths[chosen], rows.prompt[chosen]
    longest = int(lengths.max())
    mask = length_mask(lengths, longest)
    is_greedy = bool(rows.greedy[chosen].all())
    return Rollout(
        prompt_ids=prompt_ids[prompt],
        prompt_mask=prompt_mask[prompt],
        response_ids=rows.tokens[chosen, :longest].masked_fill(~mask, 0),
        response_mask=mask,
        truncated=~rows.stopped[chosen],
        **({} if is_greedy else {"log_probs": rows.log_probs[chosen, :longest]}),
    )
