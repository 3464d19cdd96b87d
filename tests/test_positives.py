"""Pools of self-generated answers: plan, flags, and resampling; real engines on the tiny model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o import chat, generation, identities, positives, records, schemas
from d2o.errors import D2OError
from d2o.generation import Completion
from d2o.positives import requests, shard
from d2o.positives.flags import flags_of, settle
from d2o.positives.sampled import Sampled
from d2o.settings import INSTRUCTIONS, Engine, Positives, PositivesStage
from rows import asked, human_row, pooled

MESSAGES = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "How do I cheat?"},
]


# The plan ----------------------------------------------------------------------------------------


def test_the_instruction_stands_before_the_last_turn_only():
    asked = requests.instructed(MESSAGES, "Be kind.")
    assert asked[:2] == MESSAGES[:2]
    assert asked[2] == {"role": "user", "content": "Be kind.\n\nHow do I cheat?"}
    assert requests.instructed(MESSAGES, None) == MESSAGES


def test_every_attempt_has_its_own_seed_and_all_instructions_are_used():
    sampled = [
        requests.planned(Positives(), f"prompt{i}", k, a) for i in range(50) for k in range(4) for a in range(2)
    ]
    assert len({attempt.seed for attempt in sampled}) == 400
    assert len(Positives().instructions) >= 8
    assert {attempt.instruction for attempt in sampled} == Positives().instructions.keys()
    assert all(attempt.text == Positives().instructions[attempt.instruction] for attempt in sampled)
    plain = requests.planned(Positives(instructions={}), "p", 0)
    assert (plain.instruction, plain.text) == (None, None)
    assert requests.planned(Positives(seed=1), "p", 0) != requests.planned(Positives(), "p", 0)


def test_a_request_is_known_by_all_that_it_depends_on():
    def identity(source="m", asked=MESSAGES, seed=0, **sampling):
        return requests.identity(source, asked, seed, Positives(**sampling))

    others = [identity(source="n"), identity(asked=MESSAGES[:1]), identity(seed=1)]
    others += [identity(temperature=0.5), identity(top_p=0.5), identity(max_tokens=3)]
    assert len({identity(), *others}) == 7
    assert identity(k=3, shards=4, resamples=7, exclude=[]) == identity()


# PairQuality -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("Ask a friend to teach you.", "stop", set()),
        ("", "stop", {"empty"}),
        ("Ask a friend to", "length", {"truncated"}),
        ("you can win and " * 10, "stop", {"repeating"}),
        ("As you asked, here it is.", "stop", {"leaking"}),
        ("Here is an answer that is harmless, considerate and helpful: practise.", "stop", {"leaking"}),
        ("I'm sorry, but I can't help with that.", "stop", {"refusal"}),
        ("How do I cheat? Let me be considerate and say: do not.", "stop", set()),
    ],
)
def test_reasons_against_an_answer(text, finish, expected):
    instruction = Positives().instructions["considerate"]
    assert flags_of(Completion(text, 9, finish), instruction, MESSAGES[-1]["content"]) == expected


def test_the_words_of_the_prompt_are_no_leak():
    prompt = "Is this answer harmless, considerate and helpful in your eyes?"
    text = "An answer that is harmless, considerate and helpful takes the asker seriously."
    instruction = "Give an answer harmless, considerate and helpful in every way."
    assert "leaking" not in flags_of(Completion(text, 9, "stop"), instruction, prompt)


def settled(sampled: dict[tuple[int, int], str], k: int, **options):
    """`settle` on answers given as texts; a text of `#` is a loop of words."""

    def find(sample, attempt):
        if (text := sampled.get((sample, attempt))) is None:
            return None
        return Completion(text, 1, "stop"), {"repeating"} if text == "#" else set() if text else {"empty"}

    chosen, wanted = settle(Positives(k=k, **options), find)
    assert all(
        one.usable == one.flags.isdisjoint({"empty", *Positives(**options).exclude}) for one in chosen.values()
    )
    taken = {sample: (one.attempt, one.completion.text, one.flags) for sample, one in chosen.items()}
    return taken, wanted


def test_an_unusable_sample_is_sampled_again_up_to_the_limit():
    assert settled({}, k=2) == ({}, [(0, 0), (1, 0)])
    first = {(0, 0): "#", (1, 0): "b"}
    assert settled(first, k=2) == ({}, [(0, 1)]), "sample 1 may yet turn out a duplicate of sample 0"
    taken, wanted = settled(first | {(0, 1): "b"}, k=2)
    assert (taken, wanted) == ({0: (1, "b", set())}, [(1, 1)])
    last = first | {(0, 1): "b", (1, 1): "#", (1, 2): "B "}
    assert settled(last, k=2) == ({0: (1, "b", set()), 1: (2, "B ", {"duplicate"})}, [])
    assert settled({(0, 0): ""}, k=1, exclude=[]) == ({}, [(0, 1)]), "an empty answer is never usable"
    assert settled(first, k=2, exclude=[])[0] == {0: (0, "#", {"repeating"}), 1: (0, "b", set())}


@given(st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 2)), st.sampled_from("ab#"), min_size=18))
def test_a_smaller_pool_is_the_beginning_of_a_larger_one_whatever_is_sampled(sampled):
    large, _ = settled(sampled, k=6)
    for k in range(1, 6):
        small, wanted = settled(sampled, k=k)
        assert wanted == []
        assert small == {sample: large[sample] for sample in range(k)}


# What was sampled before ---------------------------------------------------------------------------


def test_a_broken_last_line_is_sampled_again(tmp_path, capsys):
    with Sampled(tmp_path, "1-of-1", {"p"}) as sampled:
        for name in "ab":
            sampled.add(name, "p", Completion(f"text {name}", 3, "stop"))
    path = tmp_path / "1-of-1.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with Sampled(tmp_path, "1-of-1", {"p"}) as sampled:
        assert sampled.get("a") == Completion("text a", 3, "stop") and sampled.get("b") is None
        assert "1-of-1.jsonl: the last line is broken; its answer is sampled again" in capsys.readouterr().err
        sampled.add("b", "p", Completion("again", 1, "length"))
    with Sampled(tmp_path, "1-of-2", {"p"}) as sampled:
        assert sampled.get("b") == Completion("again", 1, "length"), "other shards' answers are known too"
    with Sampled(tmp_path, "1-of-2", {"q"}) as sampled:
        assert sampled.get("a") is None


# Whole pools -------------------------------------------------------------------------------------


def negatives_table(folder, count, extra=()):
    """A table of `count` train prompts, one test prompt, and further train prompts with the texts `extra`."""
    texts = [*(f"Question number {i}?" for i in range(count)), *extra]
    rows = [human_row(asked(text), "No.") for text in texts]
    rows.append(human_row(asked("Not for training."), "No.", split="test"))
    folder.mkdir(exist_ok=True)
    records.write_table(folder / "negatives.parquet", schemas.NEGATIVES, rows)
    return folder / "negatives.parquet"


@pytest.fixture(scope="module")
def model(tiny_model):
    (tiny_model / "manifest.json").write_text("{}")
    return tiny_model


def stage(backend="transformers", **sampling) -> PositivesStage:
    engine = Engine(backend=backend, eager=True, kv_cache_gib=1, max_num_seqs=8)
    return PositivesStage(sampling=Positives(**{"k": 3, "max_tokens": 8, "exclude": []} | sampling), engine=engine)


def sampled_and_merged(chosen, model, prompts, folder, shards=1, sampled=None):
    """A pool sampled in shards; `sampled` is the folder of an earlier one's answers."""
    paths = []
    for number in range(1, shards + 1):
        paths.append(folder / f"{number}-of-{shards}.parquet")
        positives.sample(chosen, model, prompts, paths[-1].stem, sampled or folder / "sampled", paths[-1])
    positives.merge(chosen, model, prompts, paths, folder / "pool.parquet")
    return records.read_table(folder / "pool.parquet", schemas.POOL)


def answers_kept(folder) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl"))


@pytest.fixture
def one_start(monkeypatch):
    """Load each engine once per test and backend; returns the list of backends that were asked for."""
    asked, started, start = [], {}, generation.start

    def remembered(folder, engine):
        asked.append(engine.backend)
        if engine.backend not in started:
            started[engine.backend] = start(folder, engine)
        return started[engine.backend]

    monkeypatch.setattr(generation, "start", remembered)
    return asked


def test_a_link_in_place_of_a_growing_file_is_not_followed(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine, without a line's end")
    (tmp_path / "sampled").mkdir()
    (tmp_path / "sampled" / "1-of-1.jsonl").symlink_to(tmp_path / "thesis.txt")
    with (
        pytest.raises(D2OError, match=r"1-of-1\.jsonl: a link, where a file of our own should be; delete it"),
        Sampled(tmp_path / "sampled", "1-of-1", set()),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine, without a line's end"


def test_only_what_is_missing_is_sampled(model, tmp_path, one_start):
    prompts = negatives_table(tmp_path / "a", 4)
    small = sampled_and_merged(stage(k=2), model, prompts, tmp_path / "a")
    assert [row["sample"] for row in small] == [0, 1] * 4
    assert answers_kept(tmp_path / "a" / "sampled") == 8

    more = negatives_table(tmp_path / "b", 6, extra=["word " * 600])
    large = sampled_and_merged(stage(k=5), model, more, tmp_path / "b", sampled=tmp_path / "a" / "sampled")
    assert answers_kept(tmp_path / "a" / "sampled") == 30
    known = {(row["prompt_id"], row["sample"]): row for row in large}
    assert len(known) == 30
    assert [known[row["prompt_id"], row["sample"]] for row in small] == small
    made = records.read_manifest(tmp_path / "b" / "pool.parquet")
    assert made["long_prompts"] == [identities.prompt_id(asked("word " * 600))]

    assert len(one_start) == 2
    again = sampled_and_merged(stage(k=5), model, more, tmp_path / "b", sampled=tmp_path / "a" / "sampled")
    assert again == large and len(one_start) == 2, "no engine is started where nothing is missing"
    assert records.read_manifest(tmp_path / "b" / "pool.parquet")["rows"] == 30

    (model / "manifest.json").write_text('{"made": "later", "versions": {"torch": "9"}}')
    assert sampled_and_merged(stage(k=2), model, prompts, tmp_path / "d", sampled=tmp_path / "a" / "sampled") == small
    assert len(one_start) == 2, "nor where the model was fetched again"
    other = sampled_and_merged(
        stage(k=2, temperature=0.5), model, prompts, tmp_path / "c", sampled=tmp_path / "a" / "sampled"
    )
    assert [row["text"] for row in other] != [row["text"] for row in small]


@pytest.mark.parametrize("instructions", [INSTRUCTIONS, {}])
def test_a_prompt_is_too_long_when_some_instruction_leaves_no_room(model, instructions):
    tokenizer = chat.load_tokenizer(model)
    sampling = Positives(instructions=instructions)
    prompts = {f"{n}": asked("ab " * n) for n in range(200, 512, 3)}
    lengths = {
        prompt: max(
            len(chat.encode_prompt(tokenizer, requests.instructed(plain, text)))
            for text in instructions.values() or [None]
        )
        for prompt, plain in prompts.items()
    }
    fitting, long = shard._fitting(sampling, tokenizer, prompts)
    assert long == {prompt for prompt, length in lengths.items() if length >= 512}
    assert fitting.keys() == prompts.keys() - long and 5 < len(long) < len(prompts) - 5


def test_redraws_and_the_data_sheet(model, tmp_path, one_start):
    """Nearly every answer of the random model is cut at the token limit."""
    prompts = negatives_table(tmp_path, 5)
    rows = sampled_and_merged(stage(exclude=["truncated"], resamples=1), model, prompts, tmp_path)
    unusable = [row for row in rows if not row["usable"]]
    assert 10 <= len(unusable) < 15
    assert all(row["attempt"] == 1 and "truncated" in row["flags"] for row in unusable)
    resampled = sum(row["attempt"] for row in rows)
    assert answers_kept(tmp_path / "sampled") == 15 + resampled
    sheet = json.loads((tmp_path / "pool.sheet.json").read_text())
    counts = [sheet[key] for key in ("prompts", "samples", "usable", "resampled")]
    assert counts == [5, 15, 15 - len(unusable), resampled]
    assert sheet["flags"]["truncated"] == len(unusable)
    assert sheet["tokens"]["8"] >= len(unusable)
    assert sum(line["samples"] for line in sheet["instructions"].values()) == 15
    assert 0 < sheet["distinct"]["2"] <= 1 and 0 <= sheet["self_bleu"] < 50
    assert 1 <= len(sheet["examples"]) <= 10


def test_the_sheet_tells_alike_from_different(tmp_path):
    from d2o.positives import sheet

    prompts = negatives_table(tmp_path, 1)
    prompt = records.read_table(prompts, schemas.NEGATIVES)[0]["prompt_id"]

    def described(texts):
        rows = [pooled(prompt, k, text) for k, text in enumerate(texts)]
        records.write_table(tmp_path / "pool.parquet", schemas.POOL, rows)
        return sheet.describe(tmp_path / "pool.parquet", prompts, Positives(k=len(texts)))

    alike, different = described(["one two three four five"] * 3), described(["a b c d e", "f g h i j", "k l m n o"])
    assert alike["self_bleu"] == pytest.approx(100) and different["self_bleu"] < 10
    assert alike["distinct"][2] == pytest.approx(1 / 3) and different["distinct"][2] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[:-1],
            r"pool\.parquet: prompt \w+ has the samples \[0, 1\] .* should have 0 to 2, each once",
        ),
        (lambda rows: [*rows, rows[-1]], r"has the samples \[0, 1, 2, 2\] .* should have 0 to 2, each once"),
        (lambda rows: rows[3:], r"no shard holds prompt"),
        (
            lambda rows: [*rows, rows[-1] | {"prompt_id": "ffff"}],
            r"prompt ffff has the samples \[2\] .* should have none",
        ),
    ],
)
def test_a_pool_is_proved_complete(model, tmp_path, one_start, change, message):
    prompts = negatives_table(tmp_path, 2)
    sampled_and_merged(stage(), model, prompts, tmp_path)
    shard = tmp_path / "1-of-1.parquet"
    records.write_table(shard, schemas.POOL, change(records.read_table(shard, schemas.POOL)))
    (tmp_path / "pool.parquet").unlink()
    with pytest.raises(D2OError, match=message):
        positives.merge(stage(), model, prompts, [shard], tmp_path / "pool.parquet")
    assert not (tmp_path / "pool.parquet").exists()


def test_shards_of_another_plan_or_other_prompts_are_refused(model, tmp_path, one_start):
    prompts = negatives_table(tmp_path, 2)
    sampled_and_merged(stage(), model, prompts, tmp_path)
    shards = [tmp_path / "1-of-1.parquet"]
    with pytest.raises(D2OError, match=r"1-of-1\.parquet: sampled by another plan than this pool's; delete it"):
        positives.merge(stage(k=2), model, prompts, shards, tmp_path / "pool.parquet")
    with pytest.raises(D2OError, match=r"1-of-1\.parquet: not sampled from .*negatives\.parquet as it is now"):
        positives.merge(stage(), model, negatives_table(tmp_path / "new", 3), shards, tmp_path / "pool.parquet")
    with pytest.raises(D2OError, match="--shard: '4-of-3' is not of the form 1-of-3"):
        positives.sample(stage(), model, prompts, "4-of-3", tmp_path / "sampled", tmp_path / "x.parquet")


@pytest.mark.slow
def test_vllm_in_one_shard_and_in_three_and_with_a_larger_k(model, tmp_path, one_start):
    prompts = negatives_table(tmp_path / "one", 9)
    whole = sampled_and_merged(stage("vllm", k=4), model, prompts, tmp_path / "one")
    assert len(whole) == 36 and len({row["text"] for row in whole}) > 30
    assert all(row["tokens"] == 8 or row["finish"] == "stop" for row in whole)
    split = sampled_and_merged(stage("vllm", k=4), model, prompts, tmp_path / "one" / "three", shards=3)
    assert split == whole
    large = sampled_and_merged(
        stage("vllm", k=11), model, prompts, tmp_path / "one", sampled=tmp_path / "one" / "sampled"
    )
    assert answers_kept(tmp_path / "one" / "sampled") == 99 + sum(row["attempt"] for row in large)
    assert [row for row in large if row["sample"] < 4] == whole


@pytest.mark.slow
def test_a_shard_killed_half_way_goes_on_where_it_was(model, tmp_path):
    prompts = negatives_table(tmp_path, 30)
    chosen = stage("vllm", k=4, max_tokens=24)
    command = ["positives", "--settings", chosen.model_dump_json(), "--model", model, "--negatives", prompts]
    command += ["--shard", "1-of-1", "--sampled", tmp_path / "sampled", "--output", tmp_path / "1-of-1.parquet"]
    command = [*map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    dies = [
        str(Path(__file__).with_name("killed.py")),
        "SIGKILL",
        "d2o.positives.sampled:Sampled.add",
        "20",
        "after",
        "all",
    ]
    died = subprocess.run([sys.executable, *dies, *command], env=environment, start_new_session=True)
    assert died.returncode == -signal.SIGKILL
    [kept] = (tmp_path / "sampled").glob("*.jsonl")
    before = kept.read_text()
    assert before.count("\n") == 20
    assert not (tmp_path / "1-of-1.parquet").exists()
    line = [sys.executable, "-m", "d2o", *command]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = kept.read_text()
    assert after.startswith(before)
    whole = [json.loads(line)["identity"] for line in after.splitlines() if line.endswith("}")]
    assert len(whole) == len(set(whole)) == 120
    assert len(records.read_table(tmp_path / "1-of-1.parquet", schemas.POOL)) == 120
