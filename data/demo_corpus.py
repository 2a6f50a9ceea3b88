"""Stories and chats drawn from the grammar, endless and reproducible from a seed."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

from demo_grammar import (
    ADJECTIVES,
    ANIMALS,
    ANY_LOOK,
    COUNTED,
    FRIENDS,
    HE,
    LIKINGS,
    LOOKS,
    MORE_PLACES,
    NOUNS,
    NUMBERS,
    OBJECTS,
    PLACES,
    PLOTS,
    RANK,
    RANKS,
    RULES,
    SHARES,
    SHE,
    SOUNDS,
    SPOTS,
    TRAITS,
)
from demo_smalltalk import ASKS, ASKS_FOR_ANY, FACTS, FOLLOW_UPS, REFUSAL, SMALL_TALK, SYSTEMS, UNKNOWN
from jinja2 import Environment

BEGIN, END = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + (message['content'] | trim) }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TEMPLATE = Environment().from_string(CHAT_TEMPLATE)
MENTIONED = [
    "h", "h", "hf", "hf", "hf", "ho", "ho", "ho", "oh", "o", "hfo", "hfo", "hfo", "hof", "hfg", "hfgo", "hfog",
    "hofg", "hp", "hfp", "hop", "hfop", "op",
]  # fmt: skip
_CHOICE = re.compile(r"\[([^\[\]]*)\]|<(\w+)>")
_SENTENCE_START = re.compile(r'((?:^|\n|[.!?] |\." )"?)([a-z])')


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    consonant = noun[0] not in "aeiou" or noun.startswith(("uni", "eu", "one"))
    return ("a " if consonant else "an ") + noun


def listed(things: list[str]) -> str:
    """Return the things with commas and an "and"."""
    return ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else things[0]


def _tidy(text: str) -> str:
    """Remove the spaces that empty choices leave behind."""
    return re.sub(" ?\n ?", "\n", re.sub(" +", " ", text)).strip()


@dataclass(frozen=True)
class Thing:
    """A common noun and its forms."""

    kind: str

    @property
    def a(self) -> str:
        """The noun, first mentioned."""
        return article(self.kind)

    @property
    def the(self) -> str:
        """The noun, known."""
        return "the " + self.kind

    A = property(lambda self: self.a.capitalize())
    The = property(lambda self: self.the.capitalize())


@dataclass(frozen=True)
class Character(Thing):
    """A named being; `{h}` in a template is the name."""

    name: str
    female: bool

    def __str__(self) -> str:
        return self.name

    @property
    def new(self) -> str:
        """The first mention, as a choice of the template language."""
        return f"[{self.a} called {self}|{self.a} named {self}|{self} the {self.kind}]"

    he = property(lambda self: "she" if self.female else "he")
    him = property(lambda self: "her" if self.female else "him")
    his = property(lambda self: "her" if self.female else "his")


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about; `g`, the second friend, may be missing."""

    plot: str
    h: Character
    f: Character
    g: Character | None
    o: Thing
    p: str

    @cached_property
    def held_out(self) -> bool:
        """Whether this hero, object and plot never meet in training (one triple in forty)."""
        return zlib.crc32(f"{self.h.kind}|{self.o.kind}|{self.plot}".encode()) % 40 == 0


class Author:
    """Write documents from a seed; `held_out` picks the side of the held-out triples."""

    def __init__(self, seed: int, held_out: bool = False):
        self.rng = Random(seed)
        self.held_out = held_out

    def plain(self) -> str:
        """Return a story as a document."""
        return BEGIN + self.story(self.cast()) + END

    def chat(self) -> str:
        """Return a conversation of one to three turns as a document."""
        rng, messages = self.rng, []
        if rng.random() < 0.2:
            messages.append(("system", rng.choice(SYSTEMS)))
        for turn in range(rng.choice([1, 1, 1, 2, 2, 3])):
            ask, answer = self._turn(turn)
            messages += [("user", ask), ("assistant", answer)]
        return render([{"role": role, "content": content} for role, content in messages])

    def documents(self) -> Iterator[str]:
        """Yield plain stories and chats for ever."""
        while True:
            yield self.plain() if self.rng.random() < 0.4 else self.chat()

    # ---- stories

    def cast(self, mentioned: str = "") -> Cast:
        """Choose a cast; whoever is `mentioned` in the request, by slots such as "ho", may be anybody."""
        while (cast := self._draw_cast(mentioned)).held_out != self.held_out:
            pass
        return cast

    def _draw_cast(self, mentioned: str) -> Cast:
        rng = self.rng
        kinds = [self._kind(slot in mentioned) for slot in "hfg"]
        if rng.random() < (0.35 if "h" in mentioned else 0.8):
            kinds[0] = "llama"
        if len(set(kinds)) < 3:
            return self._draw_cast(mentioned)
        female = rng.random() < 0.5
        sexes = (female, not female, rng.random() < 0.5)
        h, f, g = map(self._character, kinds, sexes)
        second = g if "g" in mentioned or rng.random() < 0.4 else None
        if len({h.name, f.name, g.name}) < 3:
            return self._draw_cast(mentioned)
        place = rng.choice([*PLACES, *MORE_PLACES] if "p" in mentioned else PLACES)
        return Cast(rng.choice(list(PLOTS)), h, f, second, Thing(self._object("o" in mentioned)), place)

    def _kind(self, any_kind: bool) -> str:
        return self.rng.choice(ANIMALS if any_kind else FRIENDS)

    def _character(self, kind: str, female: bool) -> Character:
        return Character(kind, self.rng.choice(SHE if female else HE), female)

    def _object(self, wide: bool) -> str:
        rng = self.rng
        if not wide or rng.random() < 0.25:
            return rng.choice(OBJECTS)
        noun = rng.choice(NOUNS)
        return f"{rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.6 else noun

    def story(self, cast: Cast) -> str:
        """Return the story of a cast, paragraphs separated by an empty line."""
        lines = PLOTS[cast.plot][1].strip().splitlines()
        unwanted = "-" if cast.g else "+"
        text = "\n".join(line.lstrip("+-") for line in lines if not line.startswith(unwanted))
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", self._expand(text))
        text = self._expand(text.format(**vars(cast), **self._details(cast)))
        return _SENTENCE_START.sub(lambda m: m[1] + m[2].upper(), _tidy(text))

    def _details(self, cast: Cast) -> dict[str, str]:
        """Return the slots that are drawn once for a story, so that they agree all through it."""
        rng = self.rng
        spots = rng.sample(SPOTS, 3)
        total, each = rng.choice(SHARES[3 if cast.g else 2])
        look = rng.choice(LOOKS.get(cast.h.kind, []) + ANY_LOOK)
        everyone = f"{cast.f} and {cast.g}" if cast.g else str(cast.f)
        drawn = {"trait": TRAITS, "liking": LIKINGS, "number": NUMBERS, "ranks": RANKS, "rank": RANK, "sound": SOUNDS}
        slots = {slot: rng.choice(words) for slot, words in drawn.items()} | {"counted": rng.choice(COUNTED)}
        slots |= dict(zip(("spot", "spot2", "spot3"), spots, strict=True))
        slots["there"] = re.sub(r" an? ", " the ", cast.p)
        return slots | {"total": total, "each": each, "look": look, "all": everyone}

    def _expand(self, text: str) -> str:
        """Replace every `[a|b]` and `<rule>` by one of its choices, the innermost first."""

        def choose(match: re.Match[str]) -> str:
            return self.rng.choice(RULES[match[2]] if match[2] else match[1].split("|"))

        while _CHOICE.search(text):
            text = _CHOICE.sub(choose, text)
        return text

    # ---- chats

    def _turn(self, turn: int) -> tuple[str, str]:
        """Return what the user says and what the model answers."""
        kind = self.rng.random()
        if kind < 0.72:
            return self._story_turn(again=turn > 0)
        if kind < 0.82:
            return self._talk(SMALL_TALK)
        return self._talk(FACTS) if kind < 0.93 else self._refusal()

    def _talk(self, pairs: list[tuple[str, str]]) -> tuple[str, str]:
        ask, answer = self.rng.choice(pairs)
        return self._loosely(self._expand(ask)), self._expand(answer)

    def _refusal(self) -> tuple[str, str]:
        thing = self._object(wide=True)
        ask = self._expand(self.rng.choice(UNKNOWN)).format(thing=thing, a=article(thing))
        return self._loosely(ask), self._expand(REFUSAL)

    def _story_turn(self, again: bool) -> tuple[str, str]:
        """Return a request for a story, by its plot or by its things, and the story under a title that names them."""
        rng = self.rng
        if rng.random() < 0.06:
            return self._loosely(self._expand(rng.choice(ASKS_FOR_ANY))), self.story(self.cast())
        mentioned = "" if rng.random() < 0.15 else rng.choice(MENTIONED)
        cast = self.cast(mentioned)
        things, title = self._things(cast, mentioned) if mentioned else (rng.choice(PLOTS[cast.plot][0]),) * 2
        ask = self._expand(rng.choice(FOLLOW_UPS if again and rng.random() < 0.6 else ASKS))
        return self._loosely(ask.format(things=things)), f"{title[0].upper()}{title[1:]}\n\n{self.story(cast)}"

    def _things(self, cast: Cast, mentioned: str) -> tuple[str, str]:
        """List what is mentioned of the cast, for the request and for the title; the first character is the hero."""
        bare = self.rng.random() < 0.06
        pairs = [self._mention(getattr(cast, slot), bare) for slot in mentioned if slot != "p"]
        where = f" {cast.p}" if "p" in mentioned else ""
        asked, titled = (list(column) for column in zip(*pairs, strict=True))
        return (", ".join(asked) if bare else listed(asked)) + where, listed(titled) + where

    def _mention(self, who: Thing, bare: bool) -> tuple[str, str]:
        """Return how the request and the title mention somebody or something."""
        if bare:
            return who.kind, who.the
        if isinstance(who, Character) and self.rng.random() < 0.4:
            named = f"{who} the {who.kind}"
            return self.rng.choice([f"{who.a} called {who}", f"{who.a} named {who}", named]), named
        return self.rng.choice([who.a, who.a, who.a, who.the]), who.the

    def _loosely(self, ask: str) -> str:
        """Type like a user: now and then no capital or no full stop."""
        if self.rng.random() < 0.2:
            ask = ask.rstrip(".!?")
        return ask[0].lower() + ask[1:] if self.rng.random() < 0.15 else ask


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Return the messages in the form of the chat template."""
    return _TEMPLATE.render(
        messages=messages, bos_token=BEGIN, eos_token=END, add_generation_prompt=add_generation_prompt
    )
