from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from remax_lightning.functional.log_probs import token_log_probs
from remax_lightning.functional.sequence import left_pad
from remax_lightning.models.language_model import response_logits
from remax_lightning.rollout import Rollout, Sampling, TransformersEngine, next_logits
from remax_lightning.rollout.sampling import sample_tokens

ARCHITECTURES = ["llama", "qwen2", "gpt2", "opt", "gemma", "mistral", "gemma2"]
STOPS = [1, 5, 9]


def prompts(lengths: list[int], pad_token_id: int = 0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    ids, mask = left_pad(rows, pad_token_id)
    return {"prompt_ids": ids, "prompt_mask": mask, "prompt_index": torch.arange(len(lengths)) + 100}


def select(batch: dict[str, Tensor], index: list[int]) -> dict[str, Tensor]:
    return {name: column[index] for name, column in batch.items()}


def texts(rollout: Rollout) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


def generate(
    model: PreTrainedModel, batch: dict[str, Tensor], max_new_tokens: int = 24, **options: object
) -> tuple[list[list[int]], list[list[int]]]:
    values = {"max_new_tokens": max_new_tokens, **{k: options.pop(k) for k in ("num_samples",) if k in options}}
    sampled, greedy = TransformersEngine().sample_and_greedy(
        model, batch, Sampling(**values), **{"stop_token_ids": STOPS, **options}
    )
    return texts(sampled), texts(greedy)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 11, 6, 1]])
def test_greedy_rows_are_those_of_transformers(architecture: str, lengths: list[int]) -> None:
    model, batch = tiny.language_model(architecture), prompts(lengths)
    _, greedy = generate(model, batch)
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=STOPS, pad_token_id=0)
    for row, response in enumerate(greedy):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row]][None]
        expected = model.generate(prompt, generation_config=config, attention_mask=torch.ones_like(prompt))
        assert response == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_greedy_rows_are_those_of_padded_transformers(architecture: str) -> None:
    model, batch = tiny.language_model(architecture), prompts([3, 11, 6, 1])
    _, greedy = generate(model, batch)
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=STOPS, pad_token_id=0)
    expected = model.generate(
        batch["prompt_ids"], attention_mask=batch["prompt_mask"].long(), generation_config=config
    )[:, 11:]
    for row, response in enumerate(greedy):
        assert response == expected[row, : len(response)].tolist()


def test_pad_equal_to_a_stop_token_changes_nothing() -> None:
    model = tiny.language_model()
    assert generate(model, prompts([3, 9, 5])) == generate(model, prompts([3, 9, 5], pad_token_id=1))


def test_stop_tokens_end_a_response_and_belong_to_it() -> None:
    model, batch = tiny.language_model(), prompts([4] * 16)
    sampled, greedy = TransformersEngine().sample_and_greedy(model, batch, Sampling(24), stop_token_ids=STOPS)
    assert greedy is not None
    for rollout in (sampled, greedy):
        for response, truncated in zip(texts(rollout), rollout.truncated.tolist(), strict=True):
            stops = [token for token in response if token in STOPS]
            assert len(stops) == (0 if truncated else 1)
            assert truncated or response[-1] in STOPS
            assert not truncated or len(response) == 24
    assert 0 < int(sampled.truncated.sum()) < 16


def test_responses_do_not_depend_on_batch_split_or_order() -> None:
    model, batch = tiny.language_model(scale=3.0), prompts([3, 11, 6, 1, 8, 8])
    sampled, greedy = generate(model, batch, num_samples=2, seed=3, step=7)
    order = [4, 2, 5, 0, 3, 1]
    shuffled, shuffled_greedy = generate(model, select(batch, order), num_samples=2, seed=3, step=7)
    assert [shuffled[2 * order.index(i) + s] for i in range(6) for s in range(2)] == sampled
    assert [shuffled_greedy[order.index(i)] for i in range(6)] == greedy
    alone = [generate(model, select(batch, [i]), num_samples=2, seed=3, step=7) for i in range(6)]
    assert [row for rows, _ in alone for row in rows] == sampled
    assert [row for _, rows in alone for row in rows] == greedy


def test_responses_depend_on_seed_step_sample_and_prompt_index() -> None:
    model, batch = tiny.language_model(scale=3.0), prompts([6])
    first, _ = generate(model, batch, num_samples=2, seed=1, step=1)
    assert first[0] != first[1]
    assert first != generate(model, batch, num_samples=2, seed=2, step=1)[0]
    assert first != generate(model, batch, num_samples=2, seed=1, step=2)[0]
    assert (
        first != generate(model, {**batch, "prompt_index": batch["prompt_index"] + 1}, num_samples=2, seed=1, step=1)[0]
    )


def test_sampled_rows_do_not_depend_on_the_greedy_ones() -> None:
    model, batch = tiny.language_model(scale=3.0), prompts([3, 11, 6])
    alone = TransformersEngine().sample(model, batch, Sampling(24), stop_token_ids=STOPS)
    assert generate(model, batch)[0] == texts(alone)


def test_the_global_generator_is_left_alone() -> None:
    model, batch = tiny.language_model(), prompts([3, 5])
    state = torch.get_rng_state()
    generate(model, batch)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_log_probs_are_those_of_the_training_forward(architecture: str, temperature: float) -> None:
    model, batch = tiny.language_model(architecture, scale=3.0), prompts([3, 11, 6, 1])
    sampling = Sampling(16, temperature=temperature, num_samples=2)
    rollout = TransformersEngine().sample(model, batch, sampling, stop_token_ids=STOPS)
    logits = response_logits(
        model, rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask
    )
    log_probs = token_log_probs(logits, rollout.response_ids, temperature=temperature)
    assert rollout.log_probs is not None
    torch.testing.assert_close(
        rollout.log_probs[rollout.response_mask], log_probs[rollout.response_mask], atol=2e-5, rtol=0
    )


def test_samples_follow_the_policy() -> None:
    model, batch = tiny.language_model(scale=3.0), prompts([5])
    count = 20_000
    rollout = TransformersEngine().sample(model, batch, Sampling(1, num_samples=count), stop_token_ids=STOPS)
    observed = torch.bincount(rollout.response_ids[:, 0], minlength=tiny.VOCABULARY) / count
    expected = model(batch["prompt_ids"]).logits[0, -1].softmax(-1)
    assert (observed - expected).abs().max() < 4 * 0.5 / count**0.5


@pytest.mark.parametrize(("option", "value"), [("top_k", 3), ("top_p", 0.5)])
def test_top_k_and_top_p_keep_the_most_probable_tokens(option: str, value: float) -> None:
    model, batch = tiny.language_model(scale=2.0), prompts([5])
    sampling = Sampling(1, num_samples=4000, **{option: value})
    rollout = TransformersEngine().sample(model, batch, sampling, stop_token_ids=STOPS)
    probabilities, tokens = model(batch["prompt_ids"]).logits[0, -1].softmax(-1).sort(descending=True)
    size = int(value) if option == "top_k" else int((probabilities.cumsum(0) < value).sum()) + 1
    assert set(rollout.response_ids[:, 0].tolist()) == set(tokens[:size].tolist())
    frequency = (rollout.response_ids[:, 0] == tokens[0]).float().mean()
    assert abs(frequency - probabilities[0] / probabilities[:size].sum()) < 0.04


def test_the_greedy_response_has_its_own_longest_length() -> None:
    model, batch = tiny.language_model(), prompts([4] * 8)
    full, full_greedy = generate(model, batch)
    sampled, greedy = generate(model, batch, greedy_max_new_tokens=5)
    assert sampled == full
    assert greedy == [response[:5] for response in full_greedy]
    sampled, greedy = generate(model, batch, max_new_tokens=5, greedy_max_new_tokens=24)
    assert greedy == full_greedy
    assert sampled == [response[:5] for response in full]


def test_modes_are_restored() -> None:
    model, batch = tiny.language_model(), prompts([4])
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    generate(model, batch)
    assert [module.training for module in model.modules()] == before
    model.model.norm.forward = None  # the decoding raises
    with pytest.raises(TypeError):
        generate(model, batch)
    assert [module.training for module in model.modules()] == before
    assert "forward" not in vars(model.lm_head)


def test_dropout_is_off_in_a_rollout() -> None:
    model, batch = tiny.language_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), prompts([4, 6])
    expected = generate(model, batch)
    model.train()
    assert generate(model, batch) == expected


def test_refusals() -> None:
    model = tiny.language_model("gpt2")
    empty = prompts([4, 3])
    empty["prompt_mask"][1] = False
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, empty)
    with pytest.raises(ValueError, match=r"context of 128 tokens, got a prompt of 110 and max_new_tokens=24"):
        generate(model, prompts([110]))
    right = prompts([4, 3])
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, {**right, "prompt_mask": right["prompt_mask"].flip(1)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 4, "temperature": 0.0}, "temperature must be > 0"),
        ({"max_new_tokens": 4, "top_p": 0.0}, "top_p must be in"),
        ({"max_new_tokens": 4, "top_k": -1}, "top_k must be 0"),
        ({"max_new_tokens": 4, "num_samples": 0}, "num_samples must be at least 1, got 0"),
    ],
)
def test_sampling_refuses_values_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    ("values", "expected"), [({}, False), ({"top_k": 1}, True), ({"top_p": 0.99}, True), ({"temperature": 0.5}, False)]
)
def test_sampling_is_truncated_if_some_token_is_never_drawn(values: dict[str, float], expected: bool) -> None:
    assert Sampling(max_new_tokens=4, **values).is_truncated is expected


@pytest.mark.parametrize("top_k", [tiny.VOCABULARY - 1, tiny.VOCABULARY, tiny.VOCABULARY + 1])
def test_top_k_near_the_size_of_the_vocabulary(top_k: int) -> None:
    logits = torch.zeros(1, tiny.VOCABULARY)
    logits[0, 5] = -1.0
    uniforms = (torch.arange(4 * tiny.VOCABULARY) + 0.5) / (4 * tiny.VOCABULARY)
    drawn, _ = sample_tokens(logits.expand(len(uniforms), -1), uniforms, Sampling(1, top_k=top_k))
    never = {5} if top_k < tiny.VOCABULARY else set()
    assert set(range(tiny.VOCABULARY)) - set(drawn.tolist()) == never


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_logits_of_a_prompt_are_those_of_its_last_token_alone(architecture: str) -> None:
    """Those of all its tokens take, with a large vocabulary, more memory than the rest of the rollout."""
    model, batch = tiny.language_model(architecture), prompts([9, 6])
    widths: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda head, inputs: widths.append(inputs[0].shape[1]))
    generate(model, batch)
    assert set(widths) <= {1}


@pytest.mark.parametrize(("length", "expected"), [(1, 128), (127, 128), (128, 128), (129, 256), (256, 256)])
def test_a_compiled_cache_has_the_next_multiple_of_columns(length: int, expected: int) -> None:
    assert next_logits.compiled_length(length) == expected


def test_rows_leave_out_common_padding() -> None:
    model, batch = tiny.language_model(), prompts([3, 11, 6])
    rollout = TransformersEngine().sample(model, batch, Sampling(24), stop_token_ids=STOPS)
    part = rollout.rows(torch.tensor([0, 2]))
    assert part.prompt_ids.shape[1] == 6
    assert part.response_ids.shape[1] == int(rollout.lengths[[0, 2]].max())
    assert texts(part) == [texts(rollout)[0], texts(rollout)[2]]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "gemma", "mistral", "gemma2"])
@pytest.mark.parametrize("lengths", [[3, 11, 6, 4], [5, 5, 5, 5]])
def test_the_step_of_constant_shape_gives_the_same_responses(
    architecture: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_logits, "compiled_step", lambda device_type: next_logits.decoding_step)
    model, batch, engine = tiny.language_model(architecture), prompts(lengths), TransformersEngine(compile=True)
    sampling = Sampling(24, num_samples=2)
    expected = TransformersEngine().sample_and_greedy(model, batch, sampling, stop_token_ids=STOPS)
    for _ in range(2):  # the second time in the cache of the first
        for rollout, other in zip(
            engine.sample_and_greedy(model, batch, sampling, stop_token_ids=STOPS), expected, strict=True
        ):
            assert texts(rollout) == texts(other)
    assert len(engine.caches) == 1
    rollout = engine.sample_and_greedy(model, batch, sampling, stop_token_ids=STOPS)[0]
    torch.testing.assert_close(rollout.log_probs, expected[0].log_probs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_compiled_step_is_compiled_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    # the backend that needs no C++ compiler
    step = torch.compile(next_logits.decoding_step, backend="eager", fullgraph=True)
    monkeypatch.setattr(next_logits, "compiled_step", lambda device_type: step)
    model, batch = tiny.language_model(), prompts([3, 11, 6, 4, 9, 2])
    engine, lengths = TransformersEngine(compile=True), []
    for number in range(3):
        for rollout in engine.sample_and_greedy(model, batch, Sampling(40), stop_token_ids=STOPS, step=number):
            lengths += rollout.lengths.tolist()
    assert len(set(lengths)) > 5
    assert 1 <= counters["stats"]["unique_graphs"] <= 4  # all rows, half of them, ...


# logits that are not finite

BROKEN = 7
"""A token whose embedding is not finite: what follows it has no finite logits."""


def broken(value: float = float("nan")) -> PreTrainedModel:
    model = tiny.language_model(scale=3.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = value
    return model


def prompts_with_broken(*rows: int) -> dict[str, Tensor]:
    batch = prompts([3, 11, 6, 4, 9, 5])
    ids = batch["prompt_ids"]
    ids[ids == BROKEN] = BROKEN + 1
    ids[list(rows), -2] = BROKEN
    return batch


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.5}], ids=str)
@pytest.mark.parametrize("is_static", [False, True])
def test_a_row_without_finite_logits_ends_there_and_the_others_go_on(
    value: float, options: dict[str, float], is_static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_logits, "compiled_step", lambda device_type: next_logits.decoding_step)
    sampling, sound = Sampling(16, num_samples=2, **options), tiny.language_model(scale=3.0)
    engine, batch = TransformersEngine(compile=is_static), prompts_with_broken(1, 4)
    found = engine.sample_and_greedy(broken(value), batch, sampling, stop_token_ids=STOPS)
    expected = TransformersEngine().sample_and_greedy(sound, batch, sampling, stop_token_ids=STOPS)
    num_failed = 0
    for responses, others, samples in zip(found, expected, (2, 1), strict=True):
        assert int(responses.response_ids.max()) < tiny.VOCABULARY
        for row, (tokens, sound_tokens) in enumerate(zip(texts(responses), texts(others), strict=True)):
            if row // samples in (1, 4):
                assert (tokens, bool(responses.failed[row])) == ([], True)
                continue
            # one that draws the broken token fails behind it, others are as without
            assert bool(responses.failed[row]) == (BROKEN in sound_tokens[:-1])
            end = sound_tokens.index(BROKEN) + 1 if responses.failed[row] else None
            assert tokens == sound_tokens[:end]
            num_failed += bool(responses.failed[row])
        assert not (responses.truncated & responses.failed).any()
        assert torch.equal(responses.is_finite, ~responses.failed)
    assert num_failed > 0
    assert found[0].log_probs.isfinite().all()


@pytest.mark.parametrize("is_static", [False, True])
def test_all_rows_without_finite_logits_are_empty(is_static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_logits, "compiled_step", lambda device_type: next_logits.decoding_step)
    model = tiny.language_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    engine, batch = TransformersEngine(compile=is_static), prompts([3, 11])
    for responses in engine.sample_and_greedy(model, batch, Sampling(8), stop_token_ids=STOPS):
        assert responses.failed.tolist() == [True, True]
        assert responses.lengths.tolist() == [0, 0]
        assert responses.response_ids.shape == (2, 1)
        assert responses.sequences()[0].shape == (2, 11)


def test_a_broken_row_leaves_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_logits, "compiled_step", lambda device_type: next_logits.decoding_step)
    engine, sound, batch = TransformersEngine(compile=True), tiny.language_model(scale=3.0), prompts_with_broken()
    expected = TransformersEngine().sample(sound, batch, Sampling(16), stop_token_ids=STOPS)
    for model, given in ((broken(), prompts_with_broken(0, 1, 2, 3)), (sound, batch)):
        found = engine.sample(model, given, Sampling(16), stop_token_ids=STOPS)
        if model is not sound:
            (cache,) = engine.caches.values()
            for layer in cache.attention_layers:  # behind the prompts, too
                layer.keys[:, :, 20:], layer.values[:, :, 20:] = float("nan"), float("nan")
            engine.caches = {(id(sound), *key[1:]): kept for key, kept in engine.caches.items()}
    assert texts(found) == texts(expected)


def test_an_index_is_never_beyond_the_vocabulary() -> None:
    """On a GPU such an index would end the process."""
    finite = torch.tensor([[0.0, -torch.inf, 1.0]])
    kinds = {
        "nan": torch.tensor([[0.0, torch.nan, 1.0]]),
        "inf": torch.tensor([[0.0, torch.inf, 1.0]]),
        "two": torch.tensor([[torch.inf, torch.inf, 1.0]]),
        "none": torch.full((1, 3), -torch.inf),
    }
    logits = torch.cat([finite, *kinds.values()])
    for sampling in (Sampling(1), Sampling(1, top_k=2), Sampling(1, top_p=0.9), Sampling(1, temperature=1e-3)):
        for uniform in (2.0**-24, 0.5, 1 - 2.0**-24):
            tokens, log_probs = sample_tokens(logits, torch.full((5,), uniform), sampling)
            assert bool(((tokens >= 0) & (tokens < 3)).all())
            assert int(tokens[0]) != 1
            assert log_probs.isfinite().tolist() == [True, False, False, False, False]


class Reads(TorchDispatchMode):
    """How often the program waits for a number from the device."""

    WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in self.WAITING
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_token_waits_for_the_device_once(is_broken: bool) -> None:
    """Rows that end wait more often, so here none does before the end but the broken ones, at their first token."""
    model, batch, counts = broken(), prompts([6] * 4), []
    batch["prompt_ids"][batch["prompt_ids"] == BROKEN] = BROKEN + 1
    batch["prompt_ids"][:2, 3] = BROKEN if is_broken else BROKEN + 1
    with torch.no_grad():
        model.lm_head.weight *= 100
        model.lm_head.weight[BROKEN] = 0.0  # never drawn
    for length in (8, 16):
        with Reads() as reads:
            responses = TransformersEngine().sample(model, batch, Sampling(length), stop_token_ids=[tiny.VOCABULARY])
        assert responses.failed.tolist() == [is_broken, is_broken, False, False]
        counts.append(reads.count)
    assert 0 < counts[1] - counts[0] <= 8
