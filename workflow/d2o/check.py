"""Command `check`: whether this machine computes correctly; the first command to run on a new machine.

Each line states what was compared, the difference, and the limit. Where no model is given, a tiny one with random
weights is made.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d2o import chat, devices, forward, generation, identities, logprobs, losses, model_folders, records, schemas
from d2o.errors import D2OError
from d2o.forward import Policy, Row, attention
from d2o.forward.policy import Route
from d2o.groups import Group, Response
from d2o.losses import Side
from d2o.settings import Engine, Forward, Method, Train, TrainStage, execution_keys
from d2o.train.data import Data, Inputs, prepare

# Lengths of the prompt and the responses of some groups, tokens: short ones, eleven positives, a long prompt.
_SHAPES = {
    "short": ((5, (7, 3, 4)), (1, (1, 1)), (3, (30,)), (12, (2, 2, 2, 9))),
    "eleven positives": ((40, tuple(range(20, 92, 6))), (33, tuple(range(70, 10, -5)))),
    "long prompt": ((700, (20, 130, 64, 5)), (257, (128,))),
}
# Largest relative difference of attention or its gradient from that under a dense mask in float64.
_KERNEL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Largest mean difference of a token's log-prob, nats, and relative L2 of gradients, between two routes in float32.
_ROUTES = 1e-4, 1e-3
# Largest ratio of our rounding in bf16 to the padded route's: both are differences from the padded route in float32.
_ROUNDING = 1.5
# Largest relative difference of a step's gradient norm, and relative L2 of the weights' change. AdamW's first step is
# close to the sign of the gradient, so rounding flips the sign of some small entries.
_STEP = {"fp32": (1e-3, 0.05), "bf16": (0.03, 0.3)}
# Nats by which a greedy token may be less likely than the likeliest: in bf16 two libraries round differently.
_TIE = 0.1


class Finding(NamedTuple):
    """The result of one comparison."""

    right: bool
    text: str


class Skip(Exception):
    """The reason why a check cannot be made here."""


def run(model: Path | None) -> bool:
    """Make all checks and print their findings; return whether all passed.

    Args:
        model: folder of the model for the forward pass and vLLM; None: the tiny one. The training step always uses
            the tiny one.
    """
    with tempfile.TemporaryDirectory(prefix="d2o-check-") as scratch:
        folder = Path(scratch)
        tiny = _tiny(folder / "model")
        checks = {
            "machine": _machine,
            "kernel": _kernel,
            "forward": lambda: _forward(model or tiny),
            "step": lambda: _step(tiny, folder),
            "vllm": lambda: _vllm(model or tiny),
        }
        passed = [_passes(name, check) for name, check in checks.items()]  # all checks run, even after a failure
        return all(passed)


def _passes(name: str, check: Callable[[], Iterator[Finding]]) -> bool:
    """Print the findings of a check, each with the seconds that it took; return whether all are right."""
    whole, began = True, time.monotonic()

    def say(status: str, text: str) -> None:
        nonlocal began
        now = time.monotonic()
        print(f"{status:9}{name:9}{text} ({now - began:.1f} s)", flush=True)
        began = now

    try:
        for right, text in check():
            say("ok" if right else "FAILED", text)
            whole &= right
    except Skip as reason:
        say("skipped", str(reason))
    except Exception as error:  # any failure of a machine; the other checks go on
        say("FAILED", f"{type(error).__name__}: {error}")
        whole = False
    _free()
    return whole


def _machine() -> Iterator[Finding]:
    """The devices, and the versions of the libraries and the driver."""
    versions = ", ".join(f"{name} {version}" for name, version in records.versions().items())
    cores, kind = os.cpu_count(), torch.backends.cpu.get_cpu_capability()
    yield Finding(True, f"{versions}; {cores} cores, {kind}, {torch.get_num_threads()} threads")
    gpus = devices.visible()
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < len(gpus):
        yield Finding(
            False, f"{len(gpus)} NVIDIA devices, of which torch sees {seen}; `make env LOCK=gpu`, nvidia-smi"
        )
    for number in range(seen):
        gpu = torch.cuda.get_device_properties(number)
        text = f"GPU {number}: {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        yield Finding(True, f"{text}, driver {_driver()}, CUDA {torch.version.cuda}")


def _driver() -> str:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


# The forward pass ------------------------------------------------------------------------------------


def _kernel() -> Iterator[Finding]:
    """Compare the attention of the route `shared` on this device with attention under a dense mask."""
    device = torch.device(devices.device())
    for dtype, bound in _KERNEL.items():
        name = str(dtype).removeprefix("torch.")
        if not attention.serves(device, dtype):
            yield Finding(True, f"{name}: none on {device}; rows run under a dense mask")
            continue
        for shape in _SHAPES:
            row = Row.of(_groups(shape, 2)).to(device)
            differences = {
                f"{heads}/{kv_heads} heads of {width}": _kernel_difference(row, heads, kv_heads, width, dtype)
                for width in (64, 128)
                for heads, kv_heads in ((4, 4), (8, 2))
            }
            worst = max(differences, key=differences.get)
            yield Finding(
                differences[worst] <= bound,
                f"{name}, {shape}: attention and its gradient against a dense mask in float64, at most "
                f"{differences[worst]:.1e} of {bound:.0e} ({worst})",
            )


def _kernel_difference(row: Row, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> float:
    """The largest of: the output's relative difference at a token, and those of the three gradients, relative L2."""
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> Tensor:
        return torch.randn(1, count, row.ids.shape[1], width, generator=generator).to(row.ids.device, dtype)

    inputs, grad = [random(count).requires_grad_() for count in (heads, kv_heads, kv_heads)], random(heads)
    ours, _ = attention.shared_attention(None, *inputs, None, scaling=width**-0.5, spans=row.spans)
    ours = ours.transpose(1, 2)
    gradients = torch.autograd.grad(ours, inputs, grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = scaled_dot_product_attention(*exact, attn_mask=row.mask(), enable_gqa=True)
    true_gradients = torch.autograd.grad(truth, exact, grad.double())
    by_token = [x.transpose(1, 2).flatten(2).norm(dim=2) for x in ((ours - truth).detach(), truth.detach())]
    return max(float((by_token[0] / by_token[1]).max()), *map(_relative, gradients, true_gradients))


def _forward(model: Path) -> Iterator[Finding]:
    """Compare the route `shared`, or its fallback, with `padded`: log-probs, and gradients of the first layer."""
    policy = _policy(model, "fp32")
    if policy.route == "padded":
        raise Skip(f"{policy.lm.config.model_type} takes the padded route")
    groups = [group for shape in _SHAPES for group in _groups(shape, policy.lm.config.vocab_size)]
    row = Row.of(groups).to(policy.lm.device)
    logs, gradient = _pass(policy, row)
    route = policy.route
    true_logs, true_gradient = _pass(policy, row, "padded")
    difference, turn = float((logs - true_logs).abs().mean()), _relative(gradient, true_gradient)
    yield Finding(
        difference <= _ROUTES[0] and turn <= _ROUTES[1],
        f"fp32, {route} against padded: log-probs {difference:.1e} of {_ROUTES[0]:.0e} nats a token, "
        f"gradient {turn:.1e} of {_ROUTES[1]:.0e}",
    )
    del policy
    _free()
    policy = _policy(model, "bf16")
    logs, gradient = _pass(policy, row)
    route = policy.route
    padded_logs, padded_gradient = _pass(policy, row, "padded")
    mine = [_relative(logs, true_logs), _relative(gradient, true_gradient)]
    theirs = [_relative(padded_logs, true_logs), _relative(padded_gradient, true_gradient)]
    yield Finding(
        all(a <= _ROUNDING * b for a, b in zip(mine, theirs, strict=True)),
        f"bf16, {route} and padded, each against padded in fp32: log-probs {mine[0]:.1e} and {theirs[0]:.1e}, "
        f"gradients {mine[1]:.1e} and {theirs[1]:.1e}; ours at most {_ROUNDING} times the other",
    )


def _policy(model: Path, precision: str) -> Policy:
    """The model on the device. Only the first layer's weights get gradients, which pass through all layers."""
    policy = forward.load(model, precision, device=devices.device())
    policy.requires_grad_(False)
    policy.lm.get_decoder().layers[0].requires_grad_(True)
    return policy


def _pass(policy: Policy, row: Row, route: Route = "shared") -> tuple[Tensor, Tensor]:
    """Log-probs of all response tokens, [T], and the flat gradient of their sum with weights of both signs."""
    policy.route = route
    logs = policy(row)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    loss = (logs * torch.linspace(-1, 2, len(logs), device=logs.device)).sum()
    gradients = torch.autograd.grad(loss, weights)
    return logs.detach(), torch.cat([gradient.float().flatten() for gradient in gradients])


def _groups(shape: str, vocabulary: int) -> list[Group]:
    """Groups of random ids; the last response of each is its negative."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    groups = []
    for prompt, lengths in _SHAPES[shape]:
        *up, down = [Response("r", ids(length)) for length in lengths]
        groups.append(Group("p", ids(prompt), up, [down]))
    return groups


def _relative(value: Tensor, truth: Tensor) -> float:
    """Relative L2 of a difference."""
    return float((value - truth).norm() / truth.norm())


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# A training step -------------------------------------------------------------------------------------


class _Change(NamedTuple):
    """The result of a step: the gradient's norm before clipping, and the change of all weights, flat."""

    norm: float
    weights: Tensor


def _step(model: Path, folder: Path) -> Iterator[Finding]:
    """Compare one step of D2O by the stage `train`, on one device and on several, with plain PyTorch on the CPU."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Skip("deepspeed is not installed")
    tables = _write_tables(model, folder)
    inputs = {precision: _with_reference_logprobs(tables, precision, folder) for precision in _STEP}
    truth = _plain_step(inputs["fp32"], folder / "groups.arrow")
    gpus = torch.cuda.device_count() if devices.device() == "cuda" else 0
    together = [] if gpus == 1 else [("bf16", gpus or 2)]
    for precision, ranks in [("fp32", 1), ("bf16", 1), *together]:
        step = _stage_step(inputs[precision], _stage(precision, ranks), folder / f"{precision}-{ranks}")
        norm, change = abs(step.norm / truth.norm - 1), _relative(step.weights, truth.weights)
        most_norm, most_change = _STEP[precision]
        where = f"{ranks} {'GPU' if gpus else 'CPU rank'}{'s' if ranks > 1 else ''}"
        yield Finding(
            norm <= most_norm and change <= most_change,
            f"{where}, {precision}, DeepSpeed against plain PyTorch on the CPU in fp32: gradient norm {norm:.1e} of "
            f"{most_norm:.0e}, change of the weights {change:.1e} of {most_change:.0e}",
        )
    if gpus == 1:
        raise Skip("all GPUs together: there is one GPU only")


def _stage(precision: str, ranks: int) -> TrainStage:
    train = Train(steps=1, groups_per_step=4, learning_rate=1e-2, warmup=0.0, decay="constant", ranks=ranks)
    method = Method(loss="d2o", positives="self", negatives=True)
    return TrainStage(method=method, train=train, forward=Forward(precision=precision))


def _plain_step(inputs: Inputs, groups: Path) -> _Change:
    """The step in float32 with padded rows, without DeepSpeed; its groups are written to the file `groups`."""
    stage = _stage("fp32", 1)
    prepare(stage, inputs, groups)
    batch = Data(stage, groups).batch(0)
    policy = forward.load(inputs.model, "fp32", "padded")
    names, weights = zip(*policy.lm.named_parameters(), strict=True)
    before = [weight.detach().clone() for weight in weights]
    each = []
    for group in batch:
        row = Row.of([group])
        known = torch.tensor([response.reference_logprob for response in group.responses])
        side, middle = Side.of(policy(row), row.lengths, known), len(group.positives)
        each.append(losses.of(stage.method)(side.part(0, middle), side.part(middle, len(group.responses))))
    torch.stack(each).mean().backward()
    norm = float(torch.nn.utils.clip_grad_norm_(weights, stage.train.clip))
    torch.optim.AdamW(weights, lr=stage.train.learning_rate, weight_decay=stage.train.weight_decay).step()
    changes = {name: after.detach() - old for name, after, old in zip(names, weights, before, strict=True)}
    return _Change(norm, _flat(changes))


def _stage_step(inputs: Inputs, stage: TrainStage, output: Path) -> _Change:
    """The step by the command `d2o train`.

    Raises:
        D2OError: where the command fails, with the last lines of its stderr.
    """
    keys = execution_keys(stage)
    options = {
        "settings": stage.model_dump_json(exclude=keys),
        "execution": stage.model_dump_json(include=keys),
        "model": inputs.model,
        "negatives": inputs.negatives,
        "checkpoints": output / "checkpoints",
        "output": output / "model" / "manifest.json",
    }
    pairs = [*options.items(), *(("samples", path) for path in inputs.samples)]
    pairs += [("reference-logprobs", path) for path in inputs.reference_logprobs]
    command = [sys.executable, "-m", "d2o", "train", *(str(x) for key, value in pairs for x in (f"--{key}", value))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise D2OError(f"d2o train with {stage.train.ranks} ranks:\n" + "\n".join(done.stderr.splitlines()[-30:]))
    after, before = (load_file(folder / "model.safetensors") for folder in (output / "model", inputs.model))
    record = json.loads((output / "train.jsonl").read_text())
    changes = {name: after[name].float() - weight.float() for name, weight in before.items()}
    return _Change(record["grad_norm"], _flat(changes))


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _write_tables(model: Path, folder: Path) -> Inputs:
    """Write tables of four prompts, each with one negative and three samples."""
    human, pool = [], []
    for i in range(4):
        messages = [{"role": "user", "content": f"Question number {i}?"}]
        prompt, nothing = identities.prompt_id(messages), dict.fromkeys(schemas.NEGATIVES.names)
        negative = {"split": "train", "messages": messages, "negative": f"No, I will not help with {i}."}
        human.append(nothing | {"prompt_id": prompt} | negative)
        for k in range(3):
            sample = {"sample": k, "seed": k, "text": f"Answer {k} to {i}." * (k + 1), "tokens": 1, "finish": "stop"}
            usable = {"instruction": None, "attempt": 0, "flags": [], "usable": True}
            pool.append({"prompt_id": prompt} | sample | usable)
    negatives, samples = folder / "negatives.parquet", folder / "pool.parquet"
    records.write_table(negatives, schemas.NEGATIVES, human)
    with records.artifact(samples, None, [model / "manifest.json"]) as draft:
        records.write_table(draft.path, schemas.POOL, pool)
    return Inputs(model, negatives, [samples])


def _with_reference_logprobs(inputs: Inputs, precision: str, folder: Path) -> Inputs:
    """The inputs with the reference log-probs of all responses: a training takes those of its own precision only."""
    outputs = {
        folder / f"{precision}-negatives.parquet": None,
        folder / f"{precision}-pool.parquet": inputs.samples[0],
    }
    for path, samples in outputs.items():
        logprobs.compute(Forward(precision=precision), inputs.model, inputs.negatives, samples, "train", path)
    return replace(inputs, reference_logprobs=list(outputs))


# Generation ------------------------------------------------------------------------------------------


def _vllm(model: Path) -> Iterator[Finding]:
    """Check that each token of vLLM's greedy answers is the likeliest by transformers, or within `_TIE` of it."""
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed")
    tokenizer = chat.load_tokenizer(model)
    questions = ("What is rain?", "Name three birds, please.", "Why do people sleep?", "Hello!")
    prompts = [chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in questions]
    answers = _greedy(model, prompts)
    _free()
    gaps = torch.cat(_gaps(model, prompts, answers))
    yield Finding(
        bool(gaps.max() <= _TIE),
        f"{int((gaps == 0).sum())} of {len(gaps)} greedy tokens are transformers' in fp32 too; of the others the "
        f"least likely lacks {float(gaps.max()):.1e} of {_TIE} nats",
    )


def _greedy(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Token ids of vLLM's greedy answers; the engine is loaded by the code that samples the pools."""
    engine = Engine(backend="vllm", eager=True, max_num_seqs=8, kv_cache_gib=1, gpu_memory_utilization=0.5)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings do not matter here, and go to stdout
    llm = generation.start(model, engine).llm
    from vllm import SamplingParams, TokensPrompt

    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    outputs = llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.no_grad()
def _gaps(model: Path, prompts: list[list[int]], answers: list[list[int]]) -> list[Tensor]:
    """Nats by which each token of the answers is less likely than the likeliest one; 0 where it is the likeliest."""
    lm = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=model_folders.trusts_code(model)
    ).to(devices.device())
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=lm.device)
        logs = lm(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        gaps.append(logs.amax(1) - logs.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return gaps


# A model ---------------------------------------------------------------------------------------------


def _tiny(folder: Path) -> Path:
    """Make a Llama of two million random weights in bf16, two query heads per key head; each token is a byte."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *sorted(letters)])}
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", pad_token="<|end|>", model_max_length=2048
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with records.artifact(folder) as draft:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
    return folder
