import pytest
import torch

from remax_lightning.functional import keyed_uniforms, row_keys

DRAWS = 1_000_000
PINNED_KEYS = [8442993811948235340, 7310535718847601820, -5137075878992250326]
PINNED_UNIFORMS = [
    [0.9501380324363708, 0.12453120946884155, 0.8235601782798767],
    [0.8881340622901917, 0.7231826186180115, 0.7092346549034119],
]


def uniforms(seed=0, step=0, prompts=1000, samples=10, positions=100, shift=(0, 0, 0)):
    """Draws over a grid, (prompts, samples, positions); shift moves where the grid starts."""
    prompt, sample = torch.meshgrid(torch.arange(prompts) + shift[0], torch.arange(samples) + shift[1], indexing="ij")
    keys = row_keys(seed, step, prompt.flatten(), sample.flatten())
    position = torch.arange(positions).repeat(len(keys)) + shift[2]
    return keyed_uniforms(keys.repeat_interleave(positions), position).view(prompts, samples, positions)


@pytest.fixture(scope="module")
def grid():
    return uniforms()


def splitmix64(state):
    """The published algorithm (Steele, Lea, Flood 2014), one output after another, in Python integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def nth_output(state, index):
    stream = splitmix64(state)
    for _ in range(index):
        next(stream)
    return next(stream)


def test_the_reference_generator_gives_the_published_outputs():
    stream = splitmix64(1234567)
    assert [next(stream) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(("seed", "step", "prompt", "sample"), [(0, 0, 0, 0), (7, 3, 11, 2), (97, 40, 900, 7)])
def test_keys_and_uniforms_are_those_of_splitmix64(seed, step, prompt, sample):
    key = 0
    for index in (seed, step, prompt, sample):
        key = nth_output(key, index)
    keys = row_keys(seed, step, torch.tensor([prompt]), torch.tensor([sample]))
    assert keys.item() % 2**64 == key
    for position in (0, 1, 50):
        expected = (2 * (nth_output(key, position) >> 41) + 1) / 2**24
        assert keyed_uniforms(keys, position).item() == expected


def test_the_stream_has_not_changed_since_it_was_first_written():
    keys = row_keys(1, 2, torch.tensor([3, 4, -5]), torch.tensor([0, 1, 2]))
    assert keys.tolist() == PINNED_KEYS
    assert torch.stack([keyed_uniforms(keys, t) for t in range(2)]).tolist() == PINNED_UNIFORMS


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    prompt, sample = torch.arange(100) // 4, torch.arange(100) % 4
    position = torch.arange(100) % 7
    keys = row_keys(5, 6, prompt, sample)
    values = keyed_uniforms(keys, position)
    order = torch.arange(100) * 37 % 100
    permuted = keyed_uniforms(row_keys(5, 6, prompt[order], sample[order]), position[order])
    assert torch.equal(permuted, values[order])
    parts = [keyed_uniforms(row_keys(5, 6, prompt[i], sample[i]), position[i]) for i in torch.arange(100).split(33)]
    assert torch.equal(torch.cat(parts), values)
    singles = [keyed_uniforms(keys[i : i + 1], int(position[i])) for i in range(100)]
    assert torch.equal(torch.cat(singles), values)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = uniforms(prompts=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(uniforms(prompts=5), first)


def test_values_are_float32_on_a_grid_inside_the_open_interval(grid):
    assert grid.dtype == torch.float32
    assert grid.min() > 0
    assert grid.max() < 1
    ticks = grid.double() * 2**24
    assert (ticks % 2 == 1).all()


def test_the_extreme_values_stay_inside_the_open_interval(monkeypatch):
    from remax_lightning.functional import keyed_random

    monkeypatch.setattr(keyed_random, "_splitmix64", lambda keys, position: keys)
    values = keyed_uniforms(torch.tensor([0, -1]), 0)  # all 64 bits 0, all 64 bits 1
    assert values.tolist() == [2.0**-24, 1 - 2.0**-24]


def chi_square(bins, num_bins):
    """Distance of the counts from equal ones, in standard deviations of the chi-square distribution."""
    counts = torch.bincount(bins.flatten().long(), minlength=num_bins).double()
    expected = bins.numel() / num_bins
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - (num_bins - 1)) / (2 * (num_bins - 1)) ** 0.5


def test_a_million_draws_are_uniform_in_their_high_and_low_bits(grid):
    assert grid.numel() == DRAWS
    values = grid.double()
    assert abs(values.mean().item() - 1 / 2) < 5 * (1 / 12 / DRAWS) ** 0.5
    assert abs(values.var().item() - 1 / 12) < 5 * (1 / 180 / DRAWS) ** 0.5
    assert abs(chi_square(values * 1000 // 1, 1000)) < 5
    assert abs(chi_square(values * 2**23 // 1 % 1024, 1024)) < 5


def test_each_short_stretch_of_a_stream_is_uniform():
    """Few prompts at many positions, and many prompts at one position: no axis is poorer than the whole."""
    for axes in ({"prompts": 1, "samples": 1, "positions": 50_000}, {"prompts": 50_000, "samples": 1, "positions": 1}):
        assert abs(chi_square(uniforms(**axes) * 100 // 1, 100)) < 5
    steps = torch.cat([keyed_uniforms(row_keys(0, s, *torch.zeros(2, 1).long()), 0) for s in range(5000)])
    seeds = torch.cat([keyed_uniforms(row_keys(s, 0, *torch.zeros(2, 1).long()), 0) for s in range(5000)])
    for values in (steps, seeds):
        assert abs(chi_square(values * 50 // 1, 50)) < 5


@pytest.mark.parametrize(
    "neighbour",
    [{"seed": 1}, {"step": 1}, {"shift": (1, 0, 0)}, {"shift": (0, 1, 0)}, {"shift": (0, 0, 1)}],
    ids=["seed", "step", "prompt", "sample", "position"],
)
def test_neighbours_are_independent(grid, neighbour):
    other = uniforms(**neighbour)
    correlation = torch.corrcoef(torch.stack([grid.flatten(), other.flatten()]).double())[0, 1]
    assert abs(correlation.item()) < 5 / DRAWS**0.5
    pairs = (grid * 32).floor() * 32 + (other * 32).floor()
    assert abs(chi_square(pairs, 1024)) < 5
    assert (grid == other).sum() < 10


def test_no_two_of_a_million_keys_collide():
    prompt, sample = torch.meshgrid(torch.arange(-50, 50), torch.arange(10), indexing="ij")
    pairs = [(seed, step) for seed in range(-1, 9) for step in range(100)]
    keys = torch.cat([row_keys(seed, step, prompt.flatten(), sample.flatten()) for seed, step in pairs])
    assert keys.unique().numel() == keys.numel() == DRAWS


def test_any_integer_seeds_modulo_two_to_the_64():
    zeros = torch.zeros(1, dtype=torch.long)
    seeds = [0, 1, -1, 2**63, 2**63 - 1, 2**32]
    assert torch.cat([row_keys(seed, 0, zeros, zeros) for seed in seeds]).unique().numel() == len(seeds)
    assert row_keys(2**64 + 5, 0, zeros, zeros).equal(row_keys(5, 0, zeros, zeros))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_values(grid):
    index = torch.arange(1000, device="cuda")
    values = keyed_uniforms(row_keys(0, 0, index, torch.zeros_like(index)), 7)
    assert torch.equal(values.cpu(), grid[:, 0, 7])
