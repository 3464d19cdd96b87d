"""The losses: each is a small pure function of one response group.

Every loss takes the two sides of a group and returns a scalar to minimise. `contracts.py` states what each loss
needs of a group and has the defaults of its parameters. Notation: y_w is a positive, y_l a negative; lp is a log-prob
summed over the tokens of a response, in nats; m = lp / |y|; lr = lp_θ − lp_ref; h = lr(y_w) − lr(y_l).
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

# The smallest value of 1 − p: so log(1 − p) and its gradient stay finite when the model is certain (p near 1).
FLOOR = 1e-5


class Side(NamedTuple):
    """The positives or the negatives of one group. Each tensor has the shape [n], one value per response.

    Gradients flow through `logprobs` and `complements`, the values of the policy.

    Attributes:
        logprobs: log π_θ(y|x), summed over tokens, nats.
        reference_logprobs: log π_ref(y|x), summed over tokens, nats; NaN if the loss needs no reference.
        lengths: |y|, tokens.
        complements: Σ_t log(1 − p_t), nats; 1 − p_t is at least `FLOOR`.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    lengths: Tensor
    complements: Tensor

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor, reference_logprobs: Tensor) -> Side:
        """Make a side from the log-probs of its tokens. All arguments are on one device.

        Args:
            tokens: [T] log π_θ(y_t|x, y_<t), the responses one after the other.
            lengths: [n] integers, tokens of each response; their sum is T.
            reference_logprobs: [n] as the attribute.
        """
        owner = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths, output_size=len(tokens))

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(lengths)).index_add(0, owner, values)

        return cls(total(tokens), reference_logprobs, lengths.to(tokens.dtype), total(_complement(tokens)))

    def part(self, start: int, stop: int) -> Side:
        """The side with the responses from `start` up to `stop`, `stop` not included."""
        return Side(*(values[start:stop] for values in self))

    @property
    def logratios(self) -> Tensor:
        """log (π_θ(y|x) / π_ref(y|x)), nats, shape [n]."""
        return self.logprobs - self.reference_logprobs

    @property
    def means(self) -> Tensor:
        """Log-prob per token, nats, shape [n]."""
        return self.logprobs / self.lengths


def terms(positives: Side, negatives: Side) -> list[tuple[Side, Side]]:
    """The terms whose mean is a group's loss: its positives with each negative, or with none if there is none."""
    each = [negatives.part(i, i + 1) for i in range(len(negatives.logprobs))]
    return [(positives, negative) for negative in each or [negatives]]


def _complement(logprobs: Tensor) -> Tensor:
    """log(1 − p) from log p, in the same shape and accurate for p near 1. 1 − p is at least `FLOOR`."""
    return torch.log(-torch.expm1(logprobs.clamp(max=math.log1p(-FLOOR))))


def _margin(positives: Side, negatives: Side) -> Tensor:
    """h = lr(y_w) − lr(y_l) of a pair, nats, scalar."""
    return positives.logratios.mean() - negatives.logratios.mean()


def d2o(positives: Side, negatives: Side, *, beta: float, alpha: float) -> Tensor:
    """Distributional dispreference optimisation, arXiv 2403.03419, Eq. 3: −log σ(β mean_i lr(y_i) − α lr(y_l)).

        −log σ( (β/K) Σ_i log π_θ(y_i|x)/π_r−(y_i|x) − α log π_θ(y_l|x)/π_r+(y_l|x) )

    The mean over the K positives is inside the sigmoid: one sigmoid per (x, y_l). With K = 1, α = β and one reference
    it is DPO. With β = 0 it is α/2 times NPO. If the policy equals its references, it is log 2.
    """
    return -logsigmoid(beta * positives.logratios.mean() - alpha * negatives.logratios.mean())


def d2o_instance(positives: Side, negatives: Side, *, beta: float, alpha: float) -> Tensor:
    """D2O's ablation at instance level, arXiv 2403.03419, Table 2: (1/K) Σ_i −log σ(β lr(y_i) − α lr(y_l)).

    The mean over the K positives is outside the sigmoid. By Jensen's inequality it is at least the loss of D2O.
    """
    return -logsigmoid(beta * positives.logratios - alpha * negatives.logratios.mean()).mean()


def dpo(positives: Side, negatives: Side, *, beta: float) -> Tensor:
    """Direct preference optimisation, arXiv 2305.18290, Eq. 7: −log σ(β h).

    It depends on the difference only, so both log-probs may fall together.
    """
    return -logsigmoid(beta * _margin(positives, negatives))


def cdpo(positives: Side, negatives: Side, *, beta: float, epsilon: float) -> Tensor:
    """Conservative DPO, ericmitchell.ai/cdpo.pdf, Eq. 3: −(1−ε) log σ(β h) − ε log σ(−β h).

    It assumes labels that are flipped with probability ε < ½. Its minimum is at σ(β h) = 1 − ε, so h stays finite.
    """
    scaled = beta * _margin(positives, negatives)
    return -(1 - epsilon) * logsigmoid(scaled) - epsilon * logsigmoid(-scaled)


def robust_dpo(positives: Side, negatives: Side, *, beta: float, epsilon: float) -> Tensor:
    """Robust DPO, arXiv 2403.00409: [−(1−ε) log σ(β h) + ε log σ(−β h)] / (1−2ε).

    If labels are flipped with probability ε < ½, its expectation is the loss of DPO on the true labels. It has no
    lower bound for large h.
    """
    scaled = beta * _margin(positives, negatives)
    return (-(1 - epsilon) * logsigmoid(scaled) + epsilon * logsigmoid(-scaled)) / (1 - 2 * epsilon)


def dpop(positives: Side, negatives: Side, *, beta: float, penalty: float) -> Tensor:
    """DPO-Positive, arXiv 2402.13228, Eq. 3: −log σ(β [h − λ max(0, −lr(y_w))]).

    The penalty λ counts only if a positive is less likely than under the reference. The paper's λ is 50.
    """
    fall = relu(-positives.logratios.mean())
    return -logsigmoid(beta * (_margin(positives, negatives) - penalty * fall))


def ipo(positives: Side, negatives: Side, *, tau: float, token_means: bool) -> Tensor:
    """Identity preference optimisation, arXiv 2310.12036, Eq. 17: (h − 1/(2τ))².

    With `token_means`, h is the difference of log-ratios per token, as in some libraries. The same τ then asks for a
    much larger difference of the sums.
    """
    up, down = (side.logratios / side.lengths if token_means else side.logratios for side in (positives, negatives))
    return (up.mean() - down.mean() - 1 / (2 * tau)) ** 2


def slic_hf(positives: Side, negatives: Side, *, delta: float, weight: float) -> Tensor:
    """Sequence likelihood calibration, arXiv 2305.10425: max(0, δ − lp(y_w) + lp(y_l)) − λ lp(y_ref).

    Here the target answer y_ref of the second term is the positive itself.
    """
    up, down = positives.logprobs.mean(), negatives.logprobs.mean()
    return relu(delta - up + down) - weight * up


def simpo(positives: Side, negatives: Side, *, beta: float, gamma: float) -> Tensor:
    """Simple preference optimisation, arXiv 2405.14734, Eq. 6: −log σ(β m(y_w) − β m(y_l) − γ).

    Its authors advise β from 2 to 2.5 and γ/β = 0.5. DPO's β = 0.1 is too small for it, because m is a few nats at
    most.
    """
    return -logsigmoid(beta * (positives.means.mean() - negatives.means.mean()) - gamma)


def kto(
    positives: Side, negatives: Side, *, beta: float, desirable: float, undesirable: float, z0: Tensor | float
) -> Tensor:
    """Kahneman–Tversky optimisation, arXiv 2402.01306: λ_D (1 − σ(β (lr − z0))) or λ_U (1 − σ(β (z0 − lr))).

    The first term is for a positive, the second for a negative. The loss is the mean of the two sides, each the mean
    over its responses. The authors take the mean over all responses, and set the weights so that λ_D times the number
    of positives is about λ_U times that of negatives: here equal weights do so for every K.

    Args:
        z0: max(0, mean lr of mismatched pairs) over the groups of the step, nats, scalar, without a gradient.
    """
    gains = desirable * torch.sigmoid(beta * (z0 - positives.logratios))
    losses = undesirable * torch.sigmoid(beta * (negatives.logratios - z0))
    return (gains.mean() + losses.mean()) / 2


def orpo(positives: Side, negatives: Side, *, weight: float) -> Tensor:
    """Odds ratio preference optimisation, arXiv 2403.07691, Eq. 6: −m(y_w) − λ log σ(log odds(y_w)/odds(y_l)).

    odds = P/(1 − P) with P = e^m, computed in log space; 1 − P is at least `FLOOR`.
    """
    up, down = ((side.means - _complement(side.means)).mean() for side in (positives, negatives))
    return sft(positives, negatives) - weight * logsigmoid(up - down)


def npo(positives: Side, negatives: Side, *, beta: float) -> Tensor:
    """Negative preference optimisation, arXiv 2404.05868, Eq. 3: −(2/β) log σ(−β lr(y_l)). Positives play no part."""
    return -2 / beta * logsigmoid(-beta * negatives.logratios).mean()


def ga(positives: Side, negatives: Side) -> Tensor:
    """Gradient ascent on the negatives, arXiv 2210.01504: m(y_l). Positives play no part.

    It has no lower bound: a long training destroys the model, so stop early.
    """
    return negatives.means.mean()


def unlikelihood(positives: Side, negatives: Side) -> Tensor:
    """Unlikelihood, arXiv 1908.04319: −(1/|y_l|) Σ_t log(1 − p_t(y_l)), plus SFT where the group has positives.

    Both terms are means over tokens, so that neither dominates the other.
    """
    loss = -(negatives.complements / negatives.lengths).mean()
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
    """The loss of a method with its parameters filled in.

    Call it with positives and negatives, and with `z0` if its contract is `mismatched`.
    """
    return partial(LOSSES[method.loss], **{key: getattr(method, key) for key in CONTRACTS[method.loss].parameters})
