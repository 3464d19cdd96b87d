"""Raw scores: what the reward model reads, and that batches, padding and cutting do not change its scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2o import identities, records, reward_groups, reward_inputs, rewards, schemas, scores
from d2o.errors import D2OError
from d2o.settings import Reward
from rows import prompt, sample

BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
QUESTION = [{"role": "user", "content": "Where can I return a toaster?"}]
ANSWERS = [
    "At the desk.",
    "Bring it back to the shop with the bill, and they will give you your money or a new one.",
    "No.",
    "Nobody here has time for people who cannot operate a toaster, so read the manual before you ask. " * 3,
]


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory) -> Path:
    """A classifier of random float32 weights whose tokenizer pads with the end token, as many do."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("rewards") / "random"
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id
    # Larger than usual, so that a score from another token cannot pass for rounding.
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "manifest.json").write_text("{}")
    return folder


def by_hand(folder: Path, text: str, head: torch.Tensor, bias: float = 0.0) -> float:
    """The score from the head on the last state of a text, without a batch."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).last_hidden_state
    return float(states[0, -1] @ head + bias)


def run(folder: Path, reward: Reward, model: Path, answers=ANSWERS, messages=QUESTION) -> list[float]:
    """Run the stage on one prompt; returns its scores in the order of the answers."""
    name = identities.prompt_id(messages)
    responses = [sample(name, i, text) for i, text in enumerate(answers)]
    records.write_table(folder / "prompts.parquet", schemas.PROMPTS, [prompt(messages)])
    records.write_table(folder / "responses.parquet", schemas.SAMPLES, responses)
    output = folder / "scores.parquet"
    scores.score(reward, model, folder / "prompts.parquet", folder / "responses.parquet", output)
    table = records.read_table(output, schemas.SCORES)
    assert [(row["prompt_id"], row["sample"]) for row in table] == [(name, i) for i in range(len(answers))]
    return [row["score"] for row in table]


def source(path: Path, **keys) -> Reward:
    return Reward(source={"path": str(path)}, **keys)


def test_score_is_the_raw_head_on_the_last_token_whatever_the_batch(reward_model, tmp_path):
    # The text ends in the token that its tokenizer pads with: the state before that token must not be used.
    reward = source(reward_model, template=BEAVER)
    alone = run(tmp_path, reward.model_copy(update={"tokens": 1}), reward_model)
    together = run(tmp_path, reward, reward_model)

    head = rewards.reward_inputs.head_weights(reward_model, "score.weight")[0]
    texts = [BEAVER.format(prompt=QUESTION[0]["content"], response=text) + "<|im_end|>" for text in ANSWERS]
    expected = [by_hand(reward_model, text, head) for text in texts]
    assert together == pytest.approx(expected, abs=1e-4)
    assert alone == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 1 or min(expected) < 0  # no sigmoid could give these

    manifest = records.read_manifest(tmp_path / "scores.parquet")
    assert manifest["rows"] == 4 and manifest["truncated"] == 0
    assert manifest["mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)


@pytest.mark.parametrize("tokens", [40, 16384])
def test_answers_that_share_their_prompt_score_as_in_rows_of_their_own(reward_model, capsys, tokens):
    """Prompts with several answers or one; an answer that begins another, or occurs twice; parts of a group."""
    reward = source(reward_model)
    model, tokenizer = reward_inputs.load(reward, reward_model)
    texts = [*ANSWERS, ANSWERS[0], ANSWERS[0] + " And more of it."]
    asked = [(n, text) for n in range(3) for text in texts[: 1 + 3 * n]]
    inputs = [
        reward_inputs.encode(tokenizer, reward.template, [{"role": "user", "content": f"Is it {n}?"}], text, 512)[0]
        for n, text in asked
    ]
    ids, owners = [encoding["input_ids"] for encoding in inputs], [n for n, _ in asked]
    covered = [place for places, _ in reward_groups.rows(ids, owners, tokens) for place in places]
    assert sorted(covered) == list(range(1, len(asked))), "all but the one without a sibling"
    alone = [reward_inputs.forward(model, [encoding]).item() for encoding in inputs]
    assert reward_inputs.score_all(model, inputs, owners, tokens, "scoring") == pytest.approx(alone, abs=1e-4)
    assert "padded" not in capsys.readouterr().err


def test_where_a_shared_prompt_gives_other_scores_padded_rows_are_taken(reward_model, capsys, monkeypatch):
    model, tokenizer = reward_inputs.load(source(reward_model), reward_model)
    inputs = [reward_inputs.encode(tokenizer, "chat", QUESTION, text, 512)[0] for text in ANSWERS]
    alone = [reward_inputs.forward(model, [encoding]).item() for encoding in inputs]
    right = reward_groups.logits
    monkeypatch.setattr(reward_groups, "logits", lambda model, row: right(model, row) + 0.5)
    assert reward_inputs.score_all(model, inputs, [0] * 4, 16384, "scoring") == pytest.approx(alone, abs=1e-4)
    assert "differ from those of padded rows by 5.0e-01; each answer is scored in" in capsys.readouterr().err


def test_a_golden_row_that_scores_otherwise_ends_the_job(reward_model, tmp_path):
    (value,) = run(tmp_path, source(reward_model), reward_model, ANSWERS[:1])
    row = {"prompt": QUESTION[0]["content"], "response": ANSWERS[0]}
    (again,) = run(tmp_path, source(reward_model, golden=[row | {"score": value}]), reward_model, ANSWERS[:1])
    assert again == value
    with pytest.raises(D2OError, match=r"^golden\.1: the model scores .* ± 0.05 is expected; check template, score"):
        run(tmp_path, source(reward_model, golden=[row | {"score": s} for s in (value, value + 0.1)]), reward_model)
    model, tokenizer = reward_inputs.load(source(reward_model), reward_model)
    text = "USER: hello ASSISTANT:Hello!"
    (bare,) = reward_inputs.forward(model, [{"input_ids": tokenizer(text).input_ids}]).tolist()
    given = source(reward_model, template=BEAVER, golden=[{"text": text, "score": bare}])
    run(tmp_path, given, reward_model, ANSWERS[:1])
    with pytest.raises(D2OError, match=r"^golden\.0: "):
        run(tmp_path, source(reward_model, template=BEAVER, golden=[row | {"score": value}]), reward_model)


def test_chat_template_covers_the_whole_conversation(reward_model, tmp_path):
    turns = [*QUESTION, {"role": "assistant", "content": "Which one?"}, {"role": "user", "content": "A red one."}]
    values = run(tmp_path, source(reward_model), reward_model, ANSWERS[:1], turns)
    said = [*turns, {"role": "assistant", "content": ANSWERS[0]}]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in said)
    head = reward_inputs.head_weights(reward_model, "score.weight")[0]
    assert values == pytest.approx([by_hand(reward_model, text, head)], abs=1e-4)


def test_long_input_loses_its_beginning_and_is_counted(reward_model, tmp_path):
    from transformers import AutoTokenizer

    reward = source(reward_model, template=BEAVER, max_tokens=24)
    values = run(tmp_path, reward, reward_model)
    text = BEAVER.format(prompt=QUESTION[0]["content"], response=ANSWERS[3]) + "<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    end = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[-24:])
    head = reward_inputs.head_weights(reward_model, "score.weight")[0]
    assert values[3] == pytest.approx(by_hand(reward_model, end, head), abs=1e-4)
    assert records.read_manifest(tmp_path / "scores.parquet")["truncated"] == 4


def test_input_is_cut_at_the_positions_of_the_model(reward_model, tmp_path):
    run(tmp_path, source(reward_model), reward_model, ["I will tell you. " * 300])
    assert records.read_manifest(tmp_path / "scores.parquet")["truncated"] == 1


def make_beaver(folder: Path, tiny_model: Path, bias: bool) -> torch.Tensor:
    """A checkpoint as safe-rlhf writes it: an architecture of its own, the head under another name."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaModelForScore"], "dtype": "float32", "score_dim": 1, "score_type": "cost"}
    (folder / "config.json").write_text(json.dumps(config))
    body = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).model.state_dict(prefix="model.")
    head = torch.randn(1, 128, generator=torch.Generator().manual_seed(3))
    weights = {**body, "score_head.weight": head} | ({"score_head.bias": torch.tensor([7.5])} if bias else {})
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return head[0]


@pytest.mark.parametrize("bias", [False, True])
def test_beaver_checkpoint_scores_like_a_hand_written_head(tiny_model, tmp_path, bias):
    head = make_beaver(tmp_path / "beaver", tiny_model, bias)
    reward = source(tmp_path / "beaver", template=BEAVER, score_weights="score_head", better="lower")
    rewards.make(reward, None, None, None, tmp_path / "linked")
    values = run(tmp_path, reward, tmp_path / "linked")
    texts = [BEAVER.format(prompt=QUESTION[0]["content"], response=text) + "<|im_end|>" for text in ANSWERS]
    expected = [by_hand(tmp_path / "beaver", text, head, 7.5 if bias else 0.0) for text in texts]
    assert values == pytest.approx(expected, abs=1e-4)


def test_a_head_that_is_not_in_the_checkpoint_is_refused(tiny_model, tmp_path):
    make_beaver(tmp_path / "beaver", tiny_model, bias=False)
    (tmp_path / "beaver" / "manifest.json").write_text("{}")
    reward = source(tmp_path / "beaver", template=BEAVER)  # score_weights left at its default
    with pytest.raises(D2OError, match=r"score\.weight.*random.*score_weights") as error:
        run(tmp_path, reward, tmp_path / "beaver")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "scores.parquet").exists()


def make_bert(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = sorted({word for text in [*ANSWERS, QUESTION[0]["content"]] for word in text.lower().split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.5,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_pair_template_gives_two_segments_and_keeps_the_first_token(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = make_bert(tmp_path / "bert")
    reward = source(folder, template="pair")
    rewards.make(reward, None, None, None, tmp_path / "linked")
    turns = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "no"}, *QUESTION]
    values = run(tmp_path, reward, tmp_path / "linked", ANSWERS, turns)

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in ANSWERS:
        inputs = tokenizer(QUESTION[0]["content"], text, return_tensors="pt")
        if inputs.input_ids.shape[1] > 48:  # [CLS], then the last 47
            inputs = {key: torch.cat([ids[:, :1], ids[:, -47:]], 1) for key, ids in inputs.items()}
        with torch.inference_mode():
            expected.append(model(**inputs).logits.item())
    assert values == pytest.approx(expected, abs=1e-4)
    assert records.read_manifest(tmp_path / "scores.parquet")["truncated"] == 1


def test_a_text_that_looks_like_a_field_is_left_alone(reward_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    messages = [{"role": "user", "content": "Fill in {response} and {name}"}]
    encoding, cut = reward_inputs.encode(tokenizer, BEAVER, messages, "{prompt}", 500)
    assert tokenizer.decode(encoding["input_ids"]) == (
        "BEGINNING OF CONVERSATION: USER: Fill in {response} and {name} ASSISTANT:{prompt}<|im_end|>"
    )
    assert not cut


def test_turns_of_a_text_template_name_their_role(reward_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    turns = [*QUESTION, {"role": "assistant", "content": "Which one?"}, {"role": "user", "content": "A red one."}]
    text = tokenizer.decode(reward_inputs.encode(tokenizer, BEAVER, turns, "Yes.", 500)[0]["input_ids"])
    assert text.endswith("toaster? ASSISTANT: Which one? USER: A red one. ASSISTANT:Yes.<|im_end|>")


def test_batches_keep_the_budget_and_every_input():
    lengths = [3, 100, 7, 7, 50, 1, 20]
    batches = reward_inputs.batches(lengths, 40)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 40 for batch in batches)
    assert len(batches) == 4  # 100 and 50 alone, 20 with a 7, the rest


def test_chat_needs_a_chat_template(tmp_path):
    folder = make_bert(tmp_path / "bert")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(D2OError, match=r"no chat template; set `template`"):
        run(tmp_path, source(folder), folder)


def test_answers_to_other_prompts_are_refused(reward_model, tmp_path):
    run(tmp_path, source(reward_model), reward_model)
    other = prompt(QUESTION, prompt_id="0" * 16)
    records.write_table(tmp_path / "prompts.parquet", schemas.PROMPTS, [other])
    arguments = [reward_model, tmp_path / "prompts.parquet", tmp_path / "responses.parquet", tmp_path / "out"]
    with pytest.raises(D2OError, match="belong to other prompts"):
        scores.score(source(reward_model), *arguments)


def test_a_score_that_is_no_number_is_refused(reward_model, tmp_path):
    shutil.copytree(reward_model, tmp_path / "broken")
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(D2OError, match="not a finite number"):
        run(tmp_path, source(reward_model), tmp_path / "broken")


# Classifiers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_the_score_of_a_classifier_is_the_log_odds_of_its_label(kind, tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(2)
    labels = {0: "fine", 1: "toxic", 2: "threat"}
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=3, id2label=labels, problem_type=kind, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=1.0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "given")
    reward = source(tmp_path / "given", label="toxic", template="{response}")
    rewards.make(reward, None, None, None, tmp_path / "reward")
    values = run(tmp_path, reward, tmp_path / "reward")

    for text, score in zip(ANSWERS, values, strict=True):
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0].double()
        shares = logits.softmax(0) if kind.startswith("single") else logits.sigmoid()
        assert score == pytest.approx(float(shares[1].logit()), abs=1e-3)


def test_a_label_that_a_classifier_does_not_know(reward_model, tmp_path):
    with pytest.raises(D2OError, match="no label 'toxic'; set `label` to one of: LABEL_0"):
        rewards.make(source(reward_model, label="toxic"), None, None, None, tmp_path / "reward")
