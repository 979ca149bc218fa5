"""How much of a policy gradient's variance a baseline takes away.

With the advantage A_i = r_i - b_i and the score s_i, the gradient of log p(y_i), the gradient of N responses is the
mean of A_i s_i. Its variance (the trace of its covariance) has a part within the prompts, from the draw of responses
to given prompts, and one between them, from the draw of prompts. The second is the variance of the prompts' expected
gradients, which are the same for every baseline that does not look at its own response. So only the first part tells
baselines apart, and it is what is estimated here, times N: a number for each response, whatever N is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from remax_lightning.functional._checks import require_shape

BASELINES = ("none", "greedy", "leave_one_out", "batch_mean")
"""Order of the columns of advantages and variances: b_i is 0; the reward of the prompt's greedy response; the mean
reward of the prompt's other responses; that of all other responses of the batch."""

_NONE, _GREEDY = 0, 1
_CHUNK = 2**20


class VarianceSums(NamedTuple):
    """What the variances are computed from; those of several processes add up, field by field.

    Attributes:
        num_responses: N, ().
        num_prompts: ().
        num_helped: Prompts whose gradient varies less with the greedy baseline than with none, ().
        second_moments: Sum of |A_i s_i|^2 with each baseline, (4,).
        squared_means: Estimate of the sum of |g_i|^2, where g_i is the expected gradient of i's prompt, ().
        leave_one_out_covariance: Estimate of the sum of Cov(A_i s_i, A_j s_j), i != j, with that baseline, ().
        gradient: Sum of A_i s_i with the greedy baseline, (d,).
    """

    num_responses: Tensor
    num_prompts: Tensor
    num_helped: Tensor
    second_moments: Tensor
    squared_means: Tensor
    leave_one_out_covariance: Tensor
    gradient: Tensor


@torch.no_grad()
def variance_sums(scores: Tensor, advantages: Tensor, prompt: Tensor) -> VarianceSums:
    """Sums over responses for `gradient_variances`.

    The squared expected gradient of a prompt is estimated without bias, and alike for all baselines, by the products
    of different responses with the greedy baseline, which are independent: (|sum_i A_i s_i|^2 - sum_i |A_i s_i|^2) /
    (n (n - 1)). This is what Bessel's n / (n - 1) does for independent A_i s_i.

    Args:
        scores: Gradient of each response's log-prob, or a projection of it that keeps inner products, (N, d).
        advantages: Reward less each of the BASELINES, (N, 4).
        prompt: Number of each response's prompt, (N,) long; each has at least two responses.

    Returns:
        Sums, float64.

    Raises:
        ValueError: If a shape does not match, or a prompt has one response alone.
    """
    require_shape((len(scores), len(BASELINES)), "one value per response and baseline, (N, 4)", advantages=advantages)
    require_shape(scores.shape[:1], "one number per response, (N,)", prompt=prompt)
    scores, advantages = scores.double(), advantages.double()
    _, place, sizes = prompt.unique(return_inverse=True, return_counts=True)
    if bool((sizes < 2).any()):
        raise ValueError("a variance within a prompt takes at least 2 responses to each, got a prompt with 1; drop it")

    def by_prompt(values: Tensor) -> Tensor:
        return values.new_zeros(len(sizes), values.shape[1]).index_add_(0, place, values)

    moments = by_prompt(advantages.square() * scores.square().sum(1, keepdim=True))  # (prompts, 4)
    gradients = by_prompt(advantages[:, _GREEDY, None] * scores)  # (prompts, d)
    products = gradients.square().sum(1) - moments[:, _GREEDY]  # over the pairs i != j of a prompt
    others = (sizes - 1).double()
    count = torch.ones_like(others)
    return VarianceSums(
        num_responses=sizes.sum().double(),
        num_prompts=count.sum(),
        num_helped=count[moments[:, _GREEDY] < moments[:, _NONE]].sum(),
        second_moments=moments.sum(0),
        squared_means=(products / others).sum(),
        leave_one_out_covariance=(products / others.square()).sum(),
        gradient=gradients.sum(0),
    )


def gradient_variances(sums: VarianceSums) -> Tensor:
    """Variance of the mean gradient of N responses to given prompts, times N, with each of the BASELINES.

    Without a baseline and with the greedy one the A_i s_i of given prompts are independent, so this is the mean
    variance of one. A baseline b_i = sum_j W_ij r_j of other responses makes them dependent: E[s] = 0 leaves
    Cov(A_i s_i, A_j s_j) = W_ij W_ji g_i . g_j, which is added; W_ij is 1 / (n - 1) within a prompt of n responses for
    leave-one-out, 1 / (N - 1) everywhere for the batch's mean. The estimate is unbiased, so it may fall below 0 where
    it has few responses.

    Args:
        sums: Sums over the responses of all processes.

    Returns:
        Variances in squared reward times squared gradient of a log-prob (nats per unit of the weights), (4,);
        NaN without a response.

    Reference: Greensmith, Bartlett, Baxter 2004, jmlr.org/papers/v5/greensmith04a.html, on baselines and variance; Li
        et al. 2024, arXiv 2310.10505, on the greedy one.
    """
    products = sums.gradient.square().sum() - sums.second_moments[_GREEDY]  # over all pairs i != j
    batch_mean_covariance = products / (sums.num_responses - 1).square()
    independent = torch.zeros_like(products)
    covariances = torch.stack([independent, independent, sums.leave_one_out_covariance, batch_mean_covariance])
    return (sums.second_moments - sums.squared_means + covariances) / sums.num_responses


@torch.no_grad()
def count_sketch(gradients: Sequence[Tensor], dimensions: int, *, seed: int) -> Tensor:
    """Projection of a long vector to a few dimensions that keeps inner products in expectation over seeds.

    Each coordinate is added, with a random sign, to a random one of the dimensions. Signs and places are drawn again
    from the seed at each call, a chunk of coordinates at a time: nothing of the size of dimensions times coordinates
    is ever there, and no other random number changes. The standard deviation of an inner product is at most
    sqrt(2 / dimensions) times the product of the norms.

    Args:
        gradients: Parts of the vector, in any shapes, on one device; another vector's must have the same.
        dimensions: Length of the projection.
        seed: Picks the projection; the same for vectors that are to be multiplied, which have to be on the same kind
            of device.

    Returns:
        Projection, (dimensions,), float32 or float64.

    Raises:
        ValueError: If dimensions is below 1.

    Reference: Charikar, Chen, Farach-Colton 2002, doi 10.1007/3-540-45465-9_59; Weinberger et al. 2009, arXiv
        0902.2206, on inner products.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions is the length of the projection and must be at least 1, got {dimensions}")
    device = gradients[0].device
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    sums = torch.zeros(2 * dimensions, device=device, dtype=dtype)  # each place twice: what is added, what is taken off
    for gradient in gradients:
        for chunk in gradient.flatten().split(_CHUNK):
            places = torch.randint(2 * dimensions, chunk.shape, generator=generator, device=device)
            sums.index_add_(0, places, chunk.to(dtype))
    return sums[:dimensions] - sums[dimensions:]
