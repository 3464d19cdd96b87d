"""Cost of one job of each rule: rows, tokens, operations, seconds, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from d2o import rounds, runs
from d2o.bill import arithmetic, rows, shapes
from d2o.bill.hardware import DISK, Device
from d2o.bill.jobs import Job
from d2o.bill.rows import DatasetSize
from d2o.bill.shapes import Shape
from d2o.contracts import CONTRACTS
from d2o.plan import Plan, stages
from d2o.settings import Method, Reward, Train
from d2o.train import schedule, sizes

# Assumed for every machine, in bytes: a process with its libraries and, on a GPU, its context; host memory of a
# process on a GPU; a node's host memory per token and per response of a training's groups, as text and mapped; a
# tokenizer; log and manifest; the log of a step.
_PROCESS, _CONTEXT = {"light": 0.15e9, "forward": 0.72e9, "engine": 1.15e9, "padded": 0.75e9, "train": 1.5e9}, 1.5e9
_HOST, _TOKEN, _RESPONSE, _TOKENIZER, _ABOUT, _STEP = 5e9, 10.0, 300.0, 3.6e6, 4e3, 2e3
# Seconds to encode one of a training's distinct answers, on 16 cores (docs/measured.md); weights per second that are
# read from a GGUF file; characters per token, compressed and not.
_ENCODE, _DEQUANTISED, _TEXT, _LINE = 6.4e-5, 14e6, 2.2, 4.5
# Factor of memory, as glibc keeps what passes of many sizes have freed: measured on CPUs.
_KEPT = 1.6
# Bytes of the head's logits held at once; steps between two evaluations of the probe, and the number of its groups.
_PIECE, _EVERY, _PROBED = {"cpu": 64 << 20, "gpu": 256 << 20}, 10, 8
# Examples before each question in MMLU's form.
_SHOTS = 5
# Characters of a judge's question without the texts that it compares.
_JUDGED = 1100


@dataclass(frozen=True)
class Work:
    """The cost of a job.

    Attributes:
        rows: prompts, groups, answers, pairs or questions.
        tokens: tokens through a model's layers.
        flops: operations.
        answered: tokens of answers, generated or scored, among `tokens`.
        seconds: from start to end.
        starting, writing: seconds of these until the first unit of work, and for checkpoints and models.
        devices: number that it holds while it runs; 0: it runs on a core beside other jobs.
        device: bytes on each device at most; 0 on a CPU, whose memory is the machine's.
        host: bytes of the machine's memory at most; for a training over several nodes, of each node.
        written, left: bytes on disk, during the job and after it.
        requests, usd: requests to a judge, and their price.
    """

    rows: float = 0.0
    tokens: float = 0.0
    answered: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    starting: float = 0.0
    writing: float = 0.0
    devices: int = 0
    device: float = 0.0
    host: float = _PROCESS["light"]
    written: float = 0.0
    left: float = 0.0
    requests: float = 0.0
    usd: float = 0.0

    @classmethod
    def table(cls, size: float, **values: float) -> Work:
        """The work of a job that leaves a table of `size` bytes, its log and its manifest."""
        return cls(written=size + _ABOUT, left=size + _ABOUT, **values)


@dataclass(frozen=True)
class Training:
    """One method's groups and steps on one data set and model.

    Attributes:
        groups: of the data.
        positives, negatives: of a group.
        answers: distinct answers of all groups; those of a pool are shared by the negatives of a prompt.
        tokens: of a group, its prompt counted once.
        flops: of a forward pass of one group.
        steps: of the whole training.
    """

    groups: float
    positives: float
    negatives: float
    answers: float
    tokens: float
    flops: float
    steps: int


class Bill:
    """The work of the jobs of a config on a device.

    Attributes:
        notes: one line per model whose shape is known from its name only.
    """

    def __init__(self, plan: Plan, device: Device):
        self._plan, self._s, self._place = plan, plan.settings, plan.layout.path
        self._device, self._on_cpu = device, not device.memory
        self.notes: dict[str, None] = {}
        self._data = cache(lambda dataset, model, _: rows.of(plan.settings, dataset, model))
        self._lengths = cache(lambda table, most, _: rows.generated(Path(table), most))

    def of(self, job: Job) -> Work:
        """The work of one job."""
        made = getattr(self, f"_{job.rule}", None)
        return made(job.names) if made else Work.table(0.0, seconds=self._device.starts["light"])

    def data(self, dataset: str, model: str) -> DatasetSize:
        """What is known about a data set for a model, by their names; looked up again once its tables exist."""
        return self._data(dataset, model, rows.known(self._s, dataset))

    def _generated(self, table: str, most: int) -> float:
        return self._lengths(table, most, Path(table).exists())

    def _running(self, kind: str, flops: float, held: float, speed: float = 1.0) -> dict[str, float]:
        """Operations, time and memory of a job that computes on one device, or on all its CPU cores.

        Args:
            kind: kind of work, a key of the device's `shares` and `starts`.
            held: bytes that the job holds beside its libraries.
            speed: factor on the speed, where the numbers are not bf16.
        """
        at = self._device
        used = self._s.compute.threads if self._on_cpu else 1
        return {
            "flops": flops,
            "starting": at.starts[kind],
            "seconds": at.starts[kind] + flops / (used * at.flops * at.shares[kind] * speed),
            "devices": self._held,
            "device": 0.0 if self._on_cpu else _CONTEXT + held,
            "host": _PROCESS[kind] + held if self._on_cpu else _HOST,
        }

    @property
    def _held(self) -> int:
        """Devices that Snakemake gives to a job that runs a model."""
        return self._s.compute.threads if self._on_cpu else max(1, self._s.compute.gpus)

    # Models --------------------------------------------------------------------------------------

    def shape(self, name: str) -> Shape:
        """The shape of an entry of `models`."""
        model = self._s.models[name]
        folder = Path(self._place("model", model=name)).parent
        if model.run:
            return self.shape(model.run.model)
        return self._shape(f"models.{name}", model.hub or model.path or model.file, folder, model.path)

    def _reward_shape(self, name: str) -> Shape:
        reward = self._s.rewards[name]
        if reward.train:
            return self.shape(reward.train.backbone)
        folder = Path(self._place("fetched_reward", reward=name)).parent
        source = reward.source
        return self._shape(f"rewards.{name}", source.hub or source.path or source.file, folder, source.path)

    def _shape(self, entry: str, source: str, folder: Path, local: str | None) -> Shape:
        if known := shapes.of_folder(folder) or (local and shapes.of_folder(Path(local))):
            return known
        shape, taken = shapes.of_name(source)
        self.notes[f"{entry}: {shape.parameters / 1e9:.3g}B weights, for the name {source!r} ({taken})"] = None
        return shape

    def models(self, job: Job) -> float:
        """Bytes of the models that a job leaves: nearly all bytes that a run leaves on disk. Reads no table."""
        if job.rule in ("fetch_model", "fetch_reward"):
            return self.of(job).left
        return 0.0 if self.released(job) else self._trained_models(job)

    def released(self, job: Job) -> float:
        """Bytes of the models that a job leaves and that are deleted once they are used; 0 where they stay."""
        goes = job.rule in ("train_method", "train_to_round") and self._plan.keep(job.names) != "model"
        return self._trained_models(job) if goes else 0.0

    def passing(self, job: Job) -> float:
        """Bytes that a training takes temporarily: its checkpoints, including one being written, and `released`."""
        if job.kind != "train":
            return 0.0
        kept, checkpoint = self._checkpoints(job)
        return (kept + 1) * checkpoint + self.released(job)

    def waiting(self, job: Job) -> float:
        """Bytes of checkpoints that a training leaves from its first round on while it waits for the next one."""
        if job.rule != "train_to_round" or job.names["round"] != "1":
            return 0.0
        return math.prod(self._checkpoints(job))

    def states(self, job: Job) -> float:
        """Bytes of a node's host memory for a training: on CPUs weights, gradients and optimizer, with GPUs what is
        offloaded. Reads no table."""
        if job.kind != "train":
            return 0.0
        method, shape = self._s.methods[job.names["method"]], self.shape(job.names["model"])
        train = runs.train_of(self._s, method)
        held = self._states(shape, method, train)
        each = held.total if self._on_cpu else self._offloaded(held, shape, train)
        return train.ranks // train.nodes * each

    def _checkpoints(self, job: Job) -> tuple[int, float]:
        """How many checkpoints of a training are kept, and the bytes of each."""
        method = self._s.methods[job.names["method"]]
        train = runs.train_of(self._s, method)
        return train.keep_checkpoints, self._checkpoint(self.shape(job.names["model"]), method, train)

    def _trained_models(self, job: Job) -> float:
        if job.kind != "train":
            return 0.0
        train = runs.train_of(self._s, self._s.methods[job.names["method"]])
        return self._models(self.shape(job.names["model"]), train, job.rule != "train_to_round")

    @staticmethod
    def _models(shape: Shape, train: Train, ends: bool) -> float:
        """Bytes of a training's models, with its snapshots where it ends."""
        return (1 + ends * len(train.snapshots)) * (2.0 * shape.parameters + _TOKENIZER)

    def _fetch_model(self, names: Mapping[str, str]) -> Work:
        model, shape = self._s.models[names["model"]], self.shape(names["model"])
        copied = 0.0 if model.run or model.path else 2.0 * shape.parameters + _TOKENIZER
        read = shape.parameters / _DEQUANTISED + self._device.starts["forward"] if model.package else copied / DISK
        host = _PROCESS["forward"] + 4 * shape.parameters if model.package else _PROCESS["light"]
        return Work(1.0, seconds=self._device.starts["light"] + read, host=host, written=copied, left=copied)

    def _fetch_reward(self, names: Mapping[str, str]) -> Work:
        local = self._s.rewards[names["reward"]].source.path
        copied = 0.0 if local else 2.0 * self._reward_shape(names["reward"]).parameters
        return Work(1.0, seconds=self._device.starts["light"] + copied / DISK, written=copied, left=copied)

    # Answers -------------------------------------------------------------------------------------

    def _sample_positives(self, names: Mapping[str, str]) -> Work:
        data, pool = self.data(names["dataset"], names["model"]), names["pool"]
        shards = int(names["shard"].rpartition("-")[2])
        k = stages.size(pool)
        return self._generating(
            self.shape(names["model"]),
            data.train.prompts * k / shards,
            data.prompt + rows.INSTRUCTION * bool(self._s.positives.instructions and pool.startswith("corrected")),
            self._sampled(names, pool),
            rows.AGAIN,
            kept=True,
        )

    def _sample_round(self, names: Mapping[str, str]) -> Work:
        data, method = self.data(names["dataset"], names["model"]), self._s.methods[names["method"]]
        sampled = self._round_prompts(names) * max(1, rounds.count(method.online, method.k))
        answer = self._generated(self._place("round_pool", names), self._s.positives.max_tokens)
        instructed = rows.INSTRUCTION * bool(self._s.positives.instructions and method.self_correction)
        shape = self.shape(names["model"])
        return self._generating(shape, sampled, data.prompt + instructed, answer, rows.AGAIN, kept=True)

    def _answer_prompts(self, names: Mapping[str, str]) -> Work:
        data, shape = self.data(names["dataset"], names["model"]), self.shape(names["model"])
        return self._generating(shape, data.asked, data.prompt, self._answered(names), 0.0, kept=False)

    def _generating(
        self, shape: Shape, answers: float, prompt: float, answer: float, again: float, kept: bool
    ) -> Work:
        """Work of sampling `answers` answers, a share `again` of them twice; `kept`: a line of each stays on disk."""
        engine, device = self._s.engine, self._device
        used = self._s.compute.threads if self._on_cpu else engine.tensor_parallel
        asked, context, weights = answers * (1 + again), prompt + answer / 2, 2.0 * shape.parameters
        taken = used * engine.gpu_memory_utilization * device.memory
        room = engine.kv_cache_gib * 2.0**30 if self._on_cpu else taken - weights
        batch = max(1.0, min(engine.max_num_seqs, asked, room / (shape.kv_bytes * (prompt + answer))))
        read = asked * arithmetic.forward_flops(shape, prompt, prompt / 2, 0)
        written = asked * answer
        rates = used * device.flops * device.shares["decode"], used * device.bandwidth * device.shares["decode"]
        seconds = device.starts["engine"] + read / (used * device.flops * device.shares["forward"])
        return Work.table(
            answers * (_TEXT * answer + 60) + kept * asked * (_LINE * answer + 170),
            rows=answers,
            tokens=asked * prompt + written,
            answered=answers * answer,
            flops=read + written * arithmetic.forward_flops(shape, 1, context, 1),
            seconds=seconds + arithmetic.decode_seconds(shape, written, context, batch, rates),
            starting=device.starts["engine"],
            devices=self._held,
            device=engine.gpu_memory_utilization * device.memory,
            host=_PROCESS["engine"] + weights + room if self._on_cpu else used * _HOST,
        )

    def _sampled(self, names: Mapping[str, str], pool: str) -> float:
        return self._generated(self._place("pool", {**names, "pool": pool}), self._s.positives.max_tokens)

    def _answered(self, names: Mapping[str, str]) -> float:
        return self._generated(self._place("responses", names), self._s.responses.max_tokens)

    # Log-probs -----------------------------------------------------------------------------------

    def _compute_reference_logprobs(self, names: Mapping[str, str]) -> Work:
        data, table = self.data(names["dataset"], names["model"]), names["table"]
        if table in ("negatives", "pairs"):
            human = data.train if table == "negatives" else data.pairs
            return self._forward(names, human.prompts, human.answers, data.answer)
        answers = data.train.prompts * stages.size(table)
        return self._forward(names, data.train.prompts, answers, self._sampled(names, table))

    def _compute_round_logprobs(self, names: Mapping[str, str]) -> Work:
        method, prompts = self._s.methods[names["method"]], self._round_prompts(names)
        answer = self._generated(self._place("round_pool", names), self._s.positives.max_tokens)
        return self._forward(names, prompts, prompts * max(1, rounds.count(method.online, method.k)), answer)

    def _compute_heldout_logprobs(self, names: Mapping[str, str]) -> Work:
        data = self.data(names["dataset"], names["model"])
        return self._forward(names, data.held_out.prompts, data.held_out.answers, data.answer)

    def _forward(self, names: Mapping[str, str], prompts: float, answers: float, answer: float) -> Work:
        """Work of the log-probs of `answers` answers to `prompts` prompts, each prompt computed once."""
        shape, prompt = self.shape(names["model"]), self.data(names["dataset"], names["model"]).prompt
        tokens = prompts * prompt + answers * answer
        held = 2.0 * shape.parameters + self._layer(shape, min(tokens, self._s.forward.tokens), 2) + 2.5 * self._piece
        flops = prompts * arithmetic.group_flops(shape, prompt, answer, answers / max(prompts, 1))
        running = self._running("forward", flops, held)
        return Work.table(30 * answers, rows=answers, tokens=tokens, answered=answers * answer, **running)

    @property
    def _piece(self) -> float:
        return _PIECE["cpu" if self._on_cpu else "gpu"]

    @staticmethod
    def _layer(shape: Shape, tokens: float, width: int) -> float:
        """Bytes that one layer holds at once where nothing is kept for a backward pass."""
        return tokens * width * (4 * shape.hidden + 3 * shape.inner)

    # Training ------------------------------------------------------------------------------------

    def _train_method(self, names: Mapping[str, str]) -> Work:
        boundaries, training = self._boundaries(names), self._training(names)
        start = boundaries[-1] if boundaries else 0
        return self._steps(names, training, training.steps - start, ends=True)

    def _train_again(self, names: Mapping[str, str]) -> Work:
        training = self._training(names)
        return self._steps(names, training, training.steps, ends=True)

    def _train_to_round(self, names: Mapping[str, str]) -> Work:
        boundaries, number = [0, *self._boundaries(names)], int(names["round"])
        return self._steps(names, self._training(names), boundaries[number] - boundaries[number - 1], ends=False)

    def _steps(self, names: Mapping[str, str], training: Training, steps: int, ends: bool) -> Work:
        """Work of some steps of a training; `ends`: its last ones, after which checkpoints go and snapshots stay."""
        shape, method, device = self.shape(names["model"]), self._s.methods[names["method"]], self._device
        train = runs.train_of(self._s, method)
        count = max(train.ranks, self._s.compute.threads) if self._on_cpu else train.ranks
        trained, seen = self._trained(shape, train), steps * train.groups_per_step
        flops = seen * training.flops * self._passes(method, train)
        stepping = flops / (count * device.flops * device.shares["train"])
        stepping += steps * 28 * trained / train.ranks / device.bandwidth
        checkpoints = math.floor(stepping / 60 / train.checkpoint_minutes) + (not ends)
        models = self._models(shape, train, ends)
        kept = models if self._plan.keep(names) == "model" else 0.0
        written = checkpoints * self._checkpoint(shape, method, train) + models
        starting = device.starts["train"] + training.answers * _ENCODE
        held, host = self._training_memory(shape, method, train, training)
        return Work(
            rows=seen,
            tokens=seen * training.tokens,
            flops=flops,
            seconds=starting + stepping + written / DISK,
            starting=starting,
            writing=written / DISK,
            devices=count,
            device=held,
            host=host,
            written=written + steps * _STEP,
            left=kept + steps * _STEP,
        )

    def _checkpoint(self, shape: Shape, method: Method, train: Train) -> float:
        width = 4 if self._s.forward.precision == "fp32" else 2
        return sizes.checkpoint(self._trained(shape, train), width, method.ema is not None)

    @staticmethod
    def _passes(method: Method, train: Train) -> float:
        """Cost of a group in forward passes: the backward counts two, or one where only adapters are trained."""
        backward = 1 if train.lora else 2
        again = 1 if train.gradient_checkpointing else 0
        references = bool(method.ema) + bool(CONTRACTS[method.loss].mismatched)
        return 1 + backward + again + references + _PROBED / _EVERY / train.groups_per_step

    @staticmethod
    def _trained(shape: Shape, train: Train) -> float:
        """Parameters that are trained: all, or those of the adapters on every linear layer."""
        if not train.lora:
            return shape.parameters
        ends = 2 * (shape.hidden + shape.queries) + 2 * (shape.hidden + shape.keys)
        return shape.layers * train.lora.rank * (ends + 3 * (shape.hidden + shape.inner))

    def _training_memory(self, shape: Shape, method: Method, train: Train, training: Training) -> tuple[float, float]:
        """Bytes on each device, and of each node's memory."""
        here = train.ranks // train.nodes
        held = self._states(shape, method, train)
        passed = min(
            max(train.tokens_per_pass, training.tokens), train.groups_per_step * training.tokens / train.ranks
        )
        kept = arithmetic.activations(shape, passed, train.gradient_checkpointing)
        head = arithmetic.head_pieces(shape, self._piece)
        responses = training.positives + training.negatives
        data = training.groups * (training.tokens * _TOKEN + responses * _RESPONSE)
        if self._on_cpu:
            return 0.0, here * (_PROCESS["train"] + held.total + _KEPT * kept + head) + data
        moved = self._moved(held, train)
        host = here * (_HOST + self._offloaded(held, shape, train)) + data
        return _CONTEXT + held.total - moved + kept + head, host

    @staticmethod
    def _moved(held: arithmetic.States, train: Train) -> float:
        """Bytes that a device does not hold with `train.offload`: the optimizer, under ZeRO 3 the weights too."""
        return train.offload * (held.optimizer + (held.weights if train.zero_stage == 3 else 0.0))

    def _offloaded(self, held: arithmetic.States, shape: Shape, train: Train) -> float:
        """Bytes of a rank that DeepSpeed keeps in host memory: what is moved there, and gradients in float32."""
        return self._moved(held, train) + train.offload * 4 * self._trained(shape, train) / train.ranks

    def _states(self, shape: Shape, method: Method, train: Train) -> arithmetic.States:
        half, trained = self._s.forward.precision != "fp32", self._trained(shape, train)
        stage = max(train.zero_stage, 1) if half else train.zero_stage
        return arithmetic.states(shape.parameters, trained, stage, train.ranks, half, method.ema is not None)

    def _training(self, names: Mapping[str, str]) -> Training:
        data, method = self.data(names["dataset"], names["model"]), self._s.methods[names["method"]]
        train = runs.train_of(self._s, method)
        human = data.pairs if method.pairs == "all" else data.train
        groups = human.groups(method, train.group_by == "prompt")
        own = method.positives == "self"
        merged = train.group_by == "prompt" and (own or method.positives == "none")
        negatives = method.negatives * (human.rows / max(groups, 1) if merged else 1.0)
        positives = float(method.k or 0) if own else float(method.positives != "none")
        answer = self._sampled(names, self._plan.pools(names)[0]) if own else data.answer
        shape = self.shape(names["model"])
        each = (positives * answer + negatives * data.answer) / max(positives + negatives, 1)
        return Training(
            groups,
            positives,
            negatives,
            positives * (human.prompts if own else groups) + negatives * groups,
            data.prompt + positives * answer + negatives * data.answer,
            arithmetic.group_flops(shape, data.prompt, each, positives + negatives),
            schedule.total_steps(train, round(groups)),
        )

    def _boundaries(self, names: Mapping[str, str]) -> list[int]:
        method = self._s.methods[names["method"]]
        steps = runs.train_of(self._s, method).steps
        return list(rounds.boundaries(method.online, steps)) if method.online else []

    def _round_prompts(self, names: Mapping[str, str]) -> float:
        """Distinct prompts of the steps of an online round: groups come in random order."""
        train = runs.train_of(self._s, self._s.methods[names["method"]])
        boundaries = [*self._boundaries(names), train.steps]
        number = int(names["round"])
        seen = (boundaries[number] - boundaries[number - 1]) * train.groups_per_step
        prompts = self.data(names["dataset"], names["model"]).train.prompts
        if train.group_by == "prompt":
            return min(prompts, seen)
        return prompts * (1 - (1 - 1 / max(prompts, 1)) ** seen)

    # Scores --------------------------------------------------------------------------------------

    def _score_responses(self, names: Mapping[str, str]) -> Work:
        data = self.data(names["dataset"], names["model"])
        return self._scoring(names, data.asked, data.prompt, self._answered(names))

    def _score_positives(self, names: Mapping[str, str]) -> Work:
        data, pool = self.data(names["dataset"], names["model"]), names["pool"]
        return self._scoring(names, data.train.prompts * stages.size(pool), data.prompt, self._sampled(names, pool))

    def _score_pairs(self, names: Mapping[str, str]) -> Work:
        data = self.data(names["dataset"], next(iter(self._s.models)))
        pairs = min(self._s.pair_quality.pairs, data.pairs.rows + data.held_out.rows)
        return self._scoring(names, pairs, data.prompt, data.answer)

    def _scoring(self, names: Mapping[str, str], answers: float, prompt: float, answer: float) -> Work:
        reward = self._s.rewards[names["reward"]]
        if reward.rule:
            return Work.table(14 * answers, rows=answers, seconds=self._device.starts["light"])
        shape, width = self._reward_shape(names["reward"]), 4 if reward.train else 2
        reads_prompt = reward.template in ("chat", "pair") or "{prompt}" in reward.template
        length = min(prompt * reads_prompt + answer, reward.max_tokens)
        tokens = answers * length
        held = width * (shape.linear + shape.head) + self._layer(shape, min(tokens, reward.tokens), width)
        flops = arithmetic.forward_flops(shape, tokens, length / 2, 0)
        running = self._running("padded", flops, held, self._speed(reward))
        return Work.table(14 * answers, rows=answers, tokens=tokens, **running)

    def _speed(self, reward: Reward) -> float:
        """Share of the speed in bf16: a reward model trained here has float32 weights."""
        return self._device.shares["fp32"] if reward.train else 1.0

    def _train_reward(self, names: Mapping[str, str]) -> Work:
        reward = self._s.rewards[names["reward"]]
        learning, shape = reward.train, self.shape(reward.train.backbone)
        data = self.data(names["dataset"], learning.backbone)
        length = min(data.prompt + data.answer, learning.max_tokens)
        learnt, tested = 2 * data.pairs.rows * length * learning.epochs, 2 * data.held_out.rows * length
        share, weights = min(1.0, learning.layers / shape.layers), float(shape.linear + shape.head)
        # Float32 weights with copies in bf16, gradients and moments of the upper layers, and the larger of two: their
        # activations, or the weights as they are written and a batch that is scored.
        kept = 1.5 * share * arithmetic.activations(shape, learning.batch * length, False)
        last = 4 * weights + self._layer(shape, min(tested, reward.tokens), 4)
        held = 6 * weights + 12 * share * shape.linear + max(kept, last)
        flops = arithmetic.forward_flops(shape, learnt, length / 2, 0) * (1 + 2 * share)
        scored = arithmetic.forward_flops(shape, tested, length / 2, 0)
        # Answers are scored in float32: counted as the operations that would take as long in bf16.
        running = self._running("padded", flops + scored / self._speed(reward), held) | {"flops": flops + scored}
        size = 4 * weights + _TOKENIZER
        return Work(2 * data.pairs.rows, learnt + tested, written=size, left=size, **running)

    # Tasks and judges ----------------------------------------------------------------------------

    def _answer_questions(self, names: Mapping[str, str]) -> Work:
        task, shape = self._s.tasks[names["task"]], self.shape(names["model"])
        folder = Path(self._place("questions", names)).parent
        asked = rows.questions(task, folder)
        length = rows.question_tokens(folder) * (1 + (_SHOTS if task.shots is None else task.shots))
        # Logits of a whole batch, and their logarithms.
        held = 2.0 * shape.parameters + 8.0 * task.batch_size * length * shape.vocabulary
        flops = arithmetic.forward_flops(shape, asked * length, length / 2, asked * length)
        return Work.table(6 * asked, rows=asked, tokens=asked * length, **self._running("padded", flops, held))

    def _judge_responses(self, names: Mapping[str, str]) -> Work:
        data = self.data(names["dataset"], names["model"])
        return self._judging(names, data.judged, data.prompt, self._answered({**names, "snapshot": ""}))

    def _judge_pairs(self, names: Mapping[str, str]) -> Work:
        data = self.data(names["dataset"], next(iter(self._s.models)))
        pairs = min(self._s.pair_quality.pairs, data.held_out.prompts + data.pairs.prompts)
        return self._judging(names, pairs, data.prompt, data.answer)

    def _judging(self, names: Mapping[str, str], pairs: float, prompt: float, answer: float) -> Work:
        """Work with two requests per pair, and their price at most, as the stage prints it before its requests."""
        judge = self._s.judges[names["judge"]]
        asked = 2 * pairs
        read = asked * (_JUDGED / rows.CHARACTERS + prompt - rows.TEMPLATE + 2 * answer)
        written = asked * judge.max_tokens
        usd = (judge.price.input * read + judge.price.output * written) / 1e6 if judge.price else 0.0
        return Work.table(20 * asked, rows=pairs, requests=asked, usd=usd)
