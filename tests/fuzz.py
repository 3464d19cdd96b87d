"""Fuzzing, with atheris, of readers of untrusted bytes: a reader may refuse them in one line; any other error fails.

    uv pip install atheris
    TQDM_DISABLE=1 python tests/fuzz.py rows -max_total_time=600

Targets: `rows`, `dialogue`, `gguf`, `reply`, `asked`, `prompts`, `verdicts`. Further arguments are libFuzzer's, which
writes an input that ends a target to a file `crash-…`. `tests/test_fuzz.py` gives each target its seeds.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType

from d2o import datasets, formats, judge, models, questions
from d2o.errors import D2OError
from d2o.formats import FORMATS, BadRow, LeftOut
from d2o.human_eval import answers
from d2o.negatives import evaluated
from d2o.settings import Reading

_READINGS = [
    Reading(format=name, train=["a"], **({"label": {"below": 3}} if name == "rated" else {})) for name in FORMATS
]


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def _outcomes(row: object) -> None:
    for reading in _READINGS:
        for outcome in formats.outcomes(row, reading):
            if isinstance(outcome, BadRow | LeftOut):
                assert "\n" not in str(outcome), outcome
            else:
                assert isinstance(outcome["prompt_id"], str)


def rows(data: bytes) -> None:
    """JSON lines, an array, or a table of texts, by the first byte; each row by every format."""
    path = _folder() / ("a.jsonl", "a.json", "a.csv")[data[0] % 3 if data else 0]
    path.write_bytes(data[1:])
    with suppress(D2OError):
        for _, row in datasets.file_rows(path):
            _outcomes(row)


def dialogue(data: bytes) -> None:
    """Two dialogues in HH-RLHF's form, split at a zero byte; lone surrogates included, as JSON can encode them."""
    chosen, _, rejected = data.partition(b"\0")
    texts = [f"\n\nHuman: {text.decode(errors='surrogateescape')}" for text in (chosen, rejected)]
    _outcomes(dict(zip(("chosen", "rejected"), texts, strict=True)))
    _outcomes({"prompt": texts[0], "completion": texts[1], "label": rejected[:1] == b"1"})


def gguf(data: bytes) -> None:
    """A model file."""
    path = _folder() / "a.gguf"
    path.write_bytes(data)
    with suppress(D2OError):
        models._convert_gguf(path, _folder() / "model")


def reply(data: bytes) -> None:
    """The body of a judge's reply; then the text itself as one."""
    for body in (data, json.dumps({"choices": [{"message": {"content": data.decode(errors="replace")}}]}).encode()):
        text = judge._content(body)
        letter, reason = judge.parse(text or "")
        assert letter in (None, *"ABC")
        reason.encode()


def asked(data: bytes) -> None:
    """Questions in MMLU's form."""
    with suppress(D2OError):
        for row in questions._parse(lambda: data, "a.csv"):
            assert len(row["choices"]) == 4


def prompts(data: bytes) -> None:
    """A file of prompts that are evaluated, by the first byte."""
    path = _folder() / ("p.jsonl", "p.json", "p.csv", "p.jsonl.gz")[data[0] % 4 if data else 0]
    path.write_bytes(data[1:])
    with suppress(D2OError):
        for row in evaluated.prompts([str(path)]):
            row["messages"][0]["content"].encode()


def verdicts(data: bytes) -> None:
    """A file that an annotator sends back, of a page with three items."""
    path, items = _folder() / "v.csv", {(1, number): {"version": "v", "check": ""} for number in range(3)}
    path.write_bytes(data)
    with suppress(D2OError):
        answers.gathered([path], items)


TARGETS: dict[str, Callable[[bytes], None]] = {
    run.__name__: run for run in (rows, dialogue, gguf, reply, asked, prompts, verdicts)
}

# Inputs that mutation starts from, with those that once failed.
SEEDS: dict[str, list[bytes]] = {
    "rows": [
        b'0{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "completion": "a", "label": false}\n',
        b'1[{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}], '
        b'"feedback": "bad"}]',
        b"2prompt,response,rating\np,a,1\n",
        b'0{"prompt": "p", "response": "a", "quality.responses": true}\n'
        b'0{"fields": {"prompt": "p", "response": "a"}, "responses": {"quality": true}}\n',
        b'0{"prompt": "p", "response_0": "a", "response_1": "b", "is_response_0_safe": true, '
        b'"is_response_1_safe": false, "better_response_id": 0, "safer_response_id": 0}\n',
    ],
    "dialogue": [
        b"Hello\n\nAssistant: Yes.\0Hello\n\nAssistant: No.",
        b"a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\0",
    ],
    "gguf": [
        b"GGUF\x03\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\4" + bytes(7) + b"name\x08\0\0\0\1" + bytes(7) + b"a",
        b"GGUF\x03\0\0\0" + bytes(8) + b"\1" + bytes(7) + 8 * b"\xff" + b"name",  # a name of 2^64 - 1 bytes
    ],
    "asked": [b"q?,1,2,3,4,A\n", b'" ""q"", a\nb",None,,1.50,"x,y",D\n\n'],
    "prompts": [
        b'0{"prompt": "Why?", "label": "safe"}\n',
        b'1[{"prompt": "Why?"}]',
        b"2id,prompt,label\n1,Why?,unsafe\n",
    ],
    "verdicts": [(",".join(answers.COLUMNS) + f"\nv,1,{n},harmless,1\n").encode() for n in (0, 7)],
    "reply": [b'{"choices": [{"message": {"content": "B is kinder. [[B]]"}}]}', b"Both. [[C]].", b"[[A]] or [[B]]?"],
}


# Modules whose functions are instrumented for new paths; all of torch's would take minutes.
_WATCHED = (
    "d2o",
    "gguf",
    "ijson",
    "json",
    "transformers.configuration_utils",
    "transformers.integrations.gguf",
    "transformers.modeling_gguf_pytorch_utils",
)


def _functions() -> Iterator[FunctionType]:
    for name, module in sorted(sys.modules.items()):
        if name.startswith(_WATCHED):
            spaces = [vars(module), *(vars(one) for one in vars(module).values() if isinstance(one, type))]
            yield from {
                one
                for space in spaces
                for one in space.values()
                if isinstance(one, FunctionType) and one.__module__ == name
            }


def main() -> None:
    """The command line."""
    import atheris

    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"usage: python tests/fuzz.py {{{','.join(TARGETS)}}} [libFuzzer's arguments]")
    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed{number}").write_bytes(seed)
        TARGETS[name](seed)  # imports all that it needs
    for function in _functions():
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *sys.argv[1:], str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
