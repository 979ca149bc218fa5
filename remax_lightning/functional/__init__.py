"""Pure tensor functions: tensors in, tensors out; torch is the only import."""

from remax_lightning.functional.advantages import KLForm, check_remax_arguments, remax_advantages
from remax_lightning.functional.fused_head import (
    HeadOutput,
    fused_log_probs,
    fused_policy_gradient,
    fused_policy_gradient_loss,
)
from remax_lightning.functional.keyed_random import keyed_uniforms, row_keys
from remax_lightning.functional.log_probs import entropy, kl_k1, kl_k2, kl_k3, masked_mean, token_log_probs
from remax_lightning.functional.losses import bradley_terry_loss, policy_gradient_loss
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
    "KLForm",
    "align_left",
    "bradley_terry_loss",
    "check_remax_arguments",
    "entropy",
    "fused_log_probs",
    "fused_policy_gradient",
    "fused_policy_gradient_loss",
    "keyed_uniforms",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "last_token_index",
    "left_pad",
    "length_mask",
    "masked_mean",
    "policy_gradient_loss",
    "position_ids",
    "remax_advantages",
    "response_lengths",
    "right_pad",
    "row_keys",
    "token_log_probs",
]
