"""`d2o chat`: models side by side, asked the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, make_tiny_model
from d2o import chat, generation, talk
from d2o.errors import D2OError
from d2o.generation import Request
from d2o.settings import Engine, Sampling
from rows import asked

SAMPLED = Sampling(max_tokens=8)


@pytest.fixture
def run(tiny_model, tmp_path):
    """The folder of a run, whose weights differ from those of the model that it was trained from."""
    folder = tmp_path / "results" / "demo" / "tiny" / "d2o" / "seed0"
    trained = make_tiny_model(tmp_path / "trained", seed=1)
    initial = tmp_path / "results" / "models" / "tiny"
    for place, model in ((folder / "model", trained), (folder / "step6" / "model", trained), (initial, tiny_model)):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(model)
    return folder


def test_a_run_answers_beside_the_model_that_it_was_trained_from(run, tiny_model, monkeypatch):
    monkeypatch.chdir(run.parents[4])
    folders = {"initial": Path("results/models/tiny"), "d2o/seed0": Path("results/demo/tiny/d2o/seed0/model")}
    assert talk.model_folders([run]) == folders
    named = [run / "model" / "manifest.json", run / "step6", tiny_model]
    assert list(talk.model_folders(named)) == ["initial", "d2o/seed0", "d2o/seed0/step6", tiny_model.name]
    with pytest.raises(D2OError, match="no model and no run with one; name a folder such as"):
        talk.model_folders([run.parent])


def test_two_runs_of_one_method_are_told_apart(run):
    other = run.parents[3] / "other" / "tiny" / "d2o" / "seed0"
    other.parent.mkdir(parents=True)
    other.symlink_to(run)
    runs = ["demo/tiny/d2o/seed0", "other/tiny/d2o/seed0"]
    assert list(talk.model_folders([run, other, run])) == ["initial", *runs]


def test_a_run_is_named_from_inside(run, monkeypatch):
    monkeypatch.chdir(run)
    assert list(talk.model_folders([Path()])) == ["initial", "d2o/seed0"]
    monkeypatch.chdir(run.parent)
    assert list(talk.model_folders([Path("seed0/step6/../model")])) == ["initial", "d2o/seed0"]


def test_each_model_goes_on_with_its_own_dialogue(run):
    folders = talk.model_folders([run])
    engine = Engine(backend="transformers", max_num_seqs=1)
    tokenizer = chat.load_tokenizer(run / "model")
    models = {name: generation.start(folder, engine) for name, folder in folders.items()}

    def answers(*dialogue: str, first: int = 1) -> dict[str, str]:
        """Each model's answer to the last prompt, after its own answers to the prompts before, generated alone."""
        last = {}
        for name, model in models.items():
            said = []
            for seed, prompt in enumerate(dialogue, first):
                said += asked(prompt)
                ((_, one),) = model.generate([Request(chat.encode_prompt(tokenizer, said), seed)], SAMPLED)
                said.append({"role": "assistant", "content": one.text})
            last[name] = one.text + " […]" * (one.finish == "length")
        assert len(set(last.values())) == 2, "models that say the same would hide a mistake"
        return last

    dialogue = talk.Talk(folders, engine, SAMPLED)
    assert dialogue.ask("May I?") == answers("May I?")
    assert dialogue.ask("Why?") == answers("May I?", "Why?") != answers("Why?", first=2)
    dialogue.forget()
    assert dialogue.ask("Why?") == answers("Why?", first=3)
    assert set(dialogue.ask("why " * 600).values()) == {"(longer than the model's context)"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_what_is_typed_is_answered_in_columns(run, backend):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow"), "COLUMNS": "100"}
    command = [sys.executable, "-m", "d2o", "chat", run, "--max-tokens", "8", "--backend", backend]
    typed = "May I?\n/new\n[bold]<|im_end|>\n"
    done = subprocess.run(command, input=typed, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("initial") == done.stdout.count("d2o/seed0") == 2
