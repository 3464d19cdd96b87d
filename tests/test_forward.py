"""Response log-probs: every route and architecture against the plain forward pass, sequence by sequence."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_tiny_model
from d2o import forward
from d2o.errors import D2OError
from d2o.forward import Policy, Row, attention, head
from d2o.forward.head import token_logprobs
from d2o.forward.rows import Span
from d2o.groups import Group, Response, packs

ROUTES = ["shared", "dense", "padded"]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "phi3", "gpt_neox"]


def random_groups(shapes, seed=0) -> list[Group]:
    """Groups of random ids from (prompt length, positive lengths, negative lengths)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 128, (n,), generator=generator).tolist()

    return [
        Group("p", ids(p), [Response("r", ids(n)) for n in up], [Response("r", ids(n)) for n in down])
        for p, up, down in shapes
    ]


# A long and a short prompt, a prompt and a response of one token, one response, equal lengths.
SHAPES = [(5, (7, 3), (4,)), (1, (1,), (1,)), (12, (2, 2, 2), ()), (3, (), (30,)), (40, (1, 17, 9), (3,))]


def random_model(architecture: str, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0}
    config = AutoConfig.for_model(architecture, **sizes | settings)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def plain(lm, groups: list[Group]) -> torch.Tensor:
    """Log-prob of each response from the full logits of one unpadded sequence."""
    sums = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt + response.ids])
            logs = lm(ids).logits.log_softmax(-1)[0, len(group.prompt) - 1 : -1]
            sums.append(logs.gather(1, torch.tensor(response.ids)[:, None]).sum())
    return torch.stack(sums)


def sums(policy: Policy, groups: list[Group]) -> torch.Tensor:
    row = Row.of(groups)
    return torch.stack([tokens.sum() for tokens in policy(row).split(row.lengths.tolist())])


def with_gradient(model, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and the gradient of their sum with weights of both signs."""
    model.zero_grad()
    (values * torch.linspace(-1, 2, len(values))).sum().backward()
    return values.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-5)
    assert (actual[1] - expected[1]).norm() / expected[1].norm() < 2e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_and_architecture_equals_the_plain_forward(route, architecture):
    lm, groups = random_model(architecture), random_groups(SHAPES)
    expected = with_gradient(lm, plain(lm, groups))
    policy = Policy(lm, route)
    assert policy.route == route
    assert_same(with_gradient(policy, sums(policy, groups)), expected)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_and_untied_embeddings(tmp_path, tie):
    folder, groups = make_tiny_model(tmp_path, tie=tie), random_groups(SHAPES)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = forward.load(folder, "fp32")
    assert_same(with_gradient(policy, sums(policy, groups)), with_gradient(lm, plain(lm, groups)))


def test_gradient_checkpointing_gives_the_same_and_recomputes():
    groups, calls = random_groups(SHAPES), []
    policy = Policy(random_model("llama"))
    expected = with_gradient(policy, sums(policy, groups))
    policy.train()
    policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(with_gradient(policy, sums(policy, groups)), expected)
    assert len(calls) == 2


def test_groups_in_one_row_do_not_see_each_other():
    policy, groups = Policy(random_model("llama")), random_groups(SHAPES)
    apart = torch.cat([sums(policy, [group]) for group in groups])
    torch.testing.assert_close(sums(policy, groups), apart, rtol=1e-6, atol=1e-5)


def test_bf16_is_as_near_to_the_truth_as_the_padded_route():
    groups = random_groups(SHAPES * 4)
    truth = sums(Policy(random_model("llama", torch.bfloat16).float()), groups).detach()
    errors = {}
    for route in ROUTES:
        logprobs = sums(Policy(random_model("llama", torch.bfloat16), route), groups).detach()
        errors[route] = float((logprobs - truth).norm() / truth.norm())
    assert max(errors.values()) <= 1.3 * errors["padded"], errors


@pytest.mark.parametrize("architecture", ["mistral", "phi3"])
def test_a_sliding_window_shorter_than_a_sequence_is_kept(architecture, capsys):
    """Only plain rows support a window: a row that reaches beyond it is padded, a shorter one need not be."""
    lm, short = random_model(architecture, sliding_window=20), random_groups([(5, (7, 3), (4,))])
    batches = [random_groups(SHAPES), short]
    expected = [with_gradient(lm, plain(lm, groups)) for groups in batches]
    policy = Policy(lm)
    for groups, values in zip(batches, expected, strict=True):
        assert_same(with_gradient(policy, sums(policy, groups)), values)
    assert ("mistral is not known to share prompts" in capsys.readouterr().err) == (architecture == "mistral")


def test_dropout_is_off_in_training_mode_too():
    lm = random_model("gpt_neox", hidden_dropout=0.5, attention_dropout=0.5)
    policy, groups = Policy(lm, "padded").train(), random_groups(SHAPES)
    torch.testing.assert_close(sums(policy, groups), sums(policy, groups), rtol=0, atol=0)


CPU = torch.device("cpu")


def sure_model(seed: int):
    """A model in bf16 that is sure of its greedy answers, and groups with such answers of four tokens."""
    lm = random_model("llama", num_hidden_layers=6)
    for weight in lm.parameters():
        weight.data *= 4
    lm.to(torch.bfloat16)
    groups = random_groups([(6, (4,), ())] * 8, seed)
    for group in groups:
        answer = lm.generate(torch.tensor([group.prompt]), max_new_tokens=5, do_sample=False)
        group.positives[0].ids = answer[0, len(group.prompt) :].tolist()
    return lm, groups


@pytest.mark.parametrize("seed", range(3))
def test_rounding_in_bf16_is_no_reason_to_leave_the_shared_route(seed, capsys):
    """Short answers that a model is sure of: their log-probs are small, and rounding is a large part of them."""
    lm, groups = sure_model(seed)
    policy = Policy(lm)
    for parts in ([groups], [[group] for group in groups], [random_groups(SHAPES, seed)]):
        for some in parts:
            policy.check(some, CPU)
            assert policy.route == "shared"
    assert not capsys.readouterr().err


def _later(row: Row) -> Row:
    """Responses whose positions are one too high."""
    positions = row.positions.clone()
    for span in row.spans:
        for start, n in span.responses:
            positions[0, start : start + n] += 1
    return replace(row, positions=positions)


def _running(row: Row) -> Row:
    """Positions that are counted through the whole row."""
    return replace(row, positions=torch.arange(row.ids.shape[1])[None])


def _seeing(row: Row) -> Row:
    """Responses that attend to those before them."""
    whole = [(s.prompt, (s.responses[0][0], sum(n for _, n in s.responses))) for s in row.spans]
    return replace(row, spans=tuple(Span(prompt, (together,)) for prompt, together in whole))


@pytest.mark.parametrize("fault", [_later, _running, _seeing])
@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_row_is_more_than_rounding_in_bf16(fault, seed, capsys, monkeypatch):
    lm, _ = sure_model(seed)
    groups = random_groups([(6, (4, 5), (3,)), (9, (6, 2), (4,))] * 3, seed)
    monkeypatch.setattr(Policy, "_as_one", lambda self, row, right=Policy._as_one: right(self, fault(row)))
    policy = Policy(lm)
    policy.check(groups, CPU)
    assert policy.route == "padded"
    assert "the shared forward differs from the padded one by" in capsys.readouterr().err


def test_routes_are_compared_where_a_token_looks_back_farthest(capsys, monkeypatch):
    """As with a model's own window that its configuration does not mention: short rows look right."""

    def windowed(q, k, v, spans, scale):
        seen = v.clone()
        for start, length in (span.prompt for span in spans):
            seen[:, :, start : start + max(0, length - 20)] = 0
        return attention._Cascade.forward(torch.autograd.function.FunctionCtx(), q, k, seen, spans, scale)

    short, long = random_groups([(5, (7, 3), (4,))] * 200), random_groups([(60, (7,), (3,))] * 20)
    monkeypatch.setattr(attention._Cascade, "apply", windowed)
    for groups, route in ((short, "shared"), (short + long, "padded")):
        policy = Policy(random_model("llama"))
        policy.check(groups, CPU)
        assert policy.route == route


def test_float32_on_a_gpu_runs_under_a_dense_mask_and_says_so_once(capsys, monkeypatch):
    assert attention.serves(torch.device("cuda"), torch.bfloat16)
    assert attention.serves(torch.device("cpu"), torch.float32)
    assert not attention.serves(torch.device("cuda"), torch.float32)
    groups = random_groups(SHAPES)
    expected = with_gradient(lm := random_model("llama"), plain(lm, groups))
    monkeypatch.setattr(attention, "serves", lambda device, dtype: False)
    monkeypatch.setattr(attention._Cascade, "apply", None)
    policy = Policy(random_model("llama"))
    policy.check(groups, CPU)
    assert_same(with_gradient(policy, sums(policy, groups)), expected)
    assert policy.route == "dense"
    assert capsys.readouterr().err.count("no GPU kernel leaves out what is masked in float32") == 1


def test_the_variable_length_plan_is_the_dense_mask():
    """The GPU's kernel cannot run here; its arguments can be checked: causal from the bottom right, per sequence."""
    row = Row.of(random_groups(SHAPES))
    plan = attention.sequences(row.spans, torch.device("cpu"))
    seen = torch.zeros(row.ids.shape[1], row.ids.shape[1], dtype=torch.bool)
    starts = zip(plan.query_starts, plan.query_starts[1:], plan.key_starts, plan.key_starts[1:], strict=False)
    for first, stop, first_key, stop_key in starts:
        queries, keys = stop - first, stop_key - first_key
        assert queries <= plan.longest_query
        assert keys <= plan.longest_key
        for i in range(queries):
            seen[first + i, plan.keys[first_key : first_key + keys - queries + i + 1]] = True
    assert plan.query_starts[-1] == row.ids.shape[1]
    assert torch.equal(seen, row.mask()[0, 0])


def test_the_call_of_the_gpu_kernel_is_one_that_torch_knows():
    """On tensors without data: its arguments, the shape of its result, and that it has a gradient."""
    row = Row.of(random_groups(SHAPES))
    length = row.ids.shape[1]
    heads = (4, 2, 2)
    inputs = [torch.empty(1, n, length, 8, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in heads]
    output = attention._VariableLength.apply(*inputs, row.spans, 0.5)
    assert output.shape == (1, length, 4, 8)
    gradients = torch.autograd.grad(output, inputs, torch.empty_like(output))
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def _sequence(q, k, v, scale):
    """Attention of one sequence as the GPU's kernel computes it, on [L, H, D]: causal from the bottom right."""
    q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    return out.transpose(0, 1).to(torch.bfloat16)


def _parts(q_starts, k_starts, q, k, v):
    for first, stop, first_key, stop_key in zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False):
        yield q[first:stop], k[first_key:stop_key], v[first_key:stop_key]


def _kernel(q, k, v, q_starts, k_starts, longest_query, longest_key, *, scale, **settings):
    out = torch.cat([_sequence(*part, scale) for part in _parts(q_starts, k_starts, q, k, v)])
    return out, *(torch.zeros(1) for _ in range(4))


def _kernel_backward(grad, q, k, v, out, lse, q_starts, k_starts, longest_query, longest_key, *settings, scale):
    grads = []
    for part, over in zip(_parts(q_starts, k_starts, q, k, v), _parts(q_starts, q_starts, *[grad] * 3), strict=True):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in part]
            grads.append(torch.autograd.grad(_sequence(*inputs, scale), inputs, over[0]))
    return tuple(map(torch.cat, zip(*grads, strict=True)))


def _sum_in_bf16(copies, of, count):
    total = copies.new_zeros(count, *copies.shape[1:])
    for copy, key in zip(copies, of.tolist(), strict=True):  # torch's own index_add_ on a CPU rounds once
        total[key] += copy
    return total


def test_gradients_of_shared_keys_add_up_in_float32_on_a_gpu(monkeypatch):
    """The kernel's arithmetic by sequence, in bf16 as it returns it, against a dense mask in float64."""
    monkeypatch.setattr(attention, "_flash_on_gpu", _kernel)
    monkeypatch.setattr(attention, "_flash_on_gpu_backward", _kernel_backward)
    row = Row.of(random_groups([(64, (20,) * 11, (30,)), (9, (4, 5), (3,))]))
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, row.ids.shape[1], 32).to(torch.bfloat16).requires_grad_() for n in (4, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = torch.nn.functional.scaled_dot_product_attention(*exact, row.mask(), enable_gqa=True).transpose(1, 2)
    over = torch.randn_like(truth).to(torch.bfloat16)
    expected = torch.autograd.grad(truth, exact, over.double())

    def errors():
        output = attention._VariableLength.apply(*inputs, row.spans, 32**-0.5)
        assert output.shape == truth.shape
        grads = torch.autograd.grad(output, inputs, over)
        pairs = zip((output.detach(), *grads), (truth.detach(), *expected), strict=True)
        return [float((a - b).norm() / b.norm()) for a, b in pairs]

    ours = errors()
    assert max(ours) < 4e-3
    monkeypatch.setattr(attention, "_sum_of_copies", _sum_in_bf16)
    in_bf16 = errors()
    assert ours[:2] == in_bf16[:2]
    assert all(1.3 * a < b for a, b in zip(ours[2:], in_bf16[2:], strict=True)), (ours, in_bf16)


def test_the_head_in_pieces_equals_the_whole(monkeypatch):
    torch.manual_seed(0)
    states, weight = torch.randn(50, 16, dtype=torch.float64), torch.randn(32, 16, dtype=torch.float64)
    targets = torch.randint(0, 32, (50,))
    monkeypatch.setitem(head._BUDGET, "cpu", 4 * 32 * 7)
    inputs = [x.clone().requires_grad_() for x in (states, weight)]
    logprobs = token_logprobs(*inputs, targets)
    logprobs.pow(2).sum().backward()
    twins = [x.clone().requires_grad_() for x in (states, weight)]
    expected = (twins[0] @ twins[1].T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    expected.pow(2).sum().backward()
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(inputs, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-4)


def test_packs_hold_every_group_once_within_the_budget():
    groups = random_groups([(p % 7 + 1, (p % 11 + 1, 3), (p % 5 + 1,)) for p in range(50)])
    rows = packs(groups, tokens=60)
    assert [id(g) for row in rows for g in row] == list(map(id, groups))
    assert all(sum(g.tokens for g in row) <= 60 for row in rows)
    assert len(rows) < 25


def test_a_group_larger_than_the_budget_stands_alone():
    assert [len(pack) for pack in packs(random_groups([(50, (9,), ())] * 3), tokens=10)] == [1, 1, 1]


def test_a_model_that_changes_logits_after_the_head_is_refused():
    lm = random_model("llama")
    lm.config.final_logit_softcapping = 30.0
    with pytest.raises(D2OError, match="llama: final_logit_softcapping is not supported"):
        Policy(lm)
