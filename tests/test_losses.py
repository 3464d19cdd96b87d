"""Each loss against a naive float64 implementation, its gradient, its contract, and the papers' identities."""

import inspect
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2o import losses
from d2o.contracts import CONTRACTS
from d2o.losses import FLOOR, Side
from d2o.settings import Method

LOG2 = math.log(2)


class Answer(NamedTuple):
    """A response in plain Python: the log-probs of its tokens, and their sum under the reference."""

    tokens: list[float]
    reference: float

    @property
    def lp(self) -> float:
        return sum(self.tokens)

    @property
    def lr(self) -> float:
        return self.lp - self.reference

    @property
    def m(self) -> float:
        return self.lp / len(self.tokens)


def side(answers: list[Answer], dtype=torch.float64) -> tuple[Side, torch.Tensor]:
    """A side, and the leaf tensor of its tokens' log-probs."""
    tokens = torch.tensor([t for a in answers for t in a.tokens], dtype=dtype, requires_grad=True)
    lengths = torch.tensor([len(a.tokens) for a in answers], dtype=torch.long)
    return Side.of(tokens, lengths, torch.tensor([a.reference for a in answers], dtype=dtype)), tokens


def value(name: str, positives: list[Answer], negatives: list[Answer], z0: float = 0.0, **parameters) -> float:
    loss = losses.of(Method(loss=name, **parameters))
    extra = {"z0": torch.tensor(z0, dtype=torch.float64)} if CONTRACTS[name].mismatched else {}
    result = loss(side(positives)[0], side(negatives)[0], **extra)
    assert result.shape == ()
    return result.item()


# Every loss once more, in plain floats ------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def log_complement(logprob: float) -> float:
    return math.log(max(1 - math.exp(logprob), FLOOR))


def naive_d2o(up, down, beta, alpha):
    return -log_sigmoid(beta / len(up) * sum(a.lr for a in up) - alpha * down[0].lr)


def naive_d2o_instance(up, down, beta, alpha):
    return mean(-log_sigmoid(beta * a.lr - alpha * down[0].lr) for a in up)


def naive_dpo(up, down, beta):
    return -log_sigmoid(beta * (up[0].lr - down[0].lr))


def naive_cdpo(up, down, beta, epsilon):
    h = up[0].lr - down[0].lr
    return -(1 - epsilon) * log_sigmoid(beta * h) - epsilon * log_sigmoid(-beta * h)


def naive_robust_dpo(up, down, beta, epsilon):
    h = up[0].lr - down[0].lr
    return (-(1 - epsilon) * log_sigmoid(beta * h) + epsilon * log_sigmoid(-beta * h)) / (1 - 2 * epsilon)


def naive_dpop(up, down, beta, penalty):
    return -log_sigmoid(beta * (up[0].lr - down[0].lr - penalty * max(0.0, up[0].reference - up[0].lp)))


def naive_ipo(up, down, tau, token_means):
    first, second = (a.lr / len(a.tokens) if token_means else a.lr for a in (up[0], down[0]))
    return (first - second - 0.5 / tau) ** 2


def naive_slic_hf(up, down, delta, weight):
    return max(0.0, delta - up[0].lp + down[0].lp) - weight * up[0].lp


def naive_simpo(up, down, beta, gamma):
    return -log_sigmoid(beta * up[0].m - beta * down[0].m - gamma)


def naive_kto(up, down, beta, desirable, undesirable, z0):
    gains = mean(desirable * (1 - sigmoid(beta * (a.lr - z0))) for a in up)
    return (gains + mean(undesirable * (1 - sigmoid(beta * (z0 - a.lr))) for a in down)) / 2


def naive_orpo(up, down, weight):
    first, second = (a.m - log_complement(a.m) for a in (up[0], down[0]))
    return -up[0].m - weight * log_sigmoid(first - second)


def naive_npo(up, down, beta):
    return -(2 / beta) * log_sigmoid(-beta * down[0].lr)


def naive_ga(up, down):
    return down[0].m


def naive_unlikelihood(up, down):
    return mean(-log_complement(t) for t in down[0].tokens) + (naive_sft(up, down) if up else 0.0)


def naive_sft(up, down):
    return mean(-a.m for a in up)


NAIVE = {name: globals()["naive_" + name.replace("-", "_")] for name in CONTRACTS}

# What hypothesis generates ------------------------------------------------------------------------

answers = st.builds(Answer, st.lists(st.floats(-30, 0), min_size=1, max_size=8), st.floats(-200, 0))
one = st.lists(answers, min_size=1, max_size=1)
many = st.lists(answers, min_size=1, max_size=5)
POSITIVES = {"none": st.just([]), "one": one, "many": many, "any": st.lists(answers, max_size=3)}
betas, epsilons = st.floats(0.01, 3), st.floats(0, 0.45)
PARAMETERS = {
    "beta": betas,
    "alpha": st.floats(0, 3),
    "gamma": st.floats(0, 3),
    "delta": st.floats(0, 10),
    "epsilon": epsilons,
    "tau": st.floats(0.01, 3),
    "token_means": st.booleans(),
    "penalty": st.floats(0, 100),
    "weight": st.floats(0, 3),
    "desirable": st.floats(0, 3),
    "undesirable": st.floats(0, 3),
}


@st.composite
def cases(draw, name: str):
    """Positives, negatives and parameters that a loss takes."""
    contract = CONTRACTS[name]
    parameters = {key: draw(PARAMETERS[key]) for key in contract.parameters}
    if contract.mismatched:
        parameters["z0"] = draw(st.floats(0, 50))
    return draw(POSITIVES[contract.positives]), draw(one) if contract.negative else [], parameters


def close(expected: float):
    return pytest.approx(expected, rel=1e-7, abs=1e-7)


# All losses ---------------------------------------------------------------------------------------


def test_every_contract_has_its_loss_with_the_parameters_it_names():
    assert losses.LOSSES.keys() == CONTRACTS.keys()
    for name, function in losses.LOSSES.items():
        keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert keywords == [*CONTRACTS[name].parameters, *(["z0"] if CONTRACTS[name].mismatched else [])]


@pytest.mark.parametrize("name", CONTRACTS)
@given(data=st.data())
def test_equals_the_naive_implementation(name, data):
    positives, negatives, parameters = data.draw(cases(name))
    assert value(name, positives, negatives, **parameters) == close(NAIVE[name](positives, negatives, **parameters))


@pytest.mark.parametrize("name", CONTRACTS)
def test_gradients(name):
    torch.manual_seed(0)
    contract = CONTRACTS[name]
    lengths = [torch.tensor([3] * {"none": 0, "one": 1, "many": 3, "any": 2}[contract.positives], dtype=torch.long)]
    lengths.append(torch.tensor([4] * contract.negative, dtype=torch.long))
    references = [-torch.rand(len(n), dtype=torch.float64) for n in lengths]
    loss = losses.of(Method(loss=name))
    extra = {"z0": torch.tensor(0.3)} if contract.mismatched else {}

    def of_tokens(*tokens):
        return loss(*map(Side.of, tokens, lengths, references), **extra)

    inputs = [(-0.1 - torch.rand(int(n.sum()), dtype=torch.float64)).requires_grad_() for n in lengths]
    assert torch.autograd.gradcheck(of_tokens, inputs)


@pytest.mark.parametrize("name", CONTRACTS)
def test_certain_and_impossible_answers_give_finite_values_and_gradients(name):
    contract = CONTRACTS[name]
    extremes = [Answer(tokens, r) for tokens in ([0.0], [-1e4], [0.0, -1e4], [-1e-9]) for r in (0.0, -1e4)]
    extra = {"z0": torch.tensor(0.0)} if contract.mismatched else {}
    for first, second in itertools.product(extremes, repeat=2):
        up, up_tokens = side([first] * (contract.positives != "none"), torch.float32)
        down, down_tokens = side([second] * contract.negative, torch.float32)
        loss = losses.of(Method(loss=name))(up, down, **extra)
        loss.backward()
        assert loss.isfinite()
        for tokens in (up_tokens, down_tokens):
            assert tokens.grad is None or tokens.grad.isfinite().all()


@pytest.mark.parametrize("name", CONTRACTS)
@given(data=st.data())
def test_only_losses_with_a_reference_read_it(name, data):
    positives, negatives, parameters = data.draw(cases(name))
    blind = [[a._replace(reference=math.nan) for a in part] for part in (positives, negatives)]
    assert math.isnan(value(name, *blind, **parameters)) == CONTRACTS[name].reference


@pytest.mark.parametrize("name", CONTRACTS)
@given(data=st.data())
def test_sums_ignore_lengths_and_means_do_not_change_with_them(name, data):
    """An answer repeated twice: its sum doubles, its mean stays."""
    positives, negatives, parameters = data.draw(cases(name))
    z0 = {"z0": parameters.pop("z0")} if CONTRACTS[name].mismatched else {}
    parameters = parameters | ({"token_means": False} if name == "ipo" else {})
    loss = losses.of(Method(loss=name, **parameters))
    sides = [side(part)[0] for part in (positives, negatives)]
    longer = [s._replace(lengths=2 * s.lengths) for s in sides]
    if CONTRACTS[name].unit == "means":
        longer = [s._replace(logprobs=2 * s.logprobs, complements=2 * s.complements) for s in longer]
    torch.testing.assert_close(loss(*longer, **z0), loss(*sides, **z0))


# Side ---------------------------------------------------------------------------------------------


@given(rows=many)
def test_a_side_sums_its_tokens_by_response(rows):
    summed, _ = side(rows)
    assert summed.logprobs.tolist() == close([a.lp for a in rows])
    assert summed.logratios.tolist() == close([a.lr for a in rows])
    assert summed.means.tolist() == close([a.m for a in rows])
    assert summed.complements.tolist() == close([sum(map(log_complement, a.tokens)) for a in rows])


@given(logprob=st.floats(-50, -1e-4))
def test_complements_are_exact_to_float32(logprob):
    logprob = torch.tensor(logprob, dtype=torch.float32).item()
    summed, _ = side([Answer([logprob], 0.0)], torch.float32)
    assert summed.complements.item() == pytest.approx(math.log(-math.expm1(logprob)), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complements_of_certain_and_impossible_tokens_have_a_finite_gradient(dtype):
    summed, tokens = side([Answer([logprob], 0.0) for logprob in (0.0, -1e-7, -1e-4, -LOG2, -1e4)], dtype)
    summed.complements.sum().backward()
    certain, half = math.log(FLOOR), math.log(0.5)
    assert summed.complements.tolist() == pytest.approx([certain, certain, math.log(1e-4), half, 0], rel=1e-4)
    # d log(1 − p) / d log p = −p / (1 − p); 0 below the floor.
    assert tokens.grad.tolist() == pytest.approx([0, 0, -1e4, -1, 0], rel=1e-3)


def test_a_side_may_be_empty():
    summed, _ = side([])
    assert all(values.shape == (0,) for values in summed)


# D2O ----------------------------------------------------------------------------------------------


@given(up=one, down=one, beta=betas)
def test_d2o_with_one_positive_and_alpha_beta_is_dpo(up, down, beta):
    dpo = value("dpo", up, down, beta=beta)
    assert value("d2o", up, down, beta=beta, alpha=beta) == close(dpo)
    assert value("d2o-instance", up, down, beta=beta, alpha=beta) == close(dpo)


@given(up=many, down=one, alpha=betas)
def test_d2o_without_its_positives_is_npo(up, down, alpha):
    assert 2 / alpha * value("d2o", up, down, beta=0.0, alpha=alpha) == close(value("npo", [], down, beta=alpha))


@given(up=many, down=one, beta=betas, alpha=st.floats(0, 3))
def test_the_instance_level_bounds_d2o_from_above(up, down, beta, alpha):
    """Jensen: the mean of the losses over positives is at least the loss of the mean."""
    whole = value("d2o", up, down, beta=beta, alpha=alpha)
    assert value("d2o-instance", up, down, beta=beta, alpha=alpha) >= whole - 1e-9
    each = [value("d2o", [a], down, beta=beta, alpha=alpha) for a in up]
    assert value("d2o-instance", up, down, beta=beta, alpha=alpha) == close(mean(each))


@given(up=many, down=one, beta=betas, alpha=betas)
def test_gradient_form_of_d2o(up, down, beta, alpha):
    """−w [ (β/K) Σ ∇lp(y_i) − α ∇lp(y_l) ] with w = σ(α lr(y_l) − β mean lr(y_i))."""
    (positives, up_tokens), (negatives, down_tokens) = side(up), side(down)
    losses.d2o(positives, negatives, beta=beta, alpha=alpha).backward()
    w = sigmoid(alpha * down[0].lr - beta * mean(a.lr for a in up))
    assert up_tokens.grad.tolist() == close([-w * beta / len(up)] * len(up_tokens))
    assert down_tokens.grad.tolist() == close([w * alpha] * len(down_tokens))


@given(up=many, down=one)
def test_at_the_reference_d2o_is_log_2_and_its_weight_one_half(up, down):
    up, down = ([a._replace(reference=a.lp) for a in part] for part in (up, down))
    (positives, up_tokens), (negatives, down_tokens) = side(up), side(down)
    loss = losses.d2o(positives, negatives, beta=0.1, alpha=0.2)
    loss.backward()
    assert loss.item() == close(LOG2)
    assert up_tokens.grad.tolist() == close([-0.5 * 0.1 / len(up)] * len(up_tokens))
    assert down_tokens.grad.tolist() == close([0.5 * 0.2] * len(down_tokens))


# The relatives of DPO -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "neutral"), [("cdpo", {"epsilon": 0.0}), ("robust-dpo", {"epsilon": 0.0}), ("dpop", {"penalty": 0.0})]
)
@given(up=one, down=one, beta=betas)
def test_with_its_own_parameter_at_0_it_is_dpo(name, neutral, up, down, beta):
    assert value(name, up, down, beta=beta, **neutral) == close(value("dpo", up, down, beta=beta))


@given(up=one, down=one, beta=betas, penalty=st.floats(0, 100))
def test_dpop_is_dpo_while_the_positive_is_no_less_likely_than_at_first(up, down, beta, penalty):
    up = [up[0]._replace(reference=up[0].lp - 1)]
    assert value("dpop", up, down, beta=beta, penalty=penalty) == close(value("dpo", up, down, beta=beta))


@given(up=one, down=one, beta=betas, epsilon=epsilons)
def test_robust_dpo_over_flipped_labels_is_dpo_over_true_ones(up, down, beta, epsilon):
    kept, flipped = (value("robust-dpo", *pair, beta=beta, epsilon=epsilon) for pair in ((up, down), (down, up)))
    mixed = (1 - epsilon) * kept + epsilon * flipped
    assert mixed == pytest.approx(value("dpo", up, down, beta=beta), rel=1e-6, abs=1e-6)


@given(beta=betas, epsilon=st.floats(0.01, 0.45))
def test_cdpo_rests_where_the_preference_is_as_sure_as_the_labels(beta, epsilon):
    h = math.log((1 - epsilon) / epsilon) / beta
    (up, tokens), (down, _) = side([Answer([-1.0], -1.0 - h)]), side([Answer([-1.0], -1.0)])
    losses.cdpo(up, down, beta=beta, epsilon=epsilon).backward()
    assert tokens.grad.item() == pytest.approx(0, abs=1e-9)


@given(down=one, tau=PARAMETERS["tau"])
def test_ipo_is_0_at_its_target_and_quadratic_around_it(down, tau):
    target = down[0].lr + 1 / (2 * tau)
    for off in (0.0, 1.5, -1.5):
        up = [Answer([-1.0], -1.0 - target - off)]
        assert value("ipo", up, down, tau=tau, token_means=False) == pytest.approx(off**2, abs=1e-6)


@given(up=st.floats(-30, 0), down=st.floats(-30, 0), tau=PARAMETERS["tau"])
def test_ipos_means_of_one_token_are_its_sums(up, down, tau):
    up, down = [Answer([up], -1.0)], [Answer([down], -2.0)]
    sums, means = (value("ipo", up, down, tau=tau, token_means=flag) for flag in (False, True))
    assert means == close(sums)


@given(up=one, down=one, beta=betas)
def test_simpo_without_margin_is_dpo_without_reference_per_token(up, down, beta):
    single = [[Answer([part[0].m], 0.0)] for part in (up, down)]
    assert value("simpo", up, down, beta=beta, gamma=0.0) == close(value("dpo", *single, beta=beta))


@given(up=one, down=one, delta=st.floats(0, 10), weight=st.floats(0, 3))
def test_slics_hinge_is_0_once_the_positive_leads_by_the_margin(up, down, delta, weight):
    down = [Answer([up[0].lp - delta - 0.1], 0.0)]
    assert value("slic-hf", up, down, delta=delta, weight=weight) == close(-weight * up[0].lp)


@given(up=many, down=one, desirable=st.floats(0, 3), undesirable=st.floats(0, 3))
def test_kto_at_the_reference_is_half_its_weights(up, down, desirable, undesirable):
    up, down = ([a._replace(reference=a.lp) for a in part] for part in (up, down))
    expected = (desirable + undesirable) / 4
    assert value("kto", up, down, z0=0.0, desirable=desirable, undesirable=undesirable) == close(expected)


@given(up=many, down=one, z0=st.floats(0, 50))
def test_kto_weighs_a_negative_the_same_beside_any_number_of_positives(up, down, z0):
    gradients = []
    for positives in (up, up * 2):
        (positives, _), (negatives, tokens) = side(positives), side(down)
        losses.kto(positives, negatives, beta=0.1, desirable=1.0, undesirable=1.0, z0=z0).backward()
        gradients.append(tokens.grad.tolist())
    assert gradients[0] == close(gradients[1])


@given(up=many, down=one, z0=st.floats(0, 50), shift=st.floats(-20, 20))
def test_kto_sees_log_ratios_relative_to_z0_only(up, down, z0, shift):
    moved = [[a._replace(reference=a.reference - shift) for a in part] for part in (up, down)]
    assert value("kto", *moved, z0=z0 + shift) == close(value("kto", up, down, z0=z0))


@given(up=one, down=one, weight=st.floats(0, 3))
def test_orpo_is_sft_plus_its_odds_ratio(up, down, weight):
    assert value("orpo", up, down, weight=0.0) == close(value("sft", up, []))
    assert value("orpo", up, up, weight=weight) == close(value("sft", up, []) + weight * LOG2)


# Negatives only -----------------------------------------------------------------------------------


@given(down=one, beta=betas)
def test_npo_starts_as_gradient_ascent_and_fades(down, beta):
    """Its gradient is 2σ(β lr) times that of lp: once at the reference, 0 far below it."""
    for lr, weight in ((0.0, 1.0), (-60 / beta, 0.0)):
        negatives, tokens = side([down[0]._replace(reference=down[0].lp - lr)])
        losses.npo(side([])[0], negatives, beta=beta).backward()
        assert tokens.grad.tolist() == close([weight] * len(tokens))


@given(down=one)
def test_ga_is_sft_upside_down(down):
    assert value("ga", [], down) == close(-value("sft", down, []))


@given(up=many, down=one)
def test_unlikelihood_adds_sft_where_there_are_positives(up, down):
    alone = value("unlikelihood", [], down)
    assert value("unlikelihood", up, down) == close(alone + value("sft", up, []))
    assert value("unlikelihood", [], [Answer([-LOG2] * 3, 0.0)]) == close(LOG2)
