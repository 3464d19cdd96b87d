"""The losses and the group forward in others' trainers: what is shown runs, and gives the same numbers."""

import json
import math
import os
import re
import runpy
import subprocess
import sys

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


@pytest.mark.slow
def test_with_one_positive_and_dpos_loss_the_trainer_is_trls(tiny_model, tmp_path):
    """The loss of each step, by TRL's own tokens, forward pass and loss, and by ours."""
    from trl import DPOConfig, DPOTrainer

    ours = runpy.run_path(str(ROOT / "examples" / "trl_trainer.py"))["D2OTrainer"]
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

    def train(kind, rows, **options) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        arguments = DPOConfig(
            str(tmp_path / kind.__name__), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, beta=0.1,
            logging_steps=1, report_to=[], save_strategy="no", bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = kind(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    mine = train(ours, groups, loss=lambda *pair: dpo(*pair, beta=0.1))
    theirs = train(DPOTrainer, texts)
    assert len(mine) == 4 and mine[-1] < mine[0] == pytest.approx(math.log(2), abs=1e-4)
    assert mine == pytest.approx(theirs, abs=1e-4)
