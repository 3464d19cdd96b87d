"""The schema of each table: its columns, and the meaning of a row."""

from __future__ import annotations

import pyarrow as pa

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

# A human-labelled answer: whether it is unsafe, the harm categories it falls under (names as in the data set), and
# how severe the harm is (0 none, 1 minor, 2 moderate, 3 severe). Each is null where the data set has no such label.
_LABELLED = pa.struct(
    [
        ("text", pa.string()),
        ("unsafe", pa.bool_()),
        ("categories", pa.list_(pa.string())),
        ("severity", pa.int8()),
    ]
)

# One raw preference row. `better` and `safer` are indices into `responses`, or null.
ROWS = pa.schema(
    [
        ("row", pa.int64()),
        ("split", pa.string()),
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("responses", pa.list_(_LABELLED)),
        ("better", pa.int8()),
        ("safer", pa.int8()),
    ]
)

# A human negative and, where there is one, the human answer preferred to it. `categories` and `severity` are the
# negative's, as above.
NEGATIVES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("messages", _MESSAGES),
        ("negative", pa.string()),
        ("positive", pa.string()),
        ("positive_unsafe", pa.bool_()),
        ("categories", pa.list_(pa.string())),
        ("severity", pa.int8()),
    ]
)

# A prompt that every method answers; `origin` is `test`, `validation` or the name of an evaluation file.
PROMPTS = pa.schema([("prompt_id", pa.string()), ("messages", _MESSAGES), ("origin", pa.string())])

# A generated answer. `finish` is `stop`, or `length` where it was cut.
SAMPLES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("instruction", pa.string()),
        ("seed", pa.int64()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("finish", pa.string()),
    ]
)

# A self-generated answer: which attempt at the sample it is, its flags, and whether it is usable to learn
# from. Every (prompt, sample) is there once.
POOL = pa.schema(
    [
        *SAMPLES,
        ("attempt", pa.int32()),
        ("flags", pa.list_(pa.string())),
        ("usable", pa.bool_()),
    ]
)

# log π(response | prompt) in nats, summed over the response's `tokens`.
LOGPROBS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("response_id", pa.string()),
        ("logprob", pa.float64()),
        ("tokens", pa.int32()),
    ]
)

SCORES = pa.schema([("prompt_id", pa.string()), ("sample", pa.int32()), ("score", pa.float64())])

# One question of a task, by its number among those of the subject, and its text, which a prompt may contain.
QUESTIONS = pa.schema([("subject", pa.string()), ("question", pa.int32()), ("text", pa.string())])

# A question that the train prompts contain: `prompt`, the text in one of them that equals it (kind `leak`) or is near
# to it (`near leak`), and the similarity of the two.
LEAKS = pa.schema(
    [
        ("subject", pa.string()),
        ("question", pa.int32()),
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("similarity", pa.float64()),
    ]
)

# One question of a task, answered by one model: the task's metric for it, such as 1 where the answer is right.
TASK_VALUES = pa.schema([("subject", pa.string()), ("question", pa.int32()), ("value", pa.float64())])

# The orders in which the answers of a pair are shown: whose is the first, and whose the second.
ORDERS = {"initial-first": ("initial", "method"), "method-first": ("method", "initial")}

# One judgement of a pair: `order` states which answer came first, `verdict` which won (`unread` where that is not
# known), and `longer` by how many characters the method's answer is longer than the initial model's.
VERDICTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("order", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("longer", pa.int32()),
    ]
)

# One item of an annotator's page: a pair of answers, the initial model's and that of a training, and which is
# answer 1 (`order`, as in verdicts); or an attention check: a request to press the key `check` replaces the method's
# answer, beside an answer of `method`, or of the initial model where that is null.
HUMAN_KEY = pa.schema(
    [
        ("version", pa.string()),
        ("annotator", pa.int32()),
        ("item", pa.int32()),
        ("dataset", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("prompt_id", pa.string()),
        ("order", pa.string()),
        ("check", pa.string()),
    ]
)

# The questions to annotators about each pair of answers.
HUMAN_QUESTIONS = ("harmlessness", "helpfulness")

# An annotator's verdict on a pair of answers: `question` is one of `HUMAN_QUESTIONS`, `verdict` as above.
HUMAN_VERDICTS = pa.schema(
    [
        ("dataset", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("prompt_id", pa.string()),
        ("annotator", pa.int32()),
        ("question", pa.string()),
        ("order", pa.string()),
        ("verdict", pa.string()),
    ]
)
