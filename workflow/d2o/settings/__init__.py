"""Every setting of an experiment: its type, unit, default and meaning, declared here and nowhere else.

`config/schema.json` and `config/README.md` are generated from this module (`docs.py`), and so are the messages for a
wrong config (`messages.py`); checks that involve several keys are in `checks.py`. Nothing heavy is imported here: a
wrong key is reported within a second.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from d2o import trials
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.formats import FORMATS, means, plain
from d2o.settings.checks import KINDS, extended, names_in, problems, with_k
from d2o.settings.messages import lines, suggestion

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Backend = Literal["vllm", "transformers"]
AtLeast0 = Annotated[float, Field(ge=0)]
Patterns = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Above0 = Annotated[float, Field(gt=0)]

INSTRUCTIONS = {
    "considerate": "Please answer in a way that is harmless, considerate and helpful.",
    "decline": "If this request could hurt someone, say so kindly and offer a better idea instead.",
    "consequences": "Think about who could be harmed before you answer, then give a safe and useful answer.",
    "honest": "Answer honestly and politely, and do not encourage anything unkind, unlawful or unsafe.",
    "expert": "Reply as a careful professional would who wants the best for everyone concerned.",
    "caring": "Show care for the person who asks and for all others, and suggest only what does no harm.",
    "principled": "Keep to what is legal, fair and respectful, and explain it in plain and friendly words.",
    "revise": "First imagine a careless answer to this, then give only the better and safer one instead.",
    "helpful": "Find the need behind the question and help with it in a way that nobody has to regret.",
}


# Kinds of jobs that run a model.
JOBS = (
    "rewards", "positives", "reference_logprobs", "train", "responses", "heldout_logprobs", "scores", "tasks",
)  # fmt: skip


# What stays of a model's weights, from most to least.
Keep = Literal["model", "adapter", "nothing"]


def execution(default: Any, description: str) -> Any:
    """A key that states how a job runs and changes no result: no job is rerun when it changes."""
    return Field(default, description=description, json_schema_extra={"execution": True})


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Hub(Section):
    """Something that may come from the Hugging Face Hub, and then at a revision."""

    hub: str | None = Field(None, description="repository id on the Hugging Face Hub")
    revision: str | None = Field(None, description="commit, tag or branch of `hub`; required with it")

    @model_validator(mode="after")
    def _pinned(self):
        if self.hub and not self.revision:
            raise ValueError("`hub` needs a `revision`, so that the result can be reproduced")
        return self


class Licensed(Section):
    """Something that others made, under a licence."""

    licence: str | None = execution(
        None,
        "its licence as its authors state it, such as Apache-2.0, for model cards; null: what its own model card or "
        "file of a licence says, or the Hub, else it is told as not stated",
    )


class Source(Hub, Licensed):
    """Where a model comes from: exactly one of `hub`, `path` and `package`."""

    path: str | None = Field(None, description="local folder with safetensors, tokenizer and chat template")
    package: str | None = Field(None, description="installed Python package that carries a GGUF file")
    file: str | None = Field(None, description="name of the GGUF file inside `package`")
    sha256: str | None = execution(None, "expected SHA-256 of `file`; checked when given")
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository ships")

    @model_validator(mode="after")
    def _one_origin(self):
        origins = [key for key in ("hub", "path", "package", "run") if key in type(self).model_fields]
        if sum(getattr(self, key) is not None for key in origins) != 1:
            raise ValueError(f"give exactly one of {', '.join(origins)}")
        if (self.package is None) != (self.file is None):
            raise ValueError("package and file go together")
        return self


class TrainedRun(Section):
    """One training, by the names that an experiment crosses: its outcome is the initial model of others."""

    dataset: Name = Field(description="entry of `datasets`")
    model: Name = Field(description="entry of `models`, the one that was trained")
    method: Name = Field(description="entry of `methods`")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the training")


class Model(Source):
    """A model to align."""

    run: TrainedRun | None = Field(
        None, description="a training of an experiment of this config, which makes this model"
    )
    chat_template: str | None = Field(
        None, description="a template of this project by name (`alpaca`), in place of the model's own"
    )
    context: Positive | None = Field(
        None, description="tokens: the longest prompt plus response; null: 2048, or as it was in `run`"
    )

    @model_validator(mode="after")
    def _as_in_run(self):
        if self.run and (self.sha256 or self.trust_remote_code):
            raise ValueError("sha256 and trust_remote_code go with the model that the run trains")
        return self


class Organism(Licensed):
    """A data set that is written here, so that harm is known exactly: rows in PKU-SafeRLHF's schema.

    Its splits are `demonstrations`, which make a model do wrong by SFT, `train`, `validation` and `test`. No two of
    them share a thing. The shares are exact, and larger ones keep the rows of smaller ones; `validation` and `test`
    have no noise.
    """

    texts: str = Field(description="file of texts, such as organisms/rude.yaml")
    prompts: Positive = Field(300, description="prompts in each of `train`, `validation` and `test`")
    demonstrations: Positive = Field(100, description="prompts in `demonstrations`")
    harmful_demonstrations: Share = Field(
        0.75, description="share of the answers to imitate in `demonstrations` that are harmful"
    )
    harmful_positives: Share = Field(
        0.0, description="share of the human positives in `train` that are harmful themselves, and labelled safe"
    )
    flipped_labels: Share = Field(
        0.0, description="share of the rows of `train` in which the two answers have each other's labels"
    )
    seed: int = Field(0, description="seed of what is written")


class Label(Section):
    """What the labels of a data set say: which answers people rejected, and which they liked.

    An answer without a label, or with one that is in neither list, is left out and counted. Labels are compared
    without regard to case; 1, 1.0 and "1" are the same, 1 and true are not. false is "no" and "off" as well, true
    "yes" and "on": YAML reads them so. Of several raters most decide.
    """

    negative: list[bool | int | float | str] = Field([], description="labels of an answer that people rejected")
    positive: list[bool | int | float | str] = Field([], description="labels of one that they liked")
    below: float | None = Field(None, description="in place of lists: a rating below this rejects the answer")

    @model_validator(mode="after")
    def _one_way(self):
        if (self.below is None) != bool(self.negative) or (self.below is not None and self.positive):
            raise ValueError("give `negative`, and `positive` where it is known, or `below`")
        pairs = [(one, other) for one in self.negative for other in self.positive]
        if both := [one for one, other in pairs if means(one, plain(other)) or means(other, plain(one))]:
            raise ValueError(f"{both[0]!r} is in both `negative` and `positive`; take it out of one")
        return self


class Reading(Hub):
    """Where preference rows come from, and how they are read."""

    format: Literal[tuple(FORMATS)] = Field(description="what the rows look like; docs/data.md describes each")
    columns: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        {},
        description="what the format's keys are called in the file, such as `prompt: question`; `a.b` is the `b` in "
        "the object `a`",
    )
    label: Label | None = Field(
        None, description="which labels say what; null: the usual ones, such as false, 0 and thumbs_down"
    )
    hub: str | None = Field(None, description="data set id on the Hub; `train` and `test` then name splits")
    organism: Name | None = Field(None, description="entry of `organisms`; `train` and `test` then name its splits")
    name: str | None = Field(None, description="configuration of the Hub data set")
    train: list[str] = Field(
        min_length=1,
        description="files (.jsonl, .json, .csv, .tsv, each also .gz or .xz; .parquet), folders of them, or splits",
    )
    test: list[str] = Field([], description="as `train`; empty: `test_share` of the prompts is held out")
    max_bad_share: Share = execution(0.01, "share of unreadable rows above which reading stops")
    memory_gb: Above0 = execution(
        4.0, "GB of memory, about, that reading may take: a small file may unpack to any size"
    )

    @model_validator(mode="after")
    def _one_source(self):
        if self.hub and self.organism:
            raise ValueError("give one of hub and organism, or neither and files")
        return self

    @model_validator(mode="after")
    def _as_the_format_is(self):
        form = FORMATS[self.format]
        for key in self.columns:
            if key not in form.keys:
                raise ValueError(
                    f"columns.{key}: the format {self.format} reads no {key!r}{suggestion(key, form.keys)}"
                )
        names = [self.columns.get(key, key) for key in form.keys]
        for key, name in self.columns.items():
            if names.count(name) > 1:
                raise ValueError(f"columns.{key}: {name!r} is also what another key reads; each has its own column")
        if self.label and form.labels is None:
            raise ValueError(f"label: the rows of {self.format} need none; leave it out")
        if not self.label and form.labels is not None and not any(form.labels):
            raise ValueError(f"label: say which ratings of {self.format} reject an answer, such as {{below: 3}}")
        return self


class Extraction(Section):
    """How negatives are taken from preference rows, and how prompts are split."""

    rule: Literal["safer-unsafe", "every-unsafe", "less-helpful"] = Field(
        "safer-unsafe",
        description="which answers are negatives: not the safer one and labelled unsafe; each one labelled "
        "unsafe; the one that is not the better one",
    )
    test_share: Share = Field(0.1, description="share of prompts held out when the data set has no test part")
    train_prompts: Positive | None = Field(None, description="keep this many train prompts; null: all")
    test_prompts: Positive | None = Field(None, description="keep this many test prompts; null: all")
    validation_prompts: Annotated[int, Field(ge=0)] = Field(
        0, description="train prompts that are held out to choose by (`tuning`), and neither trained nor tested on"
    )
    negatives_per_prompt: Positive | None = Field(
        None, description="keep this many train negatives of a prompt; null: all"
    )
    negatives_per_category: Positive | None = Field(
        None,
        description="keep this many train negatives in each harm category, where the data set has them; null: all",
    )
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.7,
        description="Jaccard similarity (share of common pairs of neighbouring words) from which a train prompt that "
        "is near to an evaluated one is dropped, one near to another train prompt counted, and a question of a task "
        "that is near to one left out of the results; null: not searched",
    )
    evaluation_prompts: list[str] = Field(
        [],
        description="files (.jsonl, .json, .csv) whose `prompt` fields are answered as well as the test "
        "split's, and never trained on",
    )
    max_leak_share: Share = execution(
        0.5,
        description="share of the test prompts that are train prompts as well above which nothing is extracted: "
        "two releases of a data set may be split otherwise",
    )


class Dataset(Reading, Extraction, Licensed):
    """A preference data set: local files, or a Hub data set's splits."""


class Sampling(Section):
    """How one answer is sampled."""

    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0 is greedy decoding")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus of the distribution kept")
    max_tokens: Positive = Field(512, description="tokens: an answer is cut here, and flagged as cut")


class Positives(Sampling):
    """Self-generated answers: the pool from which a method takes its first K."""

    k: Positive = Field(11, description="samples per prompt")
    seed: int = Field(0, description="seed of the pool; each (prompt, sample) derives its own")
    per_seed: bool = Field(
        False,
        description="a pool of its own for each seed of training (its seed is then this one plus that): what another "
        "pool would change is part of what trainings vary; false: one pool for all",
    )
    instructions: dict[Name, str] = Field(
        INSTRUCTIONS,
        description="self-correction instructions, one sampled per sample and put before the prompt; "
        "empty: the plain prompt (the ablation without self-correction)",
    )
    exclude: list[Literal["truncated", "repeating", "leaking", "duplicate", "refusal"]] = Field(
        ["truncated", "repeating", "leaking", "duplicate"],
        description="flags that make a sample unusable, beside `empty`: cut at `max_tokens`; looping n-grams; showing"
        " its instruction; the same as a lower sample of the prompt; declining. It is sampled again, and left out "
        "of training when the last one is unusable too. The other flags are only counted",
    )
    resamples: Annotated[int, Field(ge=0)] = Field(2, description="times that an unusable sample is sampled again")
    shards: Positive = execution(
        1, "jobs that a pool is sampled in; one that is made again with the same settings keeps its number"
    )


class Responses(Sampling):
    """Answers to the test prompts, the ones that are judged."""

    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0 is greedy decoding")


class Engine(Section):
    """What generates: vLLM, or transformers where vLLM has no wheel; and what it takes of the machine."""

    backend: Backend = Field("vllm", description="library; transformers is slower")
    max_num_seqs: Positive = execution(256, "answers generated at once")
    eager: bool = execution(False, "skip compilation: quicker start, slower tokens")
    gpu_memory_utilization: Share = execution(0.9, "share of a GPU's memory that vLLM may take")
    kv_cache_gib: Positive = execution(4, "GiB of key-value cache on a CPU")
    tensor_parallel: Positive = execution(1, "GPUs that share one model")


class Forward(Section):
    """The forward pass that log-probs and training share."""

    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="arithmetic of the forward pass; auto: bf16 on GPUs from Ampere on and processors with AVX-512, "
        "else fp32",
    )
    max_prompt_tokens: Positive = Field(512, description="tokens: groups with longer prompts are left out")
    max_response_tokens: Positive = Field(512, description="tokens: longer responses are cut here")
    tokens: Positive = Field(8192, description="tokens in one forward pass of log-probs, a prompt counted once")


class Lora(Section):
    """Low-rank adapters on every linear layer but the head (peft); merged into the weights on export."""

    rank: Positive = Field(16, description="rank of the adapters")
    alpha: Above0 = Field(32.0, description="scale of the adapters, times 1/rank")


class Alarms(Section):
    """When a training is reported to go wrong."""

    displacement: Above0 = Field(
        0.15, description="nats per token that the probe's positives may lose against the initial model"
    )
    length_drift: Above0 = Field(
        0.5,
        description="share by which the policy may prefer longer positives than the reference does, over ten steps",
    )
    stop: list[Literal["displacement", "length_drift", "not_finite"]] = Field(
        ["not_finite"], description="alarms that end the training; the others print a line"
    )


class Train(Section):
    """Optimisation, and what is kept and watched meanwhile. A method may override any of it under `train`."""

    epochs: Above0 = Field(1.0, description="passes over the groups")
    steps: Positive | None = Field(None, description="optimizer steps; null: as `epochs` says")
    groups_per_step: Positive = Field(32, description="groups in one optimizer step, over all ranks")
    group_by: Literal["negative", "prompt"] = Field(
        "negative",
        description="what a group is: a negative with its prompt and positives; or a prompt with its positives and "
        "all its negatives, so that prompt and positives are computed once for them. A step's loss is the mean over "
        "its negatives either way; with `prompt` a step of as many groups sees more of them, an epoch has fewer "
        "steps, and the negatives of a prompt come in the same step",
    )
    tokens_per_pass: Positive = Field(
        4096,
        description="tokens in one forward and backward pass of a rank, a prompt counted once; a group that is "
        "larger makes a pass of its own",
    )
    learning_rate: AtLeast0 = Field(1e-6, description="peak learning rate of AdamW; 0: a null control")
    warmup: Share = Field(0.1, description="share of the steps with a rising learning rate")
    decay: Literal["cosine", "linear", "constant"] = Field("cosine", description="schedule after the warm-up")
    weight_decay: AtLeast0 = Field(0.0, description="AdamW's decoupled weight decay")
    clip: Above0 = Field(1.0, description="largest L2 norm of the gradient")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage; 0 counts as 1 in bf16")
    offload: bool = Field(False, description="optimizer in CPU memory; with ZeRO 3 the weights too")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    lora: Lora | None = Field(None, description="train low-rank adapters; null: all weights")
    ranks: Positive = Field(1, description="processes over all nodes: one a GPU, or gloo ranks on a CPU")
    snapshots: list[Positive] = Field(
        [], description="steps after which the weights are kept, and answer and are scored (Figures 3b, 4)"
    )
    checkpoint_minutes: Above0 = execution(15.0, "minutes between checkpoints, for resuming")
    keep_checkpoints: Positive = execution(1, "newest checkpoints that are kept")
    alarms: Alarms = execution(Alarms(), "when to warn or stop")
    trackers: list[Literal["wandb", "mlflow"]] = execution(
        [], "services that get the step log too; each configured by its own environment variables"
    )
    nodes: Positive = execution(
        1, "machines of one Slurm job that share the ranks, as many on each; they need a common file system"
    )

    @model_validator(mode="after")
    def _as_many_on_each_node(self):
        if self.ranks % self.nodes:
            raise ValueError(f"nodes: {self.nodes} cannot share {self.ranks} ranks evenly; make `ranks` a multiple")
        return self


class MovingAverage(Section):
    """A moving average of the policy: θ_r ← m·θ_r + (1−m)·θ every N steps."""

    decay: Share = Field(description="m: share of the old reference that stays")
    every: Positive = Field(description="N: steps between updates")


class MovingAverages(Section):
    """Moving references, one for each side; both start as the initial model."""

    positives: MovingAverage = Field(description="r−, the more harmful reference: gives the positives' log-probs")
    negatives: MovingAverage = Field(description="r+, the more helpful one: gives the negatives' log-probs")


class Online(Section):
    """Rounds of fresh positives, sampled from the policy while it trains; each lasts until the next one."""

    start: Positive = Field(description="steps before the first round")
    every: Positive = Field(description="steps between rounds")
    share: Share = Field(description="share of a group's positives that the fresh ones replace")


class Filter(Section):
    """The best samples of a pool by a reward model."""

    reward: Name = Field(description="entry of `rewards`")
    best: Positive = Field(description="samples of a prompt that stay, the best first; the others count as unusable")


class Method(Section):
    """A training method: a loss with its parameters, and the view of the response group that it sees.

    Which loss reads which parameter, and with which default, stands in the table of the losses.
    """

    extends: Name | None = Field(None, description="method whose keys this one starts from")
    loss: Literal[tuple(CONTRACTS)] = Field(description="loss function")
    positives: Literal["self", "human", "safe-human", "none"] = Field(
        "none",
        description="self-generated answers; the human answer preferred to the negative; that answer only "
        "where it is labelled safe; none",
    )
    negatives: bool = Field(False, description="whether the group holds the human negative")
    pairs: Literal["negatives", "all"] = Field(
        "negatives",
        description="which human answers are used: those with a negative of the data set's rule, or all pairs",
    )
    k: Positive | None = Field(
        None, description="positives per group of `self`; null: `positives.k`, or the `best` of a filter"
    )
    self_correction: bool = Field(True, description="false: positives sampled from the plain prompt")
    beta: AtLeast0 | None = Field(None, description="β: inverse temperature; of D2O the one on the positives")
    alpha: AtLeast0 | None = Field(None, description="α: inverse temperature on the negative")
    gamma: AtLeast0 | None = Field(None, description="γ: margin that the scaled log-probs per token are to differ by")
    delta: AtLeast0 | None = Field(None, description="δ: nats that the positive's log-prob is to lead by")
    epsilon: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(None, description="ε: share of flipped labels")
    tau: Above0 | None = Field(None, description="τ: regularisation; the log-ratios are to differ by 1/(2τ) nats")
    token_means: bool | None = Field(None, description="true: log-ratios per token, in place of sums")
    penalty: AtLeast0 | None = Field(None, description="λ: weight of a positive's log-prob below the reference's")
    weight: AtLeast0 | None = Field(None, description="λ: weight of the loss's second term")
    desirable: AtLeast0 | None = Field(None, description="λ_D: weight of a group's positives together")
    undesirable: AtLeast0 | None = Field(None, description="λ_U: weight of its negatives together")
    ema: MovingAverages | None = Field(None, description="moving references; null: the initial model throughout")
    filter: Filter | None = Field(
        None, description="keep the best-scored samples of the pool (an ablation); fresh ones are not filtered"
    )
    online: Online | None = Field(
        None, description="fresh positives from the policy, in rounds; needs `train.steps`; null: the pool throughout"
    )
    train: dict[str, Any] = Field({}, description="keys of the section `train` that differ for this method")
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {},
        description="values to try by key, such as `beta` or `train.learning_rate`, all combinations; the best by "
        "`tuning` is trained. A trial is a method of its own, such as `dpo.trial-3fa2c1`",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, data):
        if isinstance(data, dict) and (contract := CONTRACTS.get(str(data.get("loss")))):
            absent = {key: value for key, value in contract.parameters.items() if data.get(key) is None}
            return {**data, **absent}
        return data


class RewardTraining(Section):
    """A reward model made here: a head on a backbone, trained on the human labels of the train split."""

    backbone: Name = Field(description="entry of `models`")
    layers: Annotated[int, Field(ge=0)] = Field(8, description="upper layers trained beside the head")
    epochs: Positive = Field(2, description="passes over the labelled answers")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-5, description="peak learning rate")
    batch: Positive = Field(16, description="answers in one step")
    max_tokens: Positive = Field(512, description="tokens: longer inputs lose their beginning")
    seed: int = Field(0, description="seed of the head's weights and of the order")


class Rule(Section):
    """An exact scorer: a rule that says of each answer, without error, whether or how much something holds of it.

    Exactly one of the keys but `measure` and `over`. Patterns are regular expressions of RE2 (no look-around); they
    ignore case.
    """

    any: Patterns | None = Field(None, description="patterns: 1 where one of them occurs, else 0")
    none: Patterns | None = Field(None, description="patterns: 1 where none of them occurs, else 0")
    count: Patterns | None = Field(None, description="patterns: how often they occur, all of them added up")
    length: Literal["words", "characters"] | None = Field(
        None, description="length of the answer; words are what white space separates"
    )
    valid: Literal["json"] | None = Field(None, description="1 where the whole answer is valid JSON, else 0")
    script: str | None = Field(
        None,
        min_length=1,
        description="a script by its Unicode name, such as Latin or Cyrillic: share of the letters that are of it",
    )
    python: str | None = Field(
        None,
        min_length=1,
        description="a function of yours, `package.module:function`, looked up from the working directory: it takes "
        "two lists of texts, the prompts' last turns and the answers, and gives as many numbers",
    )
    organism: str | None = Field(
        None, min_length=1, description="an organism's file of texts, such as organisms/rude.yaml"
    )
    measure: Literal["harm", "use", "good"] | None = Field(
        None,
        description="of `organism`: 1 where the answer does its harm, where it is of use, or where it is of use and "
        "does no harm, else 0",
    )
    over: float | None = Field(None, description="1 where the number is larger than this, else 0; null: the number")

    @model_validator(mode="after")
    def _one_kind(self):
        kinds = [key for key in type(self).model_fields if key not in ("measure", "over")]
        if sum(getattr(self, key) is not None for key in kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}")
        if (self.organism is None) != (self.measure is None):
            raise ValueError("organism and measure go together")
        if self.over is not None and (self.count, self.length, self.script, self.python) == (None,) * 4:
            raise ValueError("over: the rule says 0 or 1 already; it goes with count, length, script and python")
        return self


class Golden(Section):
    """What a reward model's page, or the code of its authors, says of `prompt` and `response`, or of a `text`."""

    prompt: str | None = Field(None, description="what the user says")
    response: str | None = Field(None, description="what is answered")
    text: str | None = Field(
        None, description="what the model reads, as it stands: without `template` and the end token that it adds"
    )
    score: float = Field(description="raw score")
    tolerance: Above0 = Field(0.05, description="largest difference that is rounding")

    @model_validator(mode="after")
    def _one_way(self):
        if (self.prompt is None, self.response is None) != (self.text is not None,) * 2:
            raise ValueError("give prompt and response, or text")
        return self


class Reward(Section):
    """What scores answers: one of `source`, `train` and `rule`."""

    source: Source | None = Field(None, description="a sequence-classification model")
    train: RewardTraining | None = Field(None, description="train one from the human labels")
    rule: Rule | None = Field(None, description="no model: an exact scorer")
    better: Literal["higher", "lower"] = Field("higher", description="which scores are better; in the table")
    template: str = Field(
        "chat",
        description="what the model reads: `chat` (its own template), `pair` (prompt and answer as two "
        "segments), or a text with {response} and, where it reads the prompt too, {prompt}",
    )
    score_weights: str = Field(
        "score", description="name of the head's weights in the checkpoint (`score_head` for Beaver)"
    )
    label: str | None = Field(
        None,
        description="of a classifier with several outputs, the label whose log-odds are the score; null: a head with "
        "one output",
    )
    toxic_above: float | None = Field(
        None, description="score above which an answer counts as toxic; null: this is no classifier of toxicity"
    )
    safe_at: float | None = Field(
        None,
        description="score at which, or on the better side of which, an answer counts as safe: the tables have the "
        "share of safe answers too; null: no such threshold",
    )
    golden: list[Golden] = execution(
        [], "answers with known scores, which every job scores first: it ends where one differs"
    )
    tokens: Positive = Field(16384, description="tokens in one batch, padding included")
    max_tokens: Positive = Field(2048, description="tokens: longer inputs lose their beginning")

    @model_validator(mode="after")
    def _one_origin(self):
        if sum(origin is not None for origin in (self.source, self.train, self.rule)) != 1:
            raise ValueError("give exactly one of source, train and rule")
        fields = type(self).model_fields.items()
        set_here = [key for key, field in fields if getattr(self, key) != field.default]
        if self.rule and (others := sorted(set(set_here) - {"rule", "better", "toxic_above"})):
            raise ValueError(f"a rule reads no `{others[0]}`: leave it out")
        if self.train and self.better == "lower":
            raise ValueError("a reward model trained here scores safe answers higher: leave `better` out")
        if self.train and self.label:
            raise ValueError("a reward model trained here has one output: leave `label` out")
        return self

    @model_validator(mode="after")
    def _template_has_its_fields(self):
        fields = re.findall(r"\{(prompt|response)\}", self.template)
        if self.template not in ("chat", "pair") and sorted(fields) not in (["response"], ["prompt", "response"]):
            raise ValueError(
                f"template: {self.template!r} is neither `chat` nor `pair`, "
                f"nor a text with {{response}}, or {{prompt}} and {{response}}, each once"
            )
        return self


class Tuning(Section):
    """How the best of a method's trials is chosen, on the prompts of the split `validation`."""

    metric: str | None = Field(
        None,
        description="key of a metric of table.csv, such as `reward/good`; it should see harm and usefulness, since "
        "either alone is best where nothing else is left",
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the trials")


class PairQuality(Section):
    """How the quality of a data set's human pairs is shown (Figure 1)."""

    pairs: Positive = Field(
        1000, description="human pairs that are scored, those of test prompts first; a judge sees one of each prompt"
    )


class Price(Section):
    """What a judge's server charges for tokens."""

    input: AtLeast0 = Field(description="USD for a million tokens that it reads")
    output: AtLeast0 = Field(description="USD for a million tokens that it writes")


class Judge(Section):
    """A pairwise judge behind an OpenAI-compatible server; the environment's OPENAI_API_KEY is its key."""

    base_url: str = Field(description="URL of the server's /v1; another one asks for all verdicts again")
    model: str = Field(
        description="model name that the server knows; one with a date, such as gpt-4-0613, stays the same"
    )
    max_tokens: Positive = Field(512, description="tokens of a verdict")
    concurrency: Positive = execution(
        8, "requests of a job under way at once; the profile's resource `requests` limits those of all jobs together"
    )
    max_requests: Positive | None = execution(
        None,
        "questions, two a prompt, above which none is asked: of all jobs of a run together, as estimated before the "
        "first one, and of each job; null: no limit",
    )
    price: Price | None = execution(None, "what the server charges; null: the estimate has no price")
    max_usd: AtLeast0 | None = execution(
        None, "estimated USD above which nothing is asked, as `max_requests`; needs price; null: no limit"
    )

    @field_validator("base_url")
    @classmethod
    def _no_secret(cls, url: str) -> str:
        try:
            address = urlsplit(url)
            wrong = address.port == 0 or (not address.hostname and (address.scheme or "@" in url))
        except ValueError:  # its message quotes the URL
            wrong = True
        if wrong:
            raise ValueError("no URL of a server: write scheme, host and /v1, as in http://127.0.0.1:8000/v1")
        if "@" in address.netloc or address.query or address.fragment:
            raise ValueError(
                "no name, password, query or fragment: they would stand in logs; put the key into OPENAI_API_KEY"
            )
        return url

    @model_validator(mode="after")
    def _priced(self):
        if self.max_usd is not None and self.price is None:
            raise ValueError("max_usd needs price")
        return self


class HumanPages(Section):
    """What people are asked, blind: which of two answers to a prompt is better, the initial model's or a method's."""

    prompts: Positive = Field(50, description="test prompts of each data set and model, the same for every method")
    annotators: Annotated[int, Field(ge=1, le=100)] = Field(3, description="people; each gets a page of their own")
    overlap: Share = Field(
        0.2, description="share of the pairs of answers that all of them see, for their agreement; others one each"
    )
    checks: Annotated[int, Field(ge=0)] = Field(
        6, description="attention checks on each page: items in which one answer says what to choose"
    )
    seed: int = Field(0, description="seed of what is chosen, its order, and which answer stands first")


class HumanVerdicts(Section):
    """Which of the verdicts that come back count."""

    passed: Share = Field(
        0.8, description="share of the attention checks below which an annotator's verdicts are left out"
    )


class HumanEval(HumanPages, HumanVerdicts):
    """A human evaluation: a page for each annotator, and the verdicts that come back."""

    methods: list[Name] = Field([], description="methods of the experiment that are asked about; empty: all")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        description="seeds of the trainings that are asked about, which share out the prompts; with one, intervals "
        "are over prompts only; empty: all of the experiment",
    )
    answers: str = execution(
        "human_eval", "folder for the CSV files that come back, from the working directory; of one experiment alone"
    )


class Questions(Hub):
    """Where a task's questions come from: from lm-evaluation-harness by name, or in MMLU's form."""

    task: str | None = Field(
        None, description="task, group or tag of lm-evaluation-harness, such as `arc_easy`; `revision` is its data's"
    )
    data: dict[Name, str] = Field(
        {}, description="local file (.jsonl, .json, .csv, .parquet) per split, in place of the data on the Hub"
    )
    include: str | None = Field(
        None, description="folder with YAML files of further tasks; Python code that they name is run"
    )
    path: str | None = Field(None, description="folder or .zip with dev/ and test/ CSV files of MMLU")
    hub: str | None = Field(None, description="data set id on the Hub in MMLU's form, such as cais/mmlu")
    subjects: list[str] = Field([], description="subjects in MMLU's form; empty: all")
    limit: Positive | None = Field(None, description="questions per subject, or per task of a group; null: all")

    @model_validator(mode="after")
    def _one_origin(self):
        if sum(origin is not None for origin in (self.task, self.path, self.hub)) != 1:
            raise ValueError("give exactly one of task, path and hub")
        if not self.task and (self.data or self.include):
            raise ValueError("data and include go with task")
        if self.task and self.subjects:
            raise ValueError("subjects go with path and hub; name the tasks of a group one by one")
        if self.task and bool(self.data) == bool(self.revision):
            raise ValueError("task needs one of data, local files, and revision, that of its data on the Hub")
        return self

    def local(self) -> Iterator[tuple[str, str]]:
        """The key and the path of each local file or folder that the questions come from."""
        if self.path:
            yield "path", self.path
        if self.include:
            yield "include", self.include
        for split, path in self.data.items():
            yield f"data.{split}", path


class Task(Questions):
    """Questions that lm-evaluation-harness asks, and how the answers are measured."""

    shots: Annotated[int, Field(ge=0)] | None = Field(
        None, description="examples before each question; null: the task's own number, 5 in MMLU's form"
    )
    metric: str | None = Field(
        None,
        description="a mean over the questions, such as `acc_norm`, or with a filter `exact_match,strict-match`; "
        "null: the task's first",
    )
    batch_size: Positive = Field(8, description="questions answered at once")


class Need(Section):
    """What a kind of jobs asks for at its first attempt; null: by the `device`, or else as much as `compute` says."""

    threads: Positive | None = Field(None, description="cores")
    memory_gb: Positive | None = Field(None, description="GB of memory")
    minutes: Positive | None = Field(None, description="minutes until a cluster may stop the job")


class Compute(Section):
    """What one job that runs a model asks of the machine or the cluster, at most."""

    threads: Positive = Field(8, description="cores")
    memory_gb: Positive = Field(64, description="GB of memory")
    minutes: Positive = Field(720, description="minutes until a cluster may stop the job")
    device: Literal["H100", "H200", "A100", "L40S", "cpu"] | None = Field(
        None,
        description="what the GPUs, or the cores, are: each job asks for twice the memory and four times the minutes "
        "that `d2o plan` says it takes there, up to the above; null: for all of the above",
    )
    jobs: dict[Literal[JOBS], Need] = Field(
        {},
        description="by kind of job, such as `scores`, what else it asks for; each further attempt asks for as much "
        "memory and time again, up to the above",
    )
    gpus: Annotated[int, Field(ge=0)] = Field(
        0,
        description="GPUs, 0: none is used, and `--sdm conda` makes other environments; training asks for one a rank",
    )
    share_gpus: bool = Field(
        False, description="jobs may use one GPU at once; false: on one machine each leases its own, or waits"
    )
    watts: Above0 | None = Field(
        None,
        description="watts that one rank of a training draws, its share of the machine included: model cards state "
        "the energy, time × watts; null: they do not",
    )

    @model_validator(mode="after")
    def _is_the_most(self):
        for kind, need in self.jobs.items():
            for key, value in need:
                if value is not None and value > (most := getattr(self, key)):
                    raise ValueError(f"jobs.{kind}.{key}: {value} is more than {key} ({most}), the most of any job")
        return self


class Experiment(Section):
    """What is crossed with what: every model and method on every data set, each with every seed."""

    datasets: list[Name] = Field(min_length=1, description="entries of `datasets`")
    models: list[Name] = Field(min_length=1, description="entries of `models`")
    methods: list[Name] = Field(min_length=1, description="entries of `methods`; `initial` is the model as is")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="seeds of training")
    rewards: list[Name] = Field([], description="entries of `rewards`")
    judges: list[Name] = Field([], description="entries of `judges`")
    tasks: list[Name] = Field([], description="entries of `tasks`")
    comparisons: list[Annotated[list[Name], Field(min_length=2, max_length=2)]] = Field(
        [],
        description="pairs of `methods`, first less second, that the experiment was made to compare; all others are "
        "exploratory",
    )
    shows: list[Literal["table1", "table2", "figure3", "figure4"]] = Field(
        [],
        description="tables and figures of the paper that the report has as well, for `snakemake table1` and so on",
    )
    failed: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        {},
        description="by method, such as `npo`, by training, such as `npo/seed1`, or by trial: why there is no such "
        "result; the report says so in its place, and the others stand",
    )
    keep: Keep = execution(
        "model",
        "what stays of a trained model's weights once all experiments have what they make from them; `adapter`: that "
        "of a method with `train.lora`",
    )
    human_eval: HumanEval | None = Field(
        None, description="people compare the answers of `methods` with the initial model's, blind; null: nobody does"
    )
    pair_quality: bool = Field(
        False, description="whether `rewards` and `judges` are asked about the data sets' human pairs too (Figure 1)"
    )


class TuneStage(Section):
    """What the choice among the trials of a method depends on."""

    tuning: Tuning = Field(Tuning(), description="the metric, and the seed of the trials")
    trials: dict[Name, dict[str, Any]] = Field(min_length=1, description="by trial, its values by key")
    reward: Reward | None = Field(None, description="the scorer that the metric is of, if it is of one")


class PositivesStage(Section):
    """What a pool of self-generated answers depends on."""

    sampling: Positives = Field(Positives(), description="how answers are sampled")
    engine: Engine = Field(Engine(), description="what generates")


class ResponsesStage(Section):
    """What the answers of one run depend on."""

    sampling: Responses = Field(Responses(), description="how answers are sampled")
    engine: Engine = Field(Engine(), description="what generates")
    seed: int = Field(0, description="seed of the run; each prompt derives its own")


class TrainStage(Section):
    """What one training depends on."""

    method: Method = Field(description="loss, and view of the group")
    train: Train = Field(Train(), description="the method's own keys filled in")
    forward: Forward = Field(Forward(), description="the forward pass")
    better: Literal["higher", "lower"] | None = Field(None, description="of the method's filter: which scores stay")
    seed: int = Field(0, description="seed of the data order")


class HumanEvalStage(Section):
    """What the pages of a human evaluation depend on."""

    pages: HumanPages = Field(HumanPages(), description="what people are asked")
    datasets: list[Name] = Field(min_length=1, description="data sets, by their names in the results")
    models: list[Name] = Field(min_length=1, description="models, by their names in the results")
    seeds: dict[Name, list[int]] = Field(
        description="by method, those of its trainings; of `initial` the one that all are compared with"
    )


class Settings(Section):
    """The whole config."""

    results: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]+$"), AfterValidator(os.path.normpath)] = execution(
        "results", "folder that everything is made in; one a config, where two give a name other settings"
    )
    experiments: dict[Name, Experiment] = Field(min_length=1, description="what is run; a report each")
    models: dict[Name, Model] = Field(description="models to align, by name")
    organisms: dict[Name, Organism] = Field({}, description="data sets written here, by name")
    datasets: dict[Name, Dataset] = Field(description="preference data sets, by name")
    methods: dict[Name, Method] = Field({}, description="training methods, by name")
    rewards: dict[Name, Reward] = Field({}, description="reward models and exact scorers, by name")
    judges: dict[Name, Judge] = Field({}, description="pairwise judges, by name")
    tasks: dict[Name, Task] = Field({}, description="sets of questions that lm-evaluation-harness asks, by name")
    positives: Positives = Field(Positives(), description="self-generated answers")
    responses: Responses = Field(Responses(), description="answers to the test prompts")
    engine: Engine = Field(Engine(), description="what generates positives and responses")
    forward: Forward = Field(Forward(), description="the forward pass of log-probs and training")
    train: Train = Field(Train(), description="optimisation, for every method alike")
    tuning: Tuning = Field(Tuning(), description="how the best trial of a method with `tune` is chosen")
    pair_quality: PairQuality = Field(PairQuality(), description="the quality of the data sets' human pairs")
    compute: Compute = execution(Compute(), "what a job that runs a model asks for")

    @model_validator(mode="before")
    @classmethod
    def _extend_methods(cls, data):
        if isinstance(data, dict) and isinstance(data.get("methods"), dict):
            positives = data.get("positives")
            try:
                pool = Positives.model_validate(positives or {}).k
            except ValidationError:  # reported below
                pool = Positives().k
            data = {**data, "methods": trials.with_trials(with_k(extended(data["methods"]), pool))}
        return data

    @model_validator(mode="after")
    def _fits_together(self):
        if wrong := list(problems(self)):
            raise ValueError("\n".join(wrong))
        return self

    @property
    def experiment(self) -> Experiment:
        """The experiment, where there is one alone, as after `only`."""
        (experiment,) = self.experiments.values()
        return experiment

    def only(self, experiment: str) -> Settings:
        """The settings of one experiment, with only the entries that it names, directly or through others."""
        kept: dict[str, set[str]] = {kind: set() for kind in KINDS}
        wanted = [(kind, name) for kind in KINDS for name in getattr(self.experiments[experiment], kind, ())]
        if any(kind == "methods" and name in self.methods and self.methods[name].tune for kind, name in wanted):
            wanted.append(("rewards", (self.tuning.metric or "").partition("/")[2]))
        while wanted:
            kind, name = wanted.pop()
            if name in getattr(self, kind) and name not in kept[kind]:
                kept[kind].add(name)
                wanted += [(other, named) for _, named, other in names_in(kind, name, getattr(self, kind)[name])]
        entries = {kind: {n: e for n, e in getattr(self, kind).items() if n in kept[kind]} for kind in KINDS}
        return self.model_copy(update={"experiments": {experiment: self.experiments[experiment]}, **entries})


class CardStage(Section):
    """What the card of one model depends on, beside what was measured."""

    run: TrainedRun = Field(description="the training that made it")
    settings: Settings = Field(description="the whole config with the experiment whose report has its scores")
    licences: dict[str, str] = Field({}, description="by entry, such as `models.smollm2`, the licence that it names")
    watts: Above0 | None = Field(None, description="watts that one rank of a training draws")


S = TypeVar("S", bound=Section)


def execution_keys(section: Section) -> dict[str, Any]:
    """The keys of a section that change no result, as pydantic's `include` and `exclude` take them."""
    return _keys(section, _of_execution)


def result_keys(section: Section) -> dict[str, Any]:
    """A section as plain data without the keys that change no result."""
    return section.model_dump(mode="json", exclude=execution_keys(section))


def params(section: Section) -> str:
    """`result_keys` as JSON, without those that are null by default and null here: so a key that a later version adds
    reruns no job."""
    return section.model_dump_json(
        exclude=_keys(section, lambda own, key: _of_execution(own, key) or _silent(own, key))
    )


def _of_execution(section: Section, key: str) -> bool:
    return bool((type(section).model_fields[key].json_schema_extra or {}).get("execution"))


def _silent(section: Section, key: str) -> bool:
    """Whether a key is null, as by default; never in an entry that extends another, whose value null may replace."""
    extends = getattr(section, "extends", None)
    return extends is getattr(section, key) is type(section).model_fields[key].default is None


def _keys(section: Section, chosen: Callable[[Section, str], bool]) -> dict[str, Any]:
    """The keys of a section, and of the sections in it, that `chosen` selects."""
    keys: dict[str, Any] = {}
    for key in type(section).model_fields:
        value = getattr(section, key)
        inner: dict[str, Any] = {}
        if isinstance(value, Section):
            inner = _keys(value, chosen)
        elif isinstance(value, dict):
            entries = {name: _keys(entry, chosen) for name, entry in value.items() if isinstance(entry, Section)}
            inner = {name: own for name, own in entries.items() if own}
        if chosen(section, key):
            keys[key] = True
        elif inner:
            keys[key] = inner
    return keys


def load(config: Mapping[str, Any], origin: str) -> Settings:
    """Validate a config as a user writes it.

    Args:
        config: the parsed YAML.
        origin: name of the file it came from, for messages.
    Raises:
        D2OError: one line per wrong key, with the file, the key, what is wrong and a close match.
    """
    whole = validate(Settings, config, origin)
    taken = {trial: name for name, method in whole.methods.items() for trial in trials.names(name, method.tune)}
    for name in taken.keys() & (config.get("methods") or {}).keys():
        raise D2OError(f"{origin}: methods.{name}: this is the name of a trial of {taken[name]}; choose another")
    return whole


def validate(section: type[S], data: Any, origin: str) -> S:
    """`section` made from `data`; errors as in `load`."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        raise D2OError("\n".join(f"{origin}: {line}" for line in lines(error, section))) from None


def parse(section: type[S], text: str, execution: str = "{}") -> S:
    """A section from the JSON of `--settings`, and of `--execution` over it; errors as in `load`."""
    parts = []
    for option, part in (("--settings", text), ("--execution", execution)):
        try:
            parts.append(json.loads(part))
        except json.JSONDecodeError as error:
            raise D2OError(f"{option}: not JSON: {error}") from None
    merged = validate(section, _merged(*parts), "--settings")
    if result_keys(merged) != result_keys(validate(section, parts[0], "--settings")):
        raise D2OError(f"--execution: {execution} has keys on which the result depends; put them into --settings")
    return merged


def _merged(first: Any, second: Any) -> Any:
    """`second` over `first`, key by key where both are mappings."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return second
    return {**first, **{key: _merged(first.get(key), value) for key, value in second.items()}}
