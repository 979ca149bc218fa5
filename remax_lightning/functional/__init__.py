"""Pure tensor functions: tensors in, tensors out; torch is the only import."""

from remax_lightning.functional.advantages import (
    KLForm,
    baseline_advantages,
    check_baseline_arguments,
    leave_one_out,
    leave_one_out_baselines,
    masked_moments,
    mean_of_others,
    normalized,
    remax_advantages,
)
from remax_lightning.functional.fused_head import (
    HeadOutput,
    fused_log_probs,
    fused_policy_gradient,
    fused_policy_gradient_loss,
)
from remax_lightning.functional.keyed_random import keyed_uniforms, row_keys, run_seed
from remax_lightning.functional.log_probs import (
    KLEstimator,
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    response_kl,
    token_log_probs,
)
from remax_lightning.functional.losses import (
    bradley_terry_loss,
    clipped_policy_loss,
    kl_penalty_loss,
    policy_gradient_loss,
    value_loss,
)
from remax_lightning.functional.micro_batches import micro_batches
from remax_lightning.functional.returns import (
    adapted_kl_coef,
    discounted_returns,
    generalized_advantages,
    kl_token_rewards,
)
from remax_lightning.functional.sequence import (
    align_left,
    last_token_index,
    left_pad,
    length_mask,
    position_ids,
    response_lengths,
    right_pad,
)

__all__ = [
    "HeadOutput",
    "KLEstimator",
    "KLForm",
    "adapted_kl_coef",
    "align_left",
    "baseline_advantages",
    "bradley_terry_loss",
    "check_baseline_arguments",
    "clipped_policy_loss",
    "discounted_returns",
    "entropy",
    "fused_log_probs",
    "fused_policy_gradient",
    "fused_policy_gradient_loss",
    "generalized_advantages",
    "keyed_uniforms",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalty_loss",
    "kl_token_rewards",
    "last_token_index",
    "leave_one_out",
    "leave_one_out_baselines",
    "left_pad",
    "length_mask",
    "masked_mean",
    "masked_moments",
    "mean_of_others",
    "micro_batches",
    "normalized",
    "policy_gradient_loss",
    "position_ids",
    "remax_advantages",
    "response_kl",
    "response_lengths",
    "right_pad",
    "row_keys",
    "run_seed",
    "token_log_probs",
    "value_loss",
]
