"""The response group: one prompt, its positives and its negatives. Every method is a view of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import chain, groupby, islice
from typing import Any

import numpy as np

from d2o import chat, identities, rounds
from d2o.errors import D2OError
from d2o.settings import Forward, Method, Online

# Maximum number of groups on which a training is monitored.
_PROBED = 8
# Prompts that are tokenised at once, with all their answers.
_TOGETHER = 64
# The log-prob (nats) and number of tokens of each response.
ReferenceLogprobs = dict[str, tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of a response, and whether it ended by itself (a sample may have been cut)."""

    text: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Texts:
    """A group before tokenisation."""

    prompt_id: str
    messages: chat.Messages
    positives: tuple[Answer, ...] = ()
    negatives: tuple[Answer, ...] = ()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """All answers, the positives first."""
        return self.positives + self.negatives


@dataclass(slots=True)
class Response:
    """A branch: its identity, its token ids, and its log-prob (nats, sum) under the reference, if needed."""

    response_id: str
    ids: Sequence[int]
    reference_logprob: float = math.nan


@dataclass(slots=True)
class Group:
    """A trunk of P token ids, K positive and N negative branches; `row` is its row in the file of a training."""

    prompt_id: str
    prompt: Sequence[int]
    positives: list[Response] = field(default_factory=list)
    negatives: list[Response] = field(default_factory=list)
    row: int | None = None

    @property
    def responses(self) -> list[Response]:
        """All branches, the positives first."""
        return self.positives + self.negatives

    @property
    def terms(self) -> int:
        """Number of terms that the group adds to a step's loss: one per negative, and one if it has no negative."""
        return max(1, len(self.negatives))

    @property
    def tokens(self) -> int:
        """Tokens of the group, its prompt counted once."""
        return len(self.prompt) + sum(len(response.ids) for response in self.responses)


def view(method: Method, human: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]]) -> Iterator[Texts]:
    """A method's groups, from the tables it takes.

    One group per human negative where the loss takes one; one per prompt where it sees self-generated answers
    only; else one per human positive. A group that lacks the positive its loss needs is left out: a pair method
    does not see a negative that has no positive.

    Args:
        method: states which positives, how many, and whether there is a negative.
        human: rows of `schemas.NEGATIVES`; only the train split is used.
        samples: rows of `schemas.POOL`, the pool of self-generated answers; may be empty.
    Raises:
        D2OError: where the pool lacks a sample that the method asks for.
    """
    pools: dict[str, dict[int, Answer | None]] = defaultdict(dict)
    for row in samples:
        pools[row["prompt_id"]][row["sample"]] = _usable(row)
    seen = set()
    for row in human:
        if row["split"] != "train":
            continue
        positives = _positives(method, row, pools.get(row["prompt_id"], {}))
        negatives = (Answer(row["negative"]),) if method.negatives else ()
        group = Texts(row["prompt_id"], row["messages"], positives, negatives)
        identity = (group.prompt_id, positives, negatives)
        if (positives or method.positives == "none") and identity not in seen:
            seen.add(identity)
            yield group


def merged(texts: Iterable[Texts]) -> list[Texts]:
    """Merge groups of one prompt and the same positives into one with all their negatives; in order of the first."""
    groups: dict[tuple, Texts] = {}
    for text in texts:
        known = groups.setdefault((text.prompt_id, text.positives), text)
        if known is not text:
            groups[text.prompt_id, text.positives] = replace(known, negatives=known.negatives + text.negatives)
    return list(groups.values())


def probed(
    method: Method, human: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], prompts: Set[str]
) -> list[Texts]:
    """The few groups on which a training is monitored: one per prompt, with the side that the loss does not see too.

    That side holds human answers; where no prompt has a human positive, only negatives are monitored.

    Args:
        prompts: identities of the prompts that the method is trained on.
    """
    whole = method.model_copy(update={"negatives": True})
    if method.positives == "none" and (
        paired := prompts & {row["prompt_id"] for row in human if row["positive"] is not None}
    ):
        prompts, whole = paired, whole.model_copy(update={"positives": "human"})
    few = nsmallest(_PROBED, prompts, key=lambda prompt: identities.derived_seed("probe", prompt))
    rows, pool = ([row for row in table if row["prompt_id"] in few] for table in (human, samples))
    return list({text.prompt_id: text for text in view(whole, rows, pool)}.values())


def refreshed(texts: Texts, fresh: Sequence[Answer], online: Online) -> Texts:
    """The group with a share of its positives, the last ones, replaced by fresh answers, as far as there are any.

    An answer that the group already has does not count as fresh.
    """
    new = [answer for answer in fresh if answer not in texts.positives]
    count = min(rounds.count(online, len(texts.positives)), len(new))
    return replace(texts, positives=texts.positives[: len(texts.positives) - count] + tuple(new[:count]))


def best(
    samples: Iterable[Mapping[str, Any]], scores: Iterable[Mapping[str, Any]], count: int, better: str
) -> Iterator[Mapping[str, Any]]:
    """The `count` best-scored usable samples of each prompt of a pool, renumbered, the best first.

    Args:
        scores: rows of `schemas.SCORES`, one per sample.
        better: `higher` or `lower`.
    Raises:
        D2OError: where a usable sample has no score.
    """
    known = {(row["prompt_id"], row["sample"]): row["score"] for row in scores}
    sign = -1 if better == "higher" else 1
    ranked = defaultdict(list)
    for row in samples:
        if row["usable"]:
            name = row["prompt_id"], row["sample"]
            if name not in known:
                raise D2OError(
                    f"prompt {name[0]}: sample {name[1]} has no score: delete the scores and run again, or "
                    f"filter by a scorer that knows the prompt"
                )
            ranked[row["prompt_id"]].append((sign * known[name], row["sample"], row))
    for entries in ranked.values():
        entries.sort(key=lambda entry: entry[:2])
        yield from (row | {"sample": place} for place, (*_, row) in enumerate(entries[:count]))


def usable_answers(samples: Iterable[Mapping[str, Any]]) -> dict[str, list[Answer]]:
    """The usable samples of a pool, as answers, by prompt and in order."""
    answers: dict[str, list[Answer]] = defaultdict(list)
    for row in samples:
        if answer := _usable(row):
            answers[row["prompt_id"]].append(answer)
    return answers


def _positives(method: Method, row: Mapping[str, Any], pool: Mapping[int, Answer | None]) -> tuple[Answer, ...]:
    if method.positives == "self":
        if not pool:  # its prompt did not fit the context with an instruction
            return ()
        missing = set() if method.filter else set(range(method.k or 0)) - pool.keys()
        if missing:
            raise D2OError(
                f"prompt {row['prompt_id']}: sample {min(missing)} of {method.k} is missing from its pool of "
                f"self-generated answers; the pool was sampled for other negatives: delete it and run again"
            )
        # The first usable ones: a method with a smaller K sees the same prompts.
        return tuple(answer for _, answer in sorted(pool.items()) if answer)[: method.k]
    unsafe_is_fine = method.positives == "human"
    if method.positives == "none" or row["positive"] is None:
        return ()
    return (Answer(row["positive"]),) if unsafe_is_fine or row["positive_unsafe"] is False else ()


def _usable(sample: Mapping[str, Any]) -> Answer | None:
    """A sample of a pool as an answer; None where it is not usable."""
    return Answer(sample["text"], sample["finish"] == "stop") if sample["usable"] else None


def every_response(
    human: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]] | None, split: str
) -> Iterator[Texts]:
    """One group per prompt with all its distinct responses, whose log-probs are computed.

    The responses are the pool's where `samples` is given, else the human ones; all count as positives. Prompts are
    those of the `split`, `train` or `held-out`, which is all others.
    """
    messages, answers = {}, defaultdict(dict)
    for row in human:
        if (row["split"] == "train") == (split == "train"):
            messages[row["prompt_id"]] = row["messages"]
            if samples is None:
                for text in filter(None, (row["positive"], row["negative"])):
                    answers[row["prompt_id"]][Answer(text)] = None
    for row in samples or ():
        if row["prompt_id"] in messages and (answer := _usable(row)):
            answers[row["prompt_id"]][answer] = None
    for prompt, distinct in answers.items():
        yield Texts(prompt, messages[prompt], tuple(distinct))


class Tokeniser:
    """Makes groups of token ids (int32), and counts them.

    Attributes:
        counts: of `groups` and their `responses`; of `long_prompts`, groups left out since their prompt is longer
            than `max_prompt_tokens`; of `cut_responses`, which are longer than `max_response_tokens` and are cut to
            this length, so they have no end-of-turn token; of `broken_up`, texts with special tokens that are read
            as text (`chat.as_data`), each prompt and each distinct answer to it once.
    """

    def __init__(self, tokenizer, forward: Forward):
        """
        Args:
            tokenizer: of the model.
            forward: states the limits.
        """
        self._tokenizer, self._forward, self._end = tokenizer, forward, chat.end_of_turn(tokenizer)
        self.counts = {"groups": 0, "responses": 0, "long_prompts": 0, "cut_responses": 0, "broken_up": 0}

    def groups(self, texts: Iterable[Texts]) -> Iterator[tuple[int, Group]]:
        """The groups that fit, in order, each with the index of its text.

        Adjacent texts of one prompt share the response of an answer that several of them have; it is tokenised once.
        While groups are used, the tokenizer works on the next prompts.
        """
        families = (list(same) for _, same in groupby(enumerate(texts), lambda text: text[1].messages))
        batches = iter(lambda: list(islice(families, _TOGETHER)), [])
        with ThreadPoolExecutor(1) as beside:
            pending = None
            for batch in chain(batches, [None]):
                following = batch and beside.submit(self._encoded, batch)
                if pending:
                    for family in pending.result():
                        yield from self._fitting(*family)
                pending = following

    def _encoded(self, together: Sequence[Sequence[tuple[int, Texts]]]) -> list[tuple]:
        """For each prompt its texts, its token ids, and the token ids of each distinct answer."""
        answers = [list(dict.fromkeys(one for _, text in family for one in text.answers)) for family in together]
        dialogues = [
            (family[0][1].messages, [(answer.text, answer.finished) for answer in distinct])
            for family, distinct in zip(together, answers, strict=True)
        ]
        encoded = chat.encode(self._tokenizer, dialogues, self._end)
        return [
            (family, prompt, dict(zip(distinct, ids, strict=True)))
            for family, distinct, (prompt, ids) in zip(together, answers, encoded, strict=True)
        ]

    def _fitting(
        self, family: Sequence[tuple[int, Texts]], prompt: Sequence[int], ids: Mapping[Answer, Sequence[int]]
    ) -> Iterator[tuple[int, Group]]:
        """The groups of one prompt; none where it is too long."""
        if len(prompt) > self._forward.max_prompt_tokens:
            self.counts["long_prompts"] += len(family)
            return
        limit = self._forward.max_response_tokens
        prompt_id, trunk = family[0][1].prompt_id, np.array(prompt, np.int32)
        branches = {
            answer: Response(
                identities.response_id(prompt_id, answer.text, answer.finished), np.array(whole[:limit], np.int32)
            )
            for answer, whole in ids.items()
        }
        cut = {answer for answer, whole in ids.items() if len(whole) > limit}
        contents = [*(message["content"] for message in family[0][1].messages), *(answer.text for answer in ids)]
        self.counts["broken_up"] += sum(chat.broken_up(self._tokenizer, text) for text in contents)
        for place, text in family:
            self.counts["groups"] += 1
            self.counts["responses"] += len(text.answers)
            self.counts["cut_responses"] += sum(answer in cut for answer in text.answers) if cut else 0
            sides = ([branches[answer] for answer in side] for side in (text.positives, text.negatives))
            yield place, Group(prompt_id, trunk, *sides)


def reference_logprobs(table: Iterable[Mapping[str, Any]]) -> ReferenceLogprobs:
    """The log-probs in rows of `schemas.LOGPROBS`; if a response has several rows, the first counts."""
    known: ReferenceLogprobs = {}
    for row in table:
        known.setdefault(row["response_id"], (row["logprob"], row["tokens"]))
    return known


def attach_reference_logprobs(group: Group, known: ReferenceLogprobs) -> None:
    """Fill in the log-prob of a group's responses under the reference.

    Args:
        known: made by `reference_logprobs`.
    Raises:
        D2OError: where a response is missing, its log-prob is not a number, or it has another number of tokens
            there: the table then belongs to another tokenizer, template or limit.
    """
    for response in group.responses:
        logprob, tokens = known.get(response.response_id, (math.nan, None))
        if tokens is None:
            problem = "is missing"
        elif tokens != len(response.ids):
            problem = f"has {tokens} tokens and not {len(response.ids)}"
        elif not math.isfinite(logprob):
            problem = f"has the log-prob {logprob}"
        else:
            response.reference_logprob = logprob
            continue
        raise D2OError(
            f"reference log-probs: response {response.response_id} of prompt {group.prompt_id} {problem}; "
            f"the table was made from other responses, another tokenizer or template: delete it and run again"
        )


def packs(groups: Sequence[Group], tokens: int) -> list[list[Group]]:
    """Pack groups, in order, into rows of at most `tokens` tokens; a group is never split.

    A group that is larger than the budget gets a row of its own.
    """
    rows: list[list[Group]] = []
    room = 0
    for group in groups:
        if not rows or group.tokens > room:
            rows.append([])
            room = tokens
        rows[-1].append(group)
        room -= group.tokens
    return rows
