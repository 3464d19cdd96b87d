"""The losses and the group forward in others' trainers: the documented examples run and give the same numbers."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from d2o import chat
from d2o.losses import dpo
from rows import asked

GOOD, BAD = (
    ["That is fine with me.", "I am glad to help you with it."],
    ["No, go away now.", "What a silly question."],
)


@pytest.mark.slow
def test_a_loop_of_ones_own_starts_at_log_2_and_falls(tiny_model, tmp_path):
    rows = [{"prompt": f"May I ask {n}?", "positives": GOOD, "negatives": BAD[: 1 + n % 2]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (loop,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    (tmp_path / "loop.py").write_text(loop)
    command = [sys.executable, tmp_path / "loop.py", tiny_model, tmp_path / "rows.jsonl", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 20 and losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters()


def trained(kind, rows: list[dict], tiny_model, folder, **options):
    """A trainer of class `kind` after four steps in single precision."""
    from trl import DPOConfig

    arguments = DPOConfig(
        str(folder / kind.__name__), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, beta=0.1,
        logging_steps=1, report_to=[], save_strategy="no", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = kind(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options
    )
    trainer.train()
    return trainer


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def our_trainer():
    return runpy.run_path(str(ROOT / "examples" / "trl_trainer.py"))["D2OTrainer"]


@pytest.mark.slow
def test_with_one_positive_and_dpos_loss_the_trainer_is_trls(tiny_model, tmp_path):
    """Compare the loss of each step with TRL's own tokens, forward pass and loss, and with ours."""
    from trl import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [f"May I ask {n}?" for n in range(8)]
    groups = [
        {"prompt": asked(text), "chosen": GOOD[n % 2 :][:1], "rejected": BAD[:1]} for n, text in enumerate(prompts)
    ]
    texts = [
        {
            "prompt": chat.prompt_text(tokenizer, row["prompt"]),
            "chosen": row["chosen"][0],
            "rejected": row["rejected"][0],
        }
        for row in groups
    ]
    loss = partial(dpo, beta=0.1)
    mine = losses_of(trained(our_trainer(), groups, tiny_model, tmp_path, loss=loss))
    theirs = losses_of(trained(DPOTrainer, texts, tiny_model, tmp_path))
    assert len(mine) == 4 and mine[-1] < mine[0] == pytest.approx(math.log(2), abs=1e-4)
    assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_with_several_positives_the_trainers_loss_is_that_of_d2o(tiny_model, tmp_path):
    """Compared with a plain forward pass per answer and the formula in floats; the groups have 1 to 2 negatives."""
    rows = [{"prompt": asked(f"May I ask {n}?"), "chosen": GOOD, "rejected": BAD[: 1 + n % 2]} for n in range(8)]
    trainer = trained(our_trainer(), rows, tiny_model, tmp_path)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    initial, mended = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    mended.load_state_dict(trainer.model.state_dict())

    @torch.inference_mode()
    def logratio(prompt: list[int], answer: list[int]) -> float:
        def logprob(model) -> float:
            every = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            return sum(float(every[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))

        return logprob(mended) - logprob(initial)

    terms = []
    for row in trainer.train_dataset:
        good, bad = (
            [logratio(row["prompt_ids"], ids) for ids in row[f"{side}_ids"]] for side in ("chosen", "rejected")
        )
        assert (len(good), len(bad)) == (2, len(row["rejected_ids"]))
        terms += [math.log1p(math.exp(-(0.1 * sum(good) / 2 - 0.1 * one))) for one in bad]
    groups = trainer.data_collator(trainer.train_dataset)
    assert len(terms) == 12
    assert trainer.compute_loss(trainer.model, groups).item() == pytest.approx(sum(terms) / 12, abs=1e-4)
