"""Rows of the pipeline's tables for tests; a keyword sets any other column."""

from d2o import identities, schemas


def asked(text: str) -> list[dict[str, str]]:
    """The messages of a one-turn prompt."""
    return [{"role": "user", "content": text}]


def prompt(messages: list[dict[str, str]], **columns) -> dict:
    """A row of PROMPTS."""
    return {"prompt_id": identities.prompt_id(messages), "messages": messages, "origin": "test"} | columns


def human_row(messages: list[dict[str, str]], negative: str, **columns) -> dict:
    """A row of NEGATIVES of the train split, without a positive and without labels."""
    row = dict.fromkeys(schemas.NEGATIVES.names) | {"prompt_id": identities.prompt_id(messages), "split": "train"}
    return row | {"messages": messages, "negative": negative} | columns


def sample(prompt_id: str, number: int, text: str, **columns) -> dict:
    """A row of SAMPLES: an answer that ended by itself."""
    row = {"prompt_id": prompt_id, "sample": number, "instruction": None, "seed": number, "text": text}
    return row | {"tokens": 5, "finish": "stop"} | columns


def pooled(prompt_id: str, number: int, text: str, **columns) -> dict:
    """A row of POOL: a usable first attempt without flags."""
    return sample(prompt_id, number, text) | {"attempt": 0, "flags": [], "usable": True} | columns
