"""Chats and their tokens: one prompt, one response, the ids that the model sees when it generates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from d2o import model_folders
from d2o.errors import D2OError

Messages = Sequence[Mapping[str, str]]

# Tokens of this form control a template, whether or not a tokenizer calls them special.
_CONTROL = re.compile(r"<[|｜].+[|｜]>|\[\|.+\|\]", re.DOTALL)
# A word joiner: invisible, and no part of any token.
_JOINER = "\u2060"


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder.

    Raises:
        D2OError: as `model_folders.check`, and where there is no end-of-turn token, or the template does not begin
            the answer.
    """
    model_folders.check(folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model_folders.trusts_code(folder))
    if tokenizer.eos_token_id is None:
        raise D2OError(f"{folder}: the tokenizer has no end-of-turn token; set eos_token in tokenizer_config.json")
    if not _begins_answer(tokenizer):
        raise D2OError(
            f"{folder}: the chat template ends with the question; let it begin the answer where "
            f"add_generation_prompt is set, or name another one: `chat_template: alpaca`"
        )
    return tokenizer


def _begins_answer(tokenizer) -> bool:
    """Whether the prompt ends where an answer begins: it differs from the mere question, or the answer follows it."""
    question = {"role": "user", "content": "?"}
    asked = prompt_text(tokenizer, [question])
    alone, answered = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        for messages in ([question], [question, {"role": "assistant", "content": "!"}])
    )
    return asked != alone or (answered.startswith(asked) and answered[len(asked) :].lstrip().startswith("!"))


def as_data(tokenizer, text: str) -> str:
    """A text with its special tokens broken up, so that the tokenizer reads them as plain text.

    A word joiner (U+2060) breaks up whatever the tokenizer would read as a special token, or as another marker that
    its template writes. So no prompt and no answer can end its turn, or begin another role's, by `<|im_end|>`; nor by
    what the tokenizer's normalisation makes one, such as `［SEP］` in full-width characters.
    """
    special, firsts, joiner = _special(tokenizer)
    text = break_up(special, text, joiner)
    normalizer = _normalizer(tokenizer)
    if normalizer is None or not special.search(normalizer.normalize_str(text)):
        return text
    return "".join(c if firsts.isdisjoint(normalizer.normalize_str(c)) else c + joiner for c in text)


def break_up(pattern: re.Pattern[str], text: str, joiner: str = _JOINER) -> str:
    """A text with a word joiner (U+2060), or another text, after the first character of each match."""
    return pattern.sub(lambda token: f"{token[0][0]}{joiner}{token[0][1:]}", text)


def broken_up(tokenizer, text: str) -> bool:
    """Whether `as_data` changes a text."""
    return as_data(tokenizer, text) != text


def _normalizer(tokenizer):
    """What a fast tokenizer does to a text before it splits it, or None."""
    return getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)


@lru_cache(maxsize=8)
def _special(tokenizer) -> tuple[re.Pattern[str], frozenset[str], str]:
    """What no text may hold: a pattern of these tokens, their first characters, and what to put after one.

    The last is a word joiner, or a space where the tokenizer removes joiners.
    """
    written = str(tokenizer.chat_template)

    def controls(content: str) -> bool:
        """Whether an added token controls the template: by its form, or since it is written there as it is.

        A template may put one together (`'<|' + role + '|>'`). Others, such as Gemma's `<table>`, are text.
        """
        return bool(_CONTROL.fullmatch(content)) or (content.startswith(("<", "[")) and content in written)

    names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or controls(t.content)]
    joiner, normalizer = _JOINER, _normalizer(tokenizer)
    if normalizer is not None:
        joiner = _JOINER if _JOINER in normalizer.normalize_str(f"a{_JOINER}b") else " "
        # These are sought in the normalised text.
        normalised = [t.content for t in tokenizer.added_tokens_decoder.values() if t.normalized]
        names += [normalizer.normalize_str(name).strip("▁ ") for name in normalised if name in names]
    longest_first = sorted({name for name in names if len(name) > 1}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return pattern, frozenset(name[0] for name in longest_first), joiner


def prompt_text(tokenizer, messages: Messages) -> str:
    """The prompt as the model gets it: in the template, up to where the answer begins."""
    return conversation(tokenizer, messages, add_generation_prompt=True)


def conversation(tokenizer, messages: Messages, **options) -> str:
    """Messages in the tokenizer's template, their contents through `as_data`; options as of `apply_chat_template`."""
    turns = [{**message, "content": as_data(tokenizer, message["content"])} for message in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)


def encode_prompt(tokenizer, messages: Messages) -> list[int]:
    """Ids of the prompt; the template adds its own special tokens."""
    return _ids(tokenizer, [prompt_text(tokenizer, messages)])[0]


def end_of_turn(tokenizer) -> int:
    """The token with which a model ends its answer: the first special token after an answer in the template.

    Often it is the tokenizer's end token, but Phi-3 ends a turn with `<|end|>` and a text with `<|endoftext|>`. The
    end token is returned where the template shows no answer, or no special token after it.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=False, tokenize=False)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    (behind,) = _ids(tokenizer, [text.rpartition("!")[2]])
    return next((token for token in behind if token in special), tokenizer.eos_token_id)


def encode(
    tokenizer, dialogues: Sequence[tuple[Messages, Sequence[tuple[str, bool]]]], end: int
) -> list[tuple[list[int], list[list[int]]]]:
    """Ids of each prompt and of each response to it; a fast tokenizer does them all at once, on every core.

    Prompt and response are tokenised as one text wherever that does not change the prompt's own ids, so that the
    tokens at the boundary are those of the whole text. Where a token would span the boundary, the response is
    tokenised alone, because a generating model has to continue from the prompt's ids.

    Args:
        dialogues: prompts with their responses. A response is a text and whether it ended by itself; only then `end`
            is appended.
        end: the tokenizer's `end_of_turn`.
    """
    texts = [prompt_text(tokenizer, messages) for messages, _ in dialogues]
    prompts = _ids(tokenizer, texts)
    asked = [
        (text, prompt, as_data(tokenizer, response))
        for text, prompt, (_, responses) in zip(texts, prompts, dialogues, strict=True)
        for response, _ in responses
    ]
    wholes = _ids(tokenizer, [text + response for text, _, response in asked])
    joint = [whole[: len(prompt)] == prompt for whole, (_, prompt, _) in zip(wholes, asked, strict=True)]
    alone = iter(_ids(tokenizer, [response for (*_, response), one in zip(asked, joint, strict=True) if not one]))
    ids = (
        whole[len(prompt) :] if one else next(alone)
        for whole, (_, prompt, _), one in zip(wholes, asked, joint, strict=True)
    )
    return [
        (prompt, [next(ids) + [end] * finished for _, finished in responses])
        for prompt, (_, responses) in zip(prompts, dialogues, strict=True)
    ]


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids if texts else []
