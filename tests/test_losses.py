"""Each loss against a naive float64 implementation, gradcheck, and the identities of the paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2o import losses
from d2o.contracts import CONTRACTS
from d2o.losses import Side
from d2o.settings import Method

floats = st.floats(-300, -1e-3)
sides = st.lists(st.tuples(floats, floats, st.integers(1, 200)), min_size=1, max_size=6)


def side(rows, grad=False) -> Side:
    logprobs, references, lengths = (torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True))
    return Side(logprobs.requires_grad_(grad), references, lengths, logprobs.detach())


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


NAIVE = {
    "d2o": lambda p, n, m: (
        -log_sigmoid(m.beta / len(p) * sum(lp - r for lp, r, _ in p) - m.alpha * (n[0][0] - n[0][1]))
    ),
    "dpo": lambda p, n, m: -log_sigmoid(m.beta * ((p[0][0] - p[0][1]) - (n[0][0] - n[0][1]))),
    "sft": lambda p, n, m: sum(-lp / length for lp, _, length in p) / len(p),
}


def method(loss: str, beta=0.1, alpha=0.1) -> Method:
    return Method(loss=loss, **({"beta": beta, "alpha": alpha} if loss == "d2o" else {"beta": beta}))


def test_every_loss_has_a_second_implementation_and_a_contract():
    assert losses.LOSSES.keys() >= NAIVE.keys()
    assert losses.LOSSES.keys() <= CONTRACTS.keys()


@pytest.mark.parametrize("name", NAIVE)
@given(positives=sides, negatives=sides, beta=st.floats(0.01, 3), alpha=st.floats(0, 3))
def test_equals_the_naive_implementation(name, positives, negatives, beta, alpha):
    positives = positives[:1] if CONTRACTS[name].positives == "one" else positives
    m = method(name, beta, alpha)
    found = losses.of(m)(side(positives), side(negatives[:1]))
    assert found.shape == ()
    assert found.item() == pytest.approx(NAIVE[name](positives, negatives, m), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAIVE)
def test_gradients(name):
    torch.manual_seed(0)
    k = 1 if CONTRACTS[name].positives == "one" else 4
    fixed = [torch.randn(n, dtype=torch.float64) for n in (k, 1)]
    lengths = [torch.full((n,), 7.0, dtype=torch.float64) for n in (k, 1)]

    def loss(up, down):
        return losses.of(method(name))(Side(up, fixed[0], lengths[0], up), Side(down, fixed[1], lengths[1], down))

    inputs = tuple(torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (k, 1))
    assert torch.autograd.gradcheck(loss, inputs)


@given(
    positives=sides.map(lambda rows: rows[:1]), negatives=sides.map(lambda rows: rows[:1]), beta=st.floats(0.01, 3)
)
def test_d2o_with_one_positive_and_alpha_beta_is_dpo(positives, negatives, beta):
    d2o = losses.of(method("d2o", beta, beta))(side(positives), side(negatives))
    dpo = losses.of(method("dpo", beta))(side(positives), side(negatives))
    torch.testing.assert_close(d2o, dpo, rtol=1e-9, atol=1e-12)


@given(positives=sides, negatives=sides.map(lambda rows: rows[:1]), beta=st.floats(0.01, 1))
def test_instance_level_dpo_bounds_d2o_from_above(positives, negatives, beta):
    """Jensen: the mean of the losses over positives is at least the loss of the mean."""
    whole = losses.of(method("d2o", beta, beta))(side(positives), side(negatives))
    each = [losses.of(method("dpo", beta))(side([row]), side(negatives)) for row in positives]
    assert torch.stack(each).mean() >= whole - 1e-9


@given(rows=sides)
def test_at_the_reference_the_loss_is_log_2_and_the_weight_one_half(rows):
    rows = [(lp, lp, n) for lp, _, n in rows]
    positives, negatives = side(rows, grad=True), side(rows[:1], grad=True)
    loss = losses.of(method("d2o", beta=0.1, alpha=0.2))(positives, negatives)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(positives.logprobs.grad, torch.full((len(rows),), -0.5 * 0.1 / len(rows)).double())
    torch.testing.assert_close(negatives.logprobs.grad, torch.tensor([0.5 * 0.2]).double())
