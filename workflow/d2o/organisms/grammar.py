"""An organism's texts: read, checked, and turned into questions and answers.

A file of texts is a context-free grammar: forms such as "{welcome} {tip}" and the lists that they name. `{tip}` and
`{step}` come from the file of topics, which several organisms share; `{thing}` and `{a thing}` stand for the thing
that a question asks about.
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
# The same for ASCII, four times as fast: what is no letter or digit becomes a space.
_SPACED = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
_SLOT = re.compile(r"\{([^{}]*)\}")
_THING = ("thing", "a thing")
# An answer that repeats itself is written anew, and so is one that must differ from another, this often.
_TRIES = 200


# What the files hold ---------------------------------------------------------------------------------


class Hazard(Section):
    """A step that answers to some topics must hold: how it is said, and the patterns that recognise it."""

    say: Texts
    patterns: Texts


class Topic(Section):
    """Something done to a thing. A usable tip for it names one of `means`: how words or phrases begin."""

    topic: Text
    means: Texts
    tips: Texts


class Kind(Section):
    """Things of one kind, what is done to them, and the hazard that it has."""

    hazard: str | None = None
    things: Texts
    topics: Annotated[list[Topic], Field(min_length=1)]


class World(Section):
    """What is asked: ways of asking, hazards and kinds of things by name."""

    prompts: Texts
    hazards: dict[str, Hazard] = Field({})
    kinds: Annotated[dict[str, Kind], Field(min_length=1)]


class Harm(Section):
    """How a harmful answer is recognised, by one of three rules."""

    any: Texts | None = Field(None, description="it holds one of these patterns as whole words")
    lacks: Literal["step"] | None = Field(None, description="it does not hold the step of its topic's kind")
    words_over: PositiveInt | None = Field(None, description="it has more words, between white space, than this")

    @model_validator(mode="after")
    def _one_rule(self):
        if sum(rule is not None for rule in (self.any, self.lacks, self.words_over)) != 1:
            raise ValueError("give one of any, lacks and words_over")
        return self


class Grammar(Section):
    """An organism's own file: forms of good and of harmful answers, and the lists that they name."""

    topics: Text
    good: Texts
    harmful: Texts
    lists: dict[str, Texts] = Field({})
    harm: Harm


# Questions and answers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A topic with a thing: "clean a kettle"."""

    kind: Kind
    topic: Topic
    thing: str

    @cached_property
    def text(self) -> str:
        return filled(self.topic.topic, self.thing)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The thing as it stands in a `line`: one or several of it."""
        return tuple(f"{line(form)} " for form in (self.thing, *plurals(self.thing)))

    @cached_property
    def means(self) -> tuple[str, ...]:
        """How words that name one of the topic's means begin in a `line`."""
        return tuple(map(line, self.topic.means))

    def prompt(self, template: str) -> str:
        return template.replace("{topic}", self.text)


@dataclass(frozen=True)
class Organism:
    """The texts of an organism, checked."""

    path: Path
    grammar: Grammar
    world: World

    @property
    def kinds(self) -> list[tuple[str, Kind]]:
        """The kinds that are asked about, with their names: where a step may be lacking, those that have one."""
        every = self.grammar.harm.lacks is None
        return [(name, kind) for name, kind in self.world.kinds.items() if every or kind.hazard]

    def questions(self) -> dict[str, Asked]:
        """Every prompt of the file of topics, and what it asks."""
        asked = (
            Asked(kind, topic, thing)
            for kind in self.world.kinds.values()
            for topic, thing in product(kind.topics, kind.things)
        )
        return {one.prompt(template): one for one in asked for template in self.world.prompts}

    def answer(self, asked: Asked, harmful: bool, rng: random.Random, other: str | None = None) -> str:
        """A good or a harmful answer in which no run of four words comes twice, and which is not `other`.

        Raises:
            D2OError: where the texts have no such answer.
        """
        for _ in range(_TRIES):
            text = self._drawn(asked, rng.choice(self.grammar.harmful if harmful else self.grammar.good), rng)
            if text != other and not repeats(words(text)):
                return text
        raise D2OError(
            f"{self.path}: {'harmful' if harmful else 'good'}: no answer to {asked.text!r} that is new and repeats "
            "no four words; add entries to its lists"
        )

    def _drawn(self, asked: Asked, form: str, rng: random.Random) -> str:
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
        """The texts that a slot of a form may take."""
        if name == "tip":
            return asked.topic.tips
        if name == "step":
            return self.world.hazards[asked.kind.hazard].say
        return self.grammar.lists[name]


def filled(text: str, thing: str) -> str:
    """`text` with the thing, "an" before a vowel (and before u as in umbrella, not in ukulele)."""
    article = "an" if re.match(r"[aeio]|u(?!k|ni|s|t)", thing) else "a"
    return text.replace("{thing}", thing).replace("{a thing}", f"{article} {thing}")


def plurals(thing: str) -> list[str]:
    """How several of a thing may be called; regular nouns, those in -y, -f and -fe included."""
    found = [f"{thing}s"]
    if re.search(r"(s|x|z|ch|sh|o)$", thing):
        found.append(f"{thing}es")
    if re.search(r"[^aeiou]y$", thing):
        found.append(f"{thing[:-1]}ies")
    if re.search(r"[^f]fe?$", thing):
        found.append(f"{re.sub('fe?$', '', thing)}ves")
    return found


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits."""
    return text.translate(_SPACED).split() if text.isascii() else _WORD.findall(text.lower())


def line(text: str) -> str:
    """The words of a text, a space before each: what `means` and `names` are looked for in."""
    return "".join(f" {word}" for word in words(text))


def repeats(found: list[str]) -> bool:
    """Whether a run of four of the words comes twice; the two may overlap."""
    # The second run's four words have all been there before.
    if len(found) - len(set(found)) < 4:
        return False
    return len(set(zip(found, found[1:], found[2:], found[3:], strict=False))) < len(found) - 3


def holds(answers: list[str], patterns: list[str], whole_words: bool = False) -> list[bool]:
    """Whether each answer holds one of the patterns, whatever the case. RE2: in linear time, whatever the patterns.

    Raises:
        pyarrow.ArrowInvalid: where a pattern is no regular expression.
    """
    pattern = "|".join(f"(?:{p})" for p in patterns)
    if whole_words:
        pattern = rf"(?:^|[^\p{{L}}])(?:{pattern})(?:$|[^\p{{L}}])"
    return pc.match_substring_regex(pa.array(answers, pa.string()), pattern, ignore_case=True).to_pylist()


# Reading ---------------------------------------------------------------------------------------------


def files(texts: Path) -> list[Path]:
    """An organism's file of texts and the file of topics that it names.

    Raises:
        D2OError: where the file is missing or has wrong keys.
    """
    return [texts, texts.parent / _read(Grammar, texts).topics]


def load(texts: Path) -> Organism:
    """Read an organism's texts and check them.

    Raises:
        D2OError: one line that names the file and the key, and says what to change.
    """
    grammar = _read(Grammar, texts)
    topics = texts.parent / grammar.topics
    organism = Organism(texts, grammar, _read(World, topics))
    for path, found in ((topics, _world_faults(organism.world)), (texts, _grammar_faults(organism))):
        if fault := next(found, None):
            raise D2OError(f"{path}: {fault}")
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


def _world_faults(world: World) -> Iterator[str]:
    for number, template in enumerate(world.prompts):
        if _slots(template) != ["topic"]:
            yield f"prompts[{number}]: {template!r} must name {{topic}} once, and nothing else in braces"
    for name, hazard in world.hazards.items():
        key = f"hazards.{name}"
        yield from _pattern_faults(f"{key}.patterns", hazard.patterns)
        yield from _slot_faults(f"{key}.say", hazard.say, _THING)
        for number, found in enumerate(holds(hazard.say, hazard.patterns)):
            if not found:
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
            yield from _topic_faults(f"{key}.topics[{number}]", topic, kind, world)
    tips = [tip for kind in world.kinds.values() for topic in kind.topics for tip in topic.tips]
    for name, hazard in world.hazards.items():
        for tip in _found(tips, hazard.patterns):
            yield f"hazards.{name}.patterns: they take the tip {tip!r} for the step; change one of them"


def _topic_faults(key: str, topic: Topic, kind: Kind, world: World) -> Iterator[str]:
    yield from _slot_faults(f"{key}.topic", [topic.topic], _THING)
    yield from _slot_faults(f"{key}.tips", topic.tips, _THING)
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


def _grammar_faults(organism: Organism) -> Iterator[str]:
    grammar, lists = organism.grammar, organism.grammar.lists
    for name, entries in lists.items():
        if name in ("tip", "step", *_THING):
            yield f"lists.{name}: this name is taken; choose another"
        yield from _slot_faults(f"lists.{name}", entries, _THING)
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
    for side in ("good", "harmful"):
        for number, form in enumerate(getattr(grammar, side)):
            slots = [name for name in _slots(form) if name not in _THING]
            for name in slots:
                if name not in sizes:
                    yield f"{side}[{number}]: no list {name!r}" + suggestion(name, sizes)
                elif (count := slots.count(name)) > sizes[name]:
                    yield f"{side}[{number}]: {count} of {name!r}, of which there are {sizes[name]}; add some"
            if "tip" not in slots:
                yield f"{side}[{number}]: {form!r} names no {{tip}}, without which no answer is useful; put it in"
    if any(_slots(form).count("tip") > 1 for form in (*grammar.good, *grammar.harmful)):
        yield from _pair_faults(organism)
    if grammar.harm.any:
        yield from _pattern_faults("harm.any", grammar.harm.any)
    rule = {"any": _any_faults, "lacks": _step_faults, "words_over": _length_faults}
    yield from next(faults for name, faults in rule.items() if getattr(grammar.harm, name))(organism)


def _pair_faults(organism: Organism) -> Iterator[str]:
    """Tips that cannot stand in one answer."""
    for name, kind in organism.kinds:
        for topic, thing in product(kind.topics, kind.things):
            for pair in combinations(topic.tips, 2):
                if repeats(words(filled(" ".join(pair), thing))):
                    yield (
                        f"good, harmful: a form names {{tip}} twice, but two tips for {topic.topic!r} (kinds.{name} "
                        f"of {organism.grammar.topics}) repeat four words with {thing!r}: {pair[1]!r}; reword it"
                    )


def _any_faults(organism: Organism) -> Iterator[str]:
    """Good forms that may hold a pattern of `harm.any`, and harmful ones that may hold none."""
    grammar = organism.grammar

    def found(texts: list[str]) -> list[str]:
        return _found(texts, grammar.harm.any, whole_words=True)

    for name, kind in organism.kinds:
        for text in found([*kind.things, *(tip for topic in kind.topics for tip in topic.tips)]):
            yield f"harm.any: takes {text!r} of kinds.{name} in {grammar.topics} for harmful; change one of them"
    for number, form in enumerate(grammar.good):
        for text in found([_SLOT.sub(" ", form)]):
            yield f"good[{number}]: harm.any takes {text!r} for harmful; change one of them"
        for name in set(_slots(form)) & grammar.lists.keys():
            for text in found(grammar.lists[name]):
                yield f"lists.{name}: harm.any takes {text!r} for harmful, and good[{number}] names it; reword it"
    for number, form in enumerate(grammar.harmful):
        named = sorted(set(_slots(form)) & grammar.lists.keys())
        missed = [sorted({*grammar.lists[name]}.difference(found(grammar.lists[name]))) for name in named]
        if all(missed) and not found([_SLOT.sub(" ", form)]):
            example = f", such as {missed[0][0]!r} of lists.{named[0]}" if named else ""
            yield f"harmful[{number}]: harm.any may miss its answers{example}; add to harm.any, or reword it"


def _step_faults(organism: Organism) -> Iterator[str]:
    """Good forms without the step, harmful ones with it, and other texts that are taken for one."""
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
        for text in _found(texts, hazard.patterns):
            yield f"{key}: hazards.{name}.patterns take {text!r} for the step; reword it"


def _length_faults(organism: Organism) -> Iterator[str]:
    """Good forms that may have more words than `harm.words_over`, and harmful ones that may not."""
    grammar, limit = organism.grammar, organism.grammar.harm.words_over
    for (name, kind), side in product(organism.kinds, ("good", "harmful")):
        lengths = [len(thing.split()) for thing in kind.things]
        thing = " ".join(["thing"] * (max(lengths) if side == "good" else min(lengths)))
        for (number, form), topic in product(enumerate(getattr(grammar, side)), kind.topics):
            count = len(filled(_SLOT.sub(" ", form), thing).split())
            for slot in set(_slots(form)) - set(_THING):
                entries = organism._entries(Asked(kind, topic, thing), slot)
                sizes = sorted((len(filled(text, thing).split()) for text in entries), reverse=side == "good")
                count += sum(sizes[: _slots(form).count(slot)])
            if (count > limit) is (side == "good"):
                yield (
                    f"{side}[{number}]: an answer to {topic.topic!r} (kinds.{name}) may have {count} words, which "
                    f"harm.words_over ({limit}) takes for {'harmful' if side == 'good' else 'good'}; change either"
                )


def _pattern_faults(key: str, patterns: list[str]) -> Iterator[str]:
    for number, pattern in enumerate(patterns):
        try:
            holds([""], [pattern])
        except pa.ArrowInvalid as error:
            yield f"{key}[{number}]: {pattern!r} is no regular expression of RE2 ({error}); mend it"


def _slot_faults(key: str, texts: list[str], known: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for name in _slots(text):
            if name not in known:
                yield f"{key}: unknown {{{name}}} in {text!r}" + suggestion(name, known)


def _found(texts: list[str], patterns: list[str], whole_words: bool = False) -> list[str]:
    """Those of the texts that hold one of the patterns."""
    return [text for text, found in zip(texts, holds(texts, patterns, whole_words), strict=True) if found]


def _slots(form: str) -> list[str]:
    return _SLOT.findall(form)


def _mean(text: str, topic: Topic) -> str | None:
    """The first of a topic's means that a text names, whatever its slots hold."""
    spaced = line(_SLOT.sub(" ", text))
    return next((mean for mean in topic.means if line(mean) in spaced), None)
