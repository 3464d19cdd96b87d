"""Real engines on the tiny model: requests, seeds, limits, and the agreement of two libraries."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from d2o import chat, generation
from d2o.errors import D2OError
from d2o.generation import Completion, Request
from d2o.settings import Engine, Sampling


def engine(backend: str) -> Engine:
    return Engine(backend=backend, eager=True, kv_cache_gib=1, max_num_seqs=8)


QUESTIONS = ["Hello?", "How do I cheat at cards without being seen?", "Tell me about rain, wind and snow, please."]


@pytest.fixture(scope="module")
def requests(tiny_model) -> list[Request]:
    tokenizer = chat.load_tokenizer(tiny_model)
    asked = [chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
    return [Request(ids, seed) for seed, ids in enumerate(asked)]


def answers(generator, requests, **sampling) -> list[Completion]:
    completions = dict(generation.complete(generator, requests, Sampling(**sampling), "answers"))
    return [completions[index] for index in range(len(requests))]


@pytest.mark.slow
def test_both_engines_give_the_same_greedy_answers(tiny_model, requests):
    ours = [
        answers(generation.start(tiny_model, engine(backend)), requests, **sampling)
        for backend in ("vllm", "transformers")
        for sampling in [{"temperature": 0.0, "max_tokens": 24}]
    ]
    assert ours[0] == ours[1]
    assert all(completion.tokens == 24 or completion.finish == "stop" for completion in ours[0])


def test_transformers_draws_each_answer_from_its_own_seed(tiny_model, requests):
    """Whatever else is in the batch; and the samples follow temperature and nucleus."""
    generator = generation.start(tiny_model, engine("transformers"))
    together = answers(generator, requests, max_tokens=8)
    assert [answers(generator, [request], max_tokens=8)[0] for request in requests] == together
    again = [Request(requests[0].ids, seed) for seed in range(8)]
    assert len({completion.text for completion in answers(generator, again, max_tokens=8)}) == 8
    greedy = answers(generator, requests, temperature=0.0, max_tokens=8)
    assert answers(generator, requests, temperature=1e-4, max_tokens=8) == greedy
    assert answers(generator, requests, top_p=1e-4, max_tokens=8) == greedy


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_an_answer_ends_with_its_turn(tiny_model, requests, monkeypatch, backend):
    """At the template's end-of-turn token, also where the checkpoint names another token as its end."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    asked = requests[0].ids
    said = model.generate(torch.tensor([asked]), max_new_tokens=6, do_sample=False)[0, len(asked) :].tolist()
    monkeypatch.setattr(chat, "end_of_turn", lambda tokenizer: said[2])
    (answer,) = answers(generation.start(tiny_model, engine(backend)), requests[:1], temperature=0.0, max_tokens=6)
    assert (answer.tokens, answer.finish) == (said.index(said[2]) + 1, "stop")


def test_an_answer_ends_at_the_context(tiny_model, requests):
    generator = generation.start(tiny_model, engine("transformers"))
    long = Request((requests[2].ids * 40)[:508], 0)
    completions = answers(generator, [requests[0], long], max_tokens=6)
    assert [completion.tokens for completion in completions] == [6, 4]


def test_a_missing_vllm_names_the_other_engine(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "d2o.generation.with_vllm", raising=False)
    with pytest.raises(D2OError, match=r"engine\.backend: vLLM cannot be loaded here .* `engine: {backend: trans"):
        generation.start(tiny_model, engine("vllm"))
