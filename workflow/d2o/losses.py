"""The losses, each a small pure function of one response group.

Every loss takes the two sides of a group and returns a scalar to minimise, in nats where it is one logarithm. What a
loss needs of a group, and the defaults of its parameters, stand in `contracts.py`. The notation: lp a log-prob summed
over the response's tokens, m = lp / |y|, lr = lp_θ − lp_ref, y_w a positive, y_l a negative, h = lr(y_w) − lr(y_l).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from d2o.contracts import CONTRACTS
from d2o.settings import Method

# Below it 1 − p counts as this much: log(1 − p) and its gradient stay finite where the model is certain.
FLOOR = 1e-5


class Side(NamedTuple):
    """The positives, or the negatives, of one group; all of shape [n]. Gradients flow through the policy's own
    values, `logprobs` and `complements`.

    Attributes:
        logprobs: log π_θ(y|x), sums over tokens, nats.
        references: log π_ref(y|x), likewise; NaN where the loss needs no reference.
        lengths: |y|, tokens.
        complements: Σ_t log(1 − p_t), sums over tokens, nats; 1 − p_t is at least `FLOOR`.
    """

    logprobs: Tensor
    references: Tensor
    lengths: Tensor
    complements: Tensor

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor, references: Tensor) -> Side:
        """A side out of the log-probs of its tokens; all arguments on one device.

        Args:
            tokens: log π_θ(y_t|x, y_<t), [T], the responses one after the other.
            lengths: tokens of each response, integers that add up to T, [n].
            references: as the attribute, [n].
        """
        owner = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths, output_size=len(tokens))

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(lengths)).index_add(0, owner, values)

        return cls(total(tokens), references, lengths.to(tokens.dtype), total(_complement(tokens)))

    def part(self, start: int, stop: int) -> Side:
        """Some of the responses."""
        return Side(*(values[start:stop] for values in self))

    @property
    def logratios(self) -> Tensor:
        """log π_θ(y|x) / π_ref(y|x), shape [n]."""
        return self.logprobs - self.references

    @property
    def means(self) -> Tensor:
        """Log-prob per token, shape [n]."""
        return self.logprobs / self.lengths


def _complement(logprobs: Tensor) -> Tensor:
    """log(1 − p) from log p, same shape, without cancellation for p near 1; 1 − p is at least `FLOOR`."""
    return torch.log(-torch.expm1(logprobs.clamp(max=math.log1p(-FLOOR))))


def _margin(positives: Side, negatives: Side) -> Tensor:
    """h = lr(y_w) − lr(y_l) of a pair, scalar."""
    return positives.logratios.mean() - negatives.logratios.mean()


def d2o(positives: Side, negatives: Side, *, beta: float, alpha: float) -> Tensor:
    """Distributional dispreference optimisation, arXiv 2403.03419, Eq. 3: −log σ(β mean_i lr(y_i) − α lr(y_l)).

        −log σ( (β/K) Σ_i log π_θ(y_i|x)/π_r−(y_i|x) − α log π_θ(y_l|x)/π_r+(y_l|x) )

    The mean over the K positives stands inside the sigmoid: one sigmoid per (x, y_l). With K = 1, α = β and one
    reference it is DPO; with β = 0 it is α/2 times NPO; with the policy at its references it is log 2.
    """
    return -logsigmoid(beta * positives.logratios.mean() - alpha * negatives.logratios.mean())


def d2o_instance(positives: Side, negatives: Side, *, beta: float, alpha: float) -> Tensor:
    """D2O's ablation at instance level, arXiv 2403.03419, Table 2: (1/K) Σ_i −log σ(β lr(y_i) − α lr(y_l)).

    The mean over the K positives stands outside the sigmoid. By Jensen it is at least D2O's loss.
    """
    return -logsigmoid(beta * positives.logratios - alpha * negatives.logratios.mean()).mean()


def dpo(positives: Side, negatives: Side, *, beta: float) -> Tensor:
    """Direct preference optimisation, arXiv 2305.18290, Eq. 7: −log σ(β h).

    It rewards the difference only: both log-probs may fall together.
    """
    return -logsigmoid(beta * _margin(positives, negatives))


def cdpo(positives: Side, negatives: Side, *, beta: float, epsilon: float) -> Tensor:
    """Conservative DPO, ericmitchell.ai/cdpo.pdf, Eq. 3: −(1−ε) log σ(β h) − ε log σ(−β h).

    For labels flipped with probability ε < ½. It stops at σ(β h) = 1 − ε instead of driving h to infinity.
    """
    scaled = beta * _margin(positives, negatives)
    return -(1 - epsilon) * logsigmoid(scaled) - epsilon * logsigmoid(-scaled)


def robust_dpo(positives: Side, negatives: Side, *, beta: float, epsilon: float) -> Tensor:
    """Robust DPO, arXiv 2403.00409: [−(1−ε) log σ(β h) + ε log σ(−β h)] / (1−2ε).

    Its mean over labels flipped with probability ε < ½ is DPO's loss on the true ones. Unbounded below for large h.
    """
    scaled = beta * _margin(positives, negatives)
    return (-(1 - epsilon) * logsigmoid(scaled) + epsilon * logsigmoid(-scaled)) / (1 - 2 * epsilon)


def dpop(positives: Side, negatives: Side, *, beta: float, penalty: float) -> Tensor:
    """DPO-Positive, arXiv 2402.13228, Eq. 3: −log σ(β [h − λ max(0, −lr(y_w))]).

    The penalty λ sets in where a positive is less likely than under the reference. The paper's λ is 50.
    """
    fall = relu(-positives.logratios.mean())
    return -logsigmoid(beta * (_margin(positives, negatives) - penalty * fall))


def ipo(positives: Side, negatives: Side, *, tau: float, token_means: bool) -> Tensor:
    """Identity preference optimisation, arXiv 2310.12036, Eq. 17: (h − 1/(2τ))².

    `token_means` takes h of log-ratios per token, as some libraries do; the same τ then asks for far more.
    """
    up, down = (side.logratios / side.lengths if token_means else side.logratios for side in (positives, negatives))
    return (up.mean() - down.mean() - 1 / (2 * tau)) ** 2


def slic_hf(positives: Side, negatives: Side, *, delta: float, weight: float) -> Tensor:
    """Sequence likelihood calibration, arXiv 2305.10425: max(0, δ − lp(y_w) + lp(y_l)) − λ lp(y_ref).

    The reference answer y_ref of the second term is the positive itself.
    """
    up, down = positives.logprobs.mean(), negatives.logprobs.mean()
    return relu(delta - up + down) - weight * up


def simpo(positives: Side, negatives: Side, *, beta: float, gamma: float) -> Tensor:
    """Simple preference optimisation, arXiv 2405.14734, Eq. 6: −log σ(β m(y_w) − β m(y_l) − γ).

    Its authors advise β of 2 to 2.5 and γ/β of 0.5; DPO's β = 0.1 under-tunes it, for m is a few nats at most.
    """
    return -logsigmoid(beta * (positives.means.mean() - negatives.means.mean()) - gamma)


def kto(
    positives: Side, negatives: Side, *, beta: float, desirable: float, undesirable: float, z0: Tensor | float
) -> Tensor:
    """Kahneman–Tversky optimisation, arXiv 2402.01306: λ_D (1 − σ(β (lr − z0))) or λ_U (1 − σ(β (z0 − lr))).

    The first for a positive, the second for a negative; the mean over the answers of the group.

    Args:
        z0: max(0, mean lr of mismatched pairs) over the step's groups, nats, scalar and detached.
    """
    gains = desirable * torch.sigmoid(beta * (z0 - positives.logratios))
    losses = undesirable * torch.sigmoid(beta * (negatives.logratios - z0))
    return torch.cat([gains, losses]).mean()


def orpo(positives: Side, negatives: Side, *, weight: float) -> Tensor:
    """Odds ratio preference optimisation, arXiv 2403.07691, Eq. 6: −m(y_w) − λ log σ(log odds(y_w)/odds(y_l)).

    odds = P/(1 − P) with P = e^m, taken in log space; 1 − P is at least `FLOOR`.
    """
    up, down = ((side.means - _complement(side.means)).mean() for side in (positives, negatives))
    return sft(positives, negatives) - weight * logsigmoid(up - down)


def npo(positives: Side, negatives: Side, *, beta: float) -> Tensor:
    """Negative preference optimisation, arXiv 2404.05868, Eq. 3: −(2/β) log σ(−β lr(y_l)). Positives play no part."""
    return -2 / beta * logsigmoid(-beta * negatives.logratios).mean()


def ga(positives: Side, negatives: Side) -> Tensor:
    """Gradient ascent on the negatives, arXiv 2210.01504: m(y_l). Positives play no part.

    Unbounded below: it goes on to destroy the model, so stop early.
    """
    return negatives.means.mean()


def unlikelihood(positives: Side, negatives: Side) -> Tensor:
    """Unlikelihood, arXiv 1908.04319: −Σ_t log(1 − p_t(y_l)), plus SFT where the group has positives."""
    loss = -negatives.complements.mean()
    return loss + sft(positives, negatives) if len(positives.logprobs) else loss


def sft(positives: Side, negatives: Side) -> Tensor:
    """Supervised fine-tuning: −m(y_w), averaged over the positives. Negatives play no part."""
    return -positives.means.mean()


LOSSES = {
    "d2o": d2o,
    "d2o-instance": d2o_instance,
    "dpo": dpo,
    "cdpo": cdpo,
    "robust-dpo": robust_dpo,
    "dpop": dpop,
    "ipo": ipo,
    "slic-hf": slic_hf,
    "simpo": simpo,
    "kto": kto,
    "orpo": orpo,
    "npo": npo,
    "ga": ga,
    "unlikelihood": unlikelihood,
    "sft": sft,
}


def of(method: Method) -> Callable[..., Tensor]:
    """A method's loss with its parameters filled in: called with positives and negatives, and with `z0` where its
    contract says `mismatched`."""
    return partial(LOSSES[method.loss], **{key: getattr(method, key) for key in CONTRACTS[method.loss].parameters})
