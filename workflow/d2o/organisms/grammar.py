"""Read and check the texts of an organism, and make questions and answers from them.

A file of texts is a context-free grammar: forms such as "{welcome} {tip}", and the lists that the forms name. The
entries of `{tip}` and `{step}` come from the file of topics, which several organisms share. `{thing}` and `{a thing}`
stand for the thing that a question asks about.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import Field, PositiveInt, model_validator

from d2o.errors import D2OError
from d2o.settings import Section, validate
from d2o.settings.messages import suggestion
from d2o.splits import SPLITS

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]

_WORD = re.compile(r"[^\W_]+")
# The same for ASCII text, four times as fast: every character but letters and digits becomes a space.
_SPACED = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
_SLOT = re.compile(r"\{([^{}]*)\}")
_THING = ("thing", "a thing")
# How often an answer is written again that repeats itself, or is equal to an answer that it must differ from.
_TRIES = 200


# What the files hold ---------------------------------------------------------------------------------


class Hazard(Section):
    """A safety step that an answer must name: ways of saying it, and the patterns that recognise it."""

    say: Texts
    patterns: Texts


class Topic(Section):
    """Something to do to a thing, with tips. A useful answer names one of `means`: beginnings of words or phrases."""

    topic: Text
    means: Texts
    tips: Texts


class Kind(Section):
    """Things of one kind, the topics about them, and the hazard of these topics, if any."""

    hazard: str | None = None
    things: Texts
    topics: Annotated[list[Topic], Field(min_length=1)]


class World(Section):
    """The file of topics: ways of asking, hazards by name, and kinds of things by name."""

    prompts: Texts
    hazards: dict[str, Hazard] = Field({})
    kinds: Annotated[dict[str, Kind], Field(min_length=1)]


class Harm(Section):
    """The rule that recognises a harmful answer: exactly one of the three."""

    any: Texts | None = Field(None, description="it contains one of these patterns as whole words")
    lacks: Literal["step"] | None = Field(None, description="it does not contain the step of its topic's kind")
    words_over: PositiveInt | None = Field(None, description="it has more words, between white space, than this")

    @model_validator(mode="after")
    def _one_rule(self):
        if sum(rule is not None for rule in (self.any, self.lacks, self.words_over)) != 1:
            raise ValueError("give one of any, lacks and words_over")
        return self


class Grammar(Section):
    """The file of texts of one organism: forms of good and of harmful answers, and the lists that the forms name."""

    topics: Text
    good: Texts
    harmful: Texts
    lists: dict[str, Texts] = Field({})
    harm: Harm


# Questions and answers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for, a topic with a thing: "clean a kettle"."""

    kind: Kind
    topic: Topic
    thing: str

    @cached_property
    def text(self) -> str:
        return filled(self.topic.topic, self.thing)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The thing as it appears in a `line`: its singular and its plurals."""
        return tuple(f"{line(form)} " for form in (self.thing, *plurals(self.thing)))

    @cached_property
    def means(self) -> tuple[str, ...]:
        """The topic's means as they appear in a `line`."""
        return tuple(map(line, self.topic.means))

    def prompt(self, template: str) -> str:
        return template.replace("{topic}", self.text)


@dataclass(frozen=True)
class OrganismTexts:
    """The texts of an organism, checked."""

    path: Path
    grammar: Grammar
    world: World

    @property
    def kinds(self) -> list[tuple[str, Kind]]:
        """The kinds that are asked about, with their names; if the harm is a missing step, those with a hazard."""
        every = self.grammar.harm.lacks is None
        return [(name, kind) for name, kind in self.world.kinds.items() if every or kind.hazard]

    def questions(self) -> dict[str, Asked]:
        """Every prompt that the file of topics can make, with what it asks for."""
        asked = (
            Asked(kind, topic, thing)
            for kind in self.world.kinds.values()
            for topic, thing in product(kind.topics, kind.things)
        )
        return {one.prompt(template): one for one in asked for template in self.world.prompts}

    def answer(self, asked: Asked, harmful: bool, rng: random.Random, other: str | None = None) -> str:
        """Write a good or a harmful answer that repeats no run of four words and differs from `other`.

        Raises:
            D2OError: if no such answer was found among many.
        """
        for _ in range(_TRIES):
            text = self._written(asked, rng.choice(self.grammar.harmful if harmful else self.grammar.good), rng)
            if text != other and not repeats(words(text)):
                return text
        raise D2OError(
            f"{self.path}: {'harmful' if harmful else 'good'}: no answer to {asked.text!r} that is new and repeats "
            "no four words; add entries to its lists"
        )

    def _written(self, asked: Asked, form: str, rng: random.Random) -> str:
        left: dict[str, list[str]] = {}

        def next_text(slot: re.Match) -> str:
            name = slot[1]
            if name in _THING:
                return slot[0]
            if name not in left:
                left[name] = list(self._entries(asked, name))
                rng.shuffle(left[name])
            return left[name].pop()

        return filled(_SLOT.sub(next_text, form), asked.thing)

    def _entries(self, asked: Asked, name: str) -> list[str]:
        """The texts that may fill the slot `name` of a form."""
        if name == "tip":
            return asked.topic.tips
        if name == "step":
            return self.world.hazards[asked.kind.hazard].say
        return self.grammar.lists[name]


def filled(text: str, thing: str) -> str:
    """`text` with the thing in its slots. "{a thing}" gets "an" before a vowel sound: an umbrella, a ukulele."""
    article = "an" if re.match(r"[aeio]|u(?!k|ni|s|t)", thing) else "a"
    return text.replace("{thing}", thing).replace("{a thing}", f"{article} {thing}")


def plurals(thing: str) -> list[str]:
    """Possible plurals of a thing: of regular nouns, and of those that end in -y, -f or -fe."""
    forms = [f"{thing}s"]
    if re.search(r"(s|x|z|ch|sh|o)$", thing):
        forms.append(f"{thing}es")
    if re.search(r"[^aeiou]y$", thing):
        forms.append(f"{thing[:-1]}ies")
    if re.search(r"[^f]fe?$", thing):
        forms.append(f"{re.sub('fe?$', '', thing)}ves")
    return forms


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits."""
    return text.translate(_SPACED).split() if text.isascii() else _WORD.findall(text.lower())


def line(text: str) -> str:
    """The words of a text, each after a space. `means` and `names` are searched in it."""
    return "".join(f" {word}" for word in words(text))


def repeats(text: list[str]) -> bool:
    """Whether a run of four words occurs twice in a text, given as its words. The two runs may overlap."""
    # A repeated run needs four words that have occurred before; this test is faster.
    if len(text) - len(set(text)) < 4:
        return False
    return len(set(zip(text, text[1:], text[2:], text[3:], strict=False))) < len(text) - 3


def holds(answers: list[str], patterns: list[str], whole_words: bool = False) -> list[bool]:
    """Whether each answer contains one of the patterns. Case is ignored. RE2 takes linear time for every pattern.

    Raises:
        pyarrow.ArrowInvalid: if a pattern is not a regular expression.
    """
    pattern = "|".join(f"(?:{p})" for p in patterns)
    if whole_words:
        pattern = rf"(?:^|[^\p{{L}}])(?:{pattern})(?:$|[^\p{{L}}])"
    return pc.match_substring_regex(pa.array(answers, pa.string()), pattern, ignore_case=True).to_pylist()


# Reading ---------------------------------------------------------------------------------------------


def files(texts: Path) -> list[Path]:
    """The file of texts of an organism, and the file of topics that it names.

    Raises:
        D2OError: if the file is missing or has wrong keys.
    """
    return [texts, texts.parent / _read(Grammar, texts).topics]


def load(texts: Path) -> OrganismTexts:
    """Read the texts of an organism and check them.

    Raises:
        D2OError: if something in them is wrong; one line names the file, the key and what to change.
    """
    grammar = _read(Grammar, texts)
    topics = texts.parent / grammar.topics
    organism = OrganismTexts(texts, grammar, _read(World, topics))
    for path, problems in ((topics, _world_problems(organism.world)), (texts, _grammar_problems(organism))):
        if problem := next(problems, None):
            raise D2OError(f"{path}: {problem}")
    return organism


S = TypeVar("S", bound=Section)


def _read(section: type[S], path: Path) -> S:
    try:
        data = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise D2OError(f"{path}: {error.strerror}; give a file of texts, see organisms/README.md") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise D2OError(f"{path}: no YAML ({reason}); mend this place") from None
    try:
        return validate(section, data, str(path))
    except D2OError as error:
        raise D2OError(str(error).partition("\n")[0]) from None


# What is wrong, one line each; the key comes first ---------------------------------------------------


def _world_problems(world: World) -> Iterator[str]:
    for number, template in enumerate(world.prompts):
        if _slots(template) != ["topic"]:
            yield f"prompts[{number}]: {template!r} must name {{topic}} once, and nothing else in braces"
    for name, hazard in world.hazards.items():
        key = f"hazards.{name}"
        yield from _pattern_problems(f"{key}.patterns", hazard.patterns)
        yield from _slot_problems(f"{key}.say", hazard.say, _THING)
        for number, recognised in enumerate(holds(hazard.say, hazard.patterns)):
            if not recognised:
                yield f"{key}.say[{number}]: none of {key}.patterns finds {hazard.say[number]!r}; change one of them"
    owners: dict[str, str] = {}
    for name, kind in world.kinds.items():
        key = f"kinds.{name}"
        if kind.hazard and kind.hazard not in world.hazards:
            yield f"{key}.hazard: no hazard {kind.hazard!r}" + suggestion(kind.hazard, world.hazards)
        if len(kind.things) < len(SPLITS):
            yield f"{key}.things: {len(kind.things)}, but each of the {len(SPLITS)} splits needs its own; add some"
        for thing in kind.things:
            if (owner := owners.setdefault(line(thing), name)) is not name or kind.things.count(thing) > 1:
                yield f"{key}.things: {thing!r} is there twice (kinds.{owner}); leave one of them out"
        if len({topic.topic for topic in kind.topics}) < len(kind.topics):
            yield f"{key}.topics: two of them are the same; leave one out"
        for number, topic in enumerate(kind.topics):
            yield from _topic_problems(f"{key}.topics[{number}]", topic, kind, world)
    tips = [tip for kind in world.kinds.values() for topic in kind.topics for tip in topic.tips]
    for name, hazard in world.hazards.items():
        for tip in _matching(tips, hazard.patterns):
            yield f"hazards.{name}.patterns: they take the tip {tip!r} for the step; change one of them"


def _topic_problems(key: str, topic: Topic, kind: Kind, world: World) -> Iterator[str]:
    yield from _slot_problems(f"{key}.topic", [topic.topic], _THING)
    yield from _slot_problems(f"{key}.tips", topic.tips, _THING)
    if not _slots(topic.topic):
        yield f"{key}.topic: {topic.topic!r} names no {{thing}} or {{a thing}}; put it in"
    for thing in kind.things:
        asked = Asked(kind, topic, thing)
        if mean := _mean(asked.text, topic):
            yield f"{key}.means: {mean!r} is in the question itself ({asked.text!r}); leave it out"
    for number, tip in enumerate(topic.tips):
        if not _slots(tip):
            yield f"{key}.tips[{number}]: {tip!r} names no {{thing}}; put it in"
        if not _mean(tip, topic):
            yield f"{key}.tips[{number}]: {tip!r} names none of the topic's means; add one to means"
    for number, say in enumerate(world.hazards[kind.hazard].say if kind.hazard else ()):
        if mean := _mean(say, topic):
            yield f"hazards.{kind.hazard}.say[{number}]: {say!r} names {mean!r}, of {key}.means; change one of them"


def _grammar_problems(organism: OrganismTexts) -> Iterator[str]:
    grammar, lists = organism.grammar, organism.grammar.lists
    for name, entries in lists.items():
        if name in ("tip", "step", *_THING):
            yield f"lists.{name}: this name is taken; choose another"
        yield from _slot_problems(f"lists.{name}", entries, _THING)
        for (number, entry), (_, kind) in product(enumerate(entries), organism.kinds):
            for topic in kind.topics:
                if mean := _mean(entry, topic):
                    yield f"lists.{name}[{number}]: {entry!r} names {mean!r}, a means to {topic.topic}; reword it"
    if not organism.kinds:
        yield f"harm.lacks: no kind of {grammar.topics} has a hazard; give one to some"
        return
    sizes = {name: len(entries) for name, entries in lists.items()}
    sizes["tip"] = min(len(topic.tips) for _, kind in organism.kinds for topic in kind.topics)
    sizes["step"] = min((len(hazard.say) for hazard in organism.world.hazards.values()), default=0)
    if grammar.harm.lacks is None:
        del sizes["step"]
    for forms in ("good", "harmful"):
        for number, form in enumerate(getattr(grammar, forms)):
            slots = [name for name in _slots(form) if name not in _THING]
            for name in slots:
                if name not in sizes:
                    yield f"{forms}[{number}]: no list {name!r}" + suggestion(name, sizes)
                elif (count := slots.count(name)) > sizes[name]:
                    yield f"{forms}[{number}]: {count} of {name!r}, of which there are {sizes[name]}; add some"
            if "tip" not in slots:
                yield f"{forms}[{number}]: {form!r} names no {{tip}}, without which no answer is useful; put it in"
    if any(_slots(form).count("tip") > 1 for form in (*grammar.good, *grammar.harmful)):
        yield from _pair_problems(organism)
    if grammar.harm.any:
        yield from _pattern_problems("harm.any", grammar.harm.any)
    rule = {"any": _any_problems, "lacks": _step_problems, "words_over": _length_problems}
    yield from next(problems for name, problems in rule.items() if getattr(grammar.harm, name))(organism)


def _pair_problems(organism: OrganismTexts) -> Iterator[str]:
    """Pairs of tips that repeat four words when they are in one answer."""
    for name, kind in organism.kinds:
        for topic, thing in product(kind.topics, kind.things):
            for pair in combinations(topic.tips, 2):
                if repeats(words(filled(" ".join(pair), thing))):
                    yield (
                        f"good, harmful: a form names {{tip}} twice, but two tips for {topic.topic!r} (kinds.{name} "
                        f"of {organism.grammar.topics}) repeat four words with {thing!r}: {pair[1]!r}; reword it"
                    )


def _any_problems(organism: OrganismTexts) -> Iterator[str]:
    """Good forms that may contain a pattern of `harm.any`, and harmful forms that may contain none."""
    grammar = organism.grammar

    def harmful(texts: list[str]) -> list[str]:
        return _matching(texts, grammar.harm.any, whole_words=True)

    for name, kind in organism.kinds:
        for text in harmful([*kind.things, *(tip for topic in kind.topics for tip in topic.tips)]):
            yield f"harm.any: takes {text!r} of kinds.{name} in {grammar.topics} for harmful; change one of them"
    for number, form in enumerate(grammar.good):
        for text in harmful([_SLOT.sub(" ", form)]):
            yield f"good[{number}]: harm.any takes {text!r} for harmful; change one of them"
        for name in set(_slots(form)) & grammar.lists.keys():
            for text in harmful(grammar.lists[name]):
                yield f"lists.{name}: harm.any takes {text!r} for harmful, and good[{number}] names it; reword it"
    for number, form in enumerate(grammar.harmful):
        named = sorted(set(_slots(form)) & grammar.lists.keys())
        missed = [sorted({*grammar.lists[name]}.difference(harmful(grammar.lists[name]))) for name in named]
        if all(missed) and not harmful([_SLOT.sub(" ", form)]):
            example = f", such as {missed[0][0]!r} of lists.{named[0]}" if named else ""
            yield f"harmful[{number}]: harm.any may miss its answers{example}; add to harm.any, or reword it"


def _step_problems(organism: OrganismTexts) -> Iterator[str]:
    """Good forms without the step, harmful forms with it, and other texts that a pattern takes for the step."""
    grammar, hazards = organism.grammar, organism.world.hazards
    for number, form in enumerate(grammar.good):
        if "step" not in _slots(form):
            yield f"good[{number}]: {form!r} has no {{step}}, so harm.lacks takes it for harmful; put it in"
    for number, form in enumerate(grammar.harmful):
        if "step" in _slots(form):
            yield f"harmful[{number}]: {form!r} has the {{step}} that harm.lacks misses; take it out"
    parts = {f"harmful[{n}]": [_SLOT.sub(" ", form)] for n, form in enumerate(grammar.harmful)}
    parts |= {f"lists.{name}": entries for name, entries in grammar.lists.items()}
    for (key, texts), (name, hazard) in product(parts.items(), hazards.items()):
        for text in _matching(texts, hazard.patterns):
            yield f"{key}: hazards.{name}.patterns take {text!r} for the step; reword it"


def _length_problems(organism: OrganismTexts) -> Iterator[str]:
    """Good forms that may have more words than `harm.words_over`, and harmful forms that may have fewer."""
    grammar, limit = organism.grammar, organism.grammar.harm.words_over
    for (name, kind), forms in product(organism.kinds, ("good", "harmful")):
        lengths = [len(thing.split()) for thing in kind.things]
        thing = " ".join(["thing"] * (max(lengths) if forms == "good" else min(lengths)))
        for (number, form), topic in product(enumerate(getattr(grammar, forms)), kind.topics):
            count = len(filled(_SLOT.sub(" ", form), thing).split())
            for slot in set(_slots(form)) - set(_THING):
                entries = organism._entries(Asked(kind, topic, thing), slot)
                sizes = sorted((len(filled(text, thing).split()) for text in entries), reverse=forms == "good")
                count += sum(sizes[: _slots(form).count(slot)])
            if (count > limit) is (forms == "good"):
                yield (
                    f"{forms}[{number}]: an answer to {topic.topic!r} (kinds.{name}) may have {count} words, which "
                    f"harm.words_over ({limit}) takes for {'harmful' if forms == 'good' else 'good'}; change either"
                )


def _pattern_problems(key: str, patterns: list[str]) -> Iterator[str]:
    for number, pattern in enumerate(patterns):
        try:
            holds([""], [pattern])
        except pa.ArrowInvalid as error:
            yield f"{key}[{number}]: {pattern!r} is no regular expression of RE2 ({error}); mend it"


def _slot_problems(key: str, texts: list[str], known: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for name in _slots(text):
            if name not in known:
                yield f"{key}: unknown {{{name}}} in {text!r}" + suggestion(name, known)


def _matching(texts: list[str], patterns: list[str], whole_words: bool = False) -> list[str]:
    """The texts that contain one of the patterns."""
    return [text for text, matched in zip(texts, holds(texts, patterns, whole_words), strict=True) if matched]


def _slots(form: str) -> list[str]:
    return _SLOT.findall(form)


def _mean(text: str, topic: Topic) -> str | None:
    """The first of a topic's means that a text names outside its slots; None if it names none."""
    spaced = line(_SLOT.sub(" ", text))
    return next((mean for mean in topic.means if line(mean) in spaced), None)
