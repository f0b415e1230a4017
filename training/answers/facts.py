"""Made-up facts, the notes, profiles and chats that tell them, and questions that one of those documents answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random

from ..data import Passage
from .relations import RELATIONS, Relation
from .vocabulary import Vocabulary

_FILLERS = (
    "The weather was fine.",
    "We had coffee together.",
    "Nothing else happened that day.",
    "There is more to tell another time.",
    "It was a long week.",
    "The train was late again.",
    "Please keep this in mind.",
    "That is all for now.",
)
_REPLIES = (
    "Thank you, I will keep that in mind.",
    "Good to know.",
    "I have made a note of it.",
    "Interesting, thank you.",
)
_UPDATES = ("Update: {new} It was {old} before.", "Something has changed. {new} It is no longer {old}.")
_CHANGED = 0.25
_KINDS = ("person", "person", "person", "project", "company")


@dataclass(frozen=True)
class Asked:
    """A question, its answer in the document's words, and the place of that document."""

    text: str
    answer: str
    gold: int


@dataclass(frozen=True)
class Lesson:
    """Documents, and questions about them."""

    documents: list[Passage]
    asked: list[Asked]


@dataclass(frozen=True)
class _Fact:
    subject: str | None
    relation: Relation
    value: str
    old: str | None


class FactWriter:
    """Writes lessons about facts.

    Args:
        vocabulary: where names and values come from.
        new_wordings: state and ask with the wordings that are kept for the test, otherwise with the others.
        fillers: further sentences to put between the facts.
    """

    def __init__(self, vocabulary: Vocabulary, new_wordings: bool = False, fillers: Sequence[str] = ()) -> None:
        self._vocabulary, self._new, self._fillers = vocabulary, new_wordings, (*_FILLERS, *fillers)

    def draw(self, size: int, questions: int, rng: Random) -> Lesson:
        """A lesson of `size` documents with at most `questions` questions."""
        shape = rng.choice(("notes", "notes", "profiles", "mixed", "chat", "chat"))
        per_document = 1 if shape in ("notes", "chat") else rng.randint(1, 4)
        facts = self._facts(size * per_document, shape == "chat", rng)
        if shape == "profiles":
            facts.sort(key=lambda fact: fact.subject or "")
        groups = [facts[i : i + per_document] for i in range(0, len(facts), per_document)][:size]
        if shape != "chat":
            rng.shuffle(groups)
        stale = [fact for group in groups for fact in group if fact.old is not None and rng.random() < 0.5]
        groups = self._with_stale(groups, stale, size, rng)
        documents = [self._document(group, shape, rng) for group in groups]
        if shape == "chat":
            documents = _dated(documents, rng)
        return Lesson(documents, self._questions(groups, questions, rng))

    def _with_stale(self, groups: list[list[_Fact]], stale: list[_Fact], size: int, rng: Random) -> list[list[_Fact]]:
        """What was true before a change is told earlier, in a document of its own; other documents make room."""
        for fact in stale:
            place = next(n for n, group in enumerate(groups) if any(fact is one for one in group))
            before = _Fact(fact.subject, fact.relation, fact.old or "", None)
            removable = [n for n in range(place) if len(groups[n]) == 1 and groups[n][0].old is None]
            if removable:
                groups[rng.choice(removable)] = [before]
        return groups[:size]

    def _facts(self, count: int, own: bool, rng: Random) -> list[_Fact]:
        """Facts about few subjects with few relations, so that subject and relation must both fit."""
        facts: dict[tuple[str | None, Relation], _Fact] = {}
        while len(facts) < count:
            kind = rng.choice(_KINDS)
            relations = [r for r in RELATIONS if r.of == kind]
            relations = rng.sample(relations, min(len(relations), rng.randint(1, 6)))
            subjects = self._subjects(kind, rng.randint(1, max(2, count // 2)), [s for s, _ in facts], rng)
            if own and kind == "person" and rng.random() < 0.7:
                subjects.append(None)
                relations = relations if rng.random() < 0.5 else [r for r in RELATIONS if r.own]
            for subject in subjects:
                for relation in relations:
                    if (subject, relation) not in facts and rng.random() < 0.8:
                        facts[subject, relation] = self._fact(subject, relation, rng)
        chosen = list(facts.values())
        rng.shuffle(chosen)
        return chosen[:count]

    def _subjects(self, kind: str, count: int, known: Sequence[str | None], rng: Random) -> list[str | None]:
        taken = {name.split()[0].lower(): name for name in known if name}
        found: list[str | None] = []
        for _ in range(count):
            name = self._vocabulary.draw(kind, rng)
            same = taken.get(name.split()[0].lower())
            if same is None or (same.lower() != name.lower() and " " in same and " " in name):
                taken[name.split()[0].lower()] = name
                found.append(name)
        return found

    def _fact(self, subject: str | None, relation: Relation, rng: Random) -> _Fact:
        value = self._vocabulary.draw(relation.value, rng)
        changes = (relation.changes or subject is None) and rng.random() < _CHANGED
        old = self._vocabulary.draw(relation.value, rng) if changes else None
        return _Fact(subject, relation, value, None if old is None or old.lower() == value.lower() else old)

    def _pick(self, wordings: Sequence[str], rng: Random) -> str:
        return wordings[-1] if self._new else rng.choice(wordings[:-1])

    def _statement(self, fact: _Fact, rng: Random) -> str:
        own = fact.subject is None
        if fact.old is not None and not own:
            return rng.choice(fact.relation.changes).format(s=fact.subject, v=fact.value, o=fact.old)
        text = self._pick(fact.relation.own if own else fact.relation.statements, rng)
        text = text.format(s=fact.subject, v=fact.value)
        return rng.choice(_UPDATES).format(new=text, old=fact.old) if fact.old is not None else text

    def _document(self, facts: Sequence[_Fact], shape: str, rng: Random) -> Passage:
        sentences, last = [], object()
        pronoun = rng.choice((("He", "His"), ("She", "Her")))
        for fact in facts:
            text = self._statement(fact, rng)
            if fact.subject and fact.subject == last and fact.relation.of == "person" and rng.random() < 0.6:
                text = text.replace(f"{fact.subject}'s", pronoun[1], 1) if f"{fact.subject}'s" in text else text
                text = pronoun[0] + text[len(fact.subject) :] if text.startswith(f"{fact.subject} ") else text
            sentences.append(text)
            last = fact.subject
        for _ in range(rng.choice((0, 0, 1, 2))):
            sentences.insert(rng.choice((0, len(sentences))), rng.choice(self._fillers))
        title = facts[0].subject if shape == "profiles" and rng.random() < 0.5 else ""
        return Passage(title or "", " ".join(sentences))

    def _questions(self, groups: Sequence[Sequence[_Fact]], count: int, rng: Random) -> list[Asked]:
        """The answer is what holds last: of facts told twice the later one."""
        holds = {(fact.subject, fact.relation): (fact, place) for place, group in enumerate(groups) for fact in group}
        asked = []
        for fact, place in rng.sample(list(holds.values()), min(count, len(holds))):
            wordings = fact.relation.own_questions if fact.subject is None else fact.relation.questions
            text = self._pick(wordings, rng).format(s=fact.subject)
            asked.append(Asked(text if rng.random() < 0.8 else text.rstrip("?"), fact.value, place))
        return asked


def _dated(documents: Sequence[Passage], rng: Random) -> list[Passage]:
    """Turns of a chat in the order of time; some are followed by the assistant's thanks, in the same turn."""
    moment, turns = datetime(rng.randint(2021, 2025), rng.randint(1, 12), rng.randint(1, 28), 8), []
    for document in documents:
        moment += timedelta(days=rng.choice((0, 0, 0, 1, 9)), hours=rng.randint(0, 2), minutes=rng.randint(1, 59))
        text = f"{moment:%Y-%m-%d %H:%M} User: {document.text}"
        if rng.random() < 0.15:
            text += f" Assistant: {rng.choice(_REPLIES)}"
        turns.append(Passage("", text))
    return turns
