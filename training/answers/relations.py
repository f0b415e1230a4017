"""What facts say, and how they are stated and asked for; the last wording of each is kept for the test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A property of people or things.

    `{s}` stands for who it is about, `{v}` for the value, `{o}` for an earlier value.

    Attributes:
        of: the kind of subject.
        value: the kind of value.
        statements: sentences that say it.
        questions: sentences that ask for it.
        changes: sentences that say that it is no longer what it was.
        own: the same, said by the speaker.
        own_questions: asked by the speaker.
    """

    of: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    changes: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    own_questions: tuple[str, ...] = ()


def _relation(of: str, value: str, *given: str) -> Relation:
    """`given`: statements, questions, changes, own statements and own questions, each separated by `|`."""
    return Relation(of, value, *(tuple(part.strip() for part in text.split("|") if part) for text in given))


RELATIONS = (
    _relation(
        "person",
        "city",
        "{s} lives in {v}.|{s} has a flat in {v}.|{s}'s home is in {v}.|{s} is at home in {v}.|{s} resides in {v}.",
        "Where does {s} live?|In which city does {s} live?|What city does {s} live in?|Where is {s}'s home?"
        "|Which city is the home of {s}?",
        "{s} has moved from {o} to {v}.|{s} used to live in {o} and now lives in {v}.|{s} left {o} for {v}.",
        "I live in {v}.|My flat is in {v}.|I have a small house in {v}.|My home is in {v}.",
        "Where do I live?|In which city do I live?|What city is my home in?|Which city do I live in?",
    ),
    _relation(
        "person",
        "city",
        "{s} was born in {v}.|{s}'s birthplace is {v}.|{s} was born and raised in {v}.|{s} comes from {v}.",
        "Where was {s} born?|What is {s}'s birthplace?|In which city was {s} born?|What is the birthplace of {s}?",
        "",
        "I was born in {v}.|I come from {v}.|My birthplace is {v}.",
        "Where was I born?|What is my birthplace?|In which city was I born?",
    ),
    _relation(
        "person",
        "job",
        "{s} works as a {v}.|{s} is a {v}.|{s}'s job is {v}.|{s} earns a living as a {v}.|{s} is employed as a {v}.",
        "What does {s} work as?|What is {s}'s job?|What does {s} do for a living?|What is the job of {s}?"
        "|What is the profession of {s}?",
        "{s} stopped being a {o} and is now a {v}.|{s} was a {o} and now works as a {v}.",
        "I work as a {v}.|I am a {v}.|My job is {v}.|I earn my living as a {v}.",
        "What is my job?|What do I work as?|What do I do for a living?|What is my profession?",
    ),
    _relation(
        "person",
        "colour",
        "{s}'s favourite colour is {v}.|{s} likes the colour {v} best.|The colour that {s} likes most is {v}."
        "|{s} prefers the colour {v}.",
        "What is {s}'s favourite colour?|Which colour does {s} like best?|What colour does {s} like most?"
        "|Which colour is the favourite of {s}?",
        "{s}'s favourite colour was {o} and is {v} now.",
        "My favourite colour is {v}.|I like the colour {v} best.|The colour I like most is {v}.",
        "What is my favourite colour?|Which colour do I like best?|What colour do I prefer?",
    ),
    _relation(
        "person",
        "animal",
        "{s} has a {v}.|{s}'s pet is a {v}.|{s} keeps a {v} at home.|{s} owns a {v}.",
        "What pet does {s} have?|What animal does {s} keep?|What is {s}'s pet?|Which animal does {s} own?",
        "",
        "I have a {v}.|My pet is a {v}.|I keep a {v} at home.",
        "What pet do I have?|What animal do I keep?|Which animal do I own?",
    ),
    _relation(
        "person",
        "petname",
        "{s}'s pet is called {v}.|The name of {s}'s pet is {v}.|{s} named the pet {v}.|{s} calls the pet {v}.",
        "What is {s}'s pet called?|What is the name of {s}'s pet?|How is {s}'s pet called?|What did {s} name the pet?",
        "",
        "My pet is called {v}.|The name of my pet is {v}.|I named my pet {v}.",
        "What is my pet called?|What is the name of my pet?|What did I name my pet?",
    ),
    _relation(
        "person",
        "food",
        "{s}'s favourite food is {v}.|{s} likes to eat {v}.|{s} eats {v} every day.|{s} loves {v} for dinner.",
        "What is {s}'s favourite food?|What does {s} like to eat?|What food does {s} eat?|Which food does {s} love?",
        "",
        "My favourite food is {v}.|I like to eat {v}.|I eat {v} every day.",
        "What is my favourite food?|What do I like to eat?|What food do I love?",
    ),
    _relation(
        "person",
        "instrument",
        "{s} plays the {v}.|{s}'s instrument is the {v}.|{s} is learning to play the {v}.|{s} performs on the {v}.",
        "What instrument does {s} play?|Which instrument does {s} play?|What is {s}'s instrument?"
        "|Which musical instrument is played by {s}?",
        "{s} gave up the {o} and plays the {v} now.",
        "I play the {v}.|My instrument is the {v}.|I am learning the {v}.",
        "What instrument do I play?|Which instrument do I play?|What is my musical instrument?",
    ),
    _relation(
        "person",
        "language",
        "{s} speaks {v}.|{s} is learning {v}.|{s}'s mother tongue is {v}.|{s} is fluent in {v}.",
        "What language does {s} speak?|Which language does {s} speak?|What is {s}'s language?"
        "|In which language is {s} fluent?",
        "",
        "I speak {v}.|I am learning {v}.|My mother tongue is {v}.",
        "What language do I speak?|Which language do I speak?|In which language am I fluent?",
    ),
    _relation(
        "person",
        "sport",
        "{s}'s favourite sport is {v}.|{s} is good at {v}.|{s} does {v} at the weekend."
        "|{s} spends every evening on {v}.",
        "What is {s}'s favourite sport?|Which sport does {s} do?|What sport is {s} good at?"
        "|What sport does {s} practise?",
        "",
        "My favourite sport is {v}.|I am good at {v}.|I do {v} at the weekend.",
        "What is my favourite sport?|Which sport do I do?|What sport do I practise?",
    ),
    _relation(
        "person",
        "car",
        "{s} drives a {v}.|{s}'s car is a {v}.|{s} bought a {v}.|{s} goes to work in a {v}.",
        "What car does {s} drive?|What is {s}'s car?|Which car does {s} drive?|What make is the car of {s}?",
        "{s} sold the {o} and drives a {v} now.",
        "I drive a {v}.|My car is a {v}.|I bought a {v}.",
        "What car do I drive?|Which car do I have?|What make is my car?",
    ),
    _relation(
        "person",
        "subject",
        "{s} studies {v}.|{s} is a student of {v}.|{s} has a degree in {v}.|{s} went to university to study {v}.",
        "What does {s} study?|What subject does {s} study?|Which subject does {s} study?"
        "|In what does {s} have a degree?",
        "",
        "I study {v}.|I have a degree in {v}.|I am a student of {v}.",
        "What do I study?|What subject do I study?|Which subject did I study?",
    ),
    _relation(
        "person",
        "date",
        "{s}'s birthday is on {v}.|{s} has a birthday on {v}.|{s} celebrates the birthday on {v}."
        "|The birthday of {s} is {v}.",
        "When is {s}'s birthday?|On what day is {s}'s birthday?|What is {s}'s birthday?"
        "|When does {s} celebrate the birthday?",
        "",
        "My birthday is on {v}.|I have my birthday on {v}.|I celebrate my birthday on {v}.",
        "When is my birthday?|On what day is my birthday?|When do I celebrate my birthday?",
    ),
    _relation(
        "person",
        "age",
        "{s} is {v} years old.|{s}'s age is {v}.|{s} turned {v}.|{s} has reached the age of {v}.",
        "How old is {s}?|What is {s}'s age?|What age is {s}?|How many years old is {s}?",
        "",
        "I am {v} years old.|My age is {v}.|I turned {v}.",
        "How old am I?|What is my age?|What age am I?",
    ),
    _relation(
        "person",
        "code",
        "{s}'s room number is {v}.|{s} sits in room {v}.|{s}'s office is room {v}.|{s} can be found in room {v}.",
        "What is {s}'s room number?|In which room does {s} sit?|What room is {s}'s office?"
        "|In which room can {s} be found?",
        "{s} moved from room {o} to room {v}.",
        "My room number is {v}.|I sit in room {v}.|My office is room {v}.",
        "What is my room number?|In which room do I sit?|Which room is my office?",
    ),
    _relation(
        "person",
        "company",
        "{s} works for {v}.|{s}'s employer is {v}.|{s} has a job at {v}.|{s} is employed by {v}.",
        "Which company does {s} work for?|Who does {s} work for?|What is {s}'s employer?"
        "|At which company does {s} have a job?",
        "{s} left {o} and works for {v} now.|{s} went from {o} to {v}.",
        "I work for {v}.|My employer is {v}.|I have a job at {v}.",
        "Which company do I work for?|Who do I work for?|What is my employer?",
    ),
    _relation(
        "person",
        "first",
        "{s}'s sister is called {v}.|{s} has a sister named {v}.|The name of {s}'s sister is {v}.|{s}'s sister is {v}.",
        "What is the name of {s}'s sister?|Who is {s}'s sister?|What is {s}'s sister called?"
        "|How is {s}'s sister named?",
        "",
        "My sister is called {v}.|I have a sister named {v}.|The name of my sister is {v}.",
        "What is the name of my sister?|Who is my sister?|What is my sister called?",
    ),
    _relation(
        "person",
        "first",
        "{s} is married to {v}.|{s}'s partner is {v}.|{s} and {v} are a couple.|{s} married {v}.",
        "Who is {s} married to?|Who is {s}'s partner?|What is the name of {s}'s partner?|Who did {s} marry?",
        "",
        "I am married to {v}.|My partner is {v}.|My partner is called {v}.",
        "Who am I married to?|Who is my partner?|What is the name of my partner?",
    ),
    _relation(
        "project",
        "person",
        "Project {s} is led by {v}.|{v} leads project {s}.|The head of project {s} is {v}."
        "|{v} is in charge of project {s}.",
        "Who leads project {s}?|Who is the head of project {s}?|By whom is project {s} led?"
        "|Who is in charge of project {s}?",
        "Project {s} was led by {o} and is led by {v} now.|{v} took over project {s} from {o}.",
    ),
    _relation(
        "project",
        "date",
        "The deadline of project {s} is {v}.|Project {s} must be finished by {v}.|Project {s} is due on {v}."
        "|Project {s} ends on {v}.",
        "When is the deadline of project {s}?|When is project {s} due?|What is the deadline of project {s}?"
        "|When does project {s} end?",
        "The deadline of project {s} was moved from {o} to {v}.",
    ),
    _relation(
        "project",
        "money",
        "The budget of project {s} is {v}.|Project {s} has a budget of {v}.|Project {s} costs {v}."
        "|Project {s} may spend {v}.",
        "What is the budget of project {s}?|How much does project {s} cost?|How large is the budget of project {s}?"
        "|How much may project {s} spend?",
        "The budget of project {s} was raised from {o} to {v}.",
    ),
    _relation(
        "project",
        "code",
        "The code of project {s} is {v}.|Project {s} has the code {v}.|Use the code {v} for project {s}."
        "|Project {s} is listed under the code {v}.",
        "What is the code of project {s}?|Which code does project {s} have?|What code is used for project {s}?"
        "|Under which code is project {s} listed?",
        "The code of project {s} was changed from {o} to {v}.",
    ),
    _relation(
        "project",
        "weekday",
        "The team of project {s} meets on {v}.|Project {s} has its meeting on {v}."
        "|The meeting of project {s} is on {v}."
        "|Every {v} there is a meeting of project {s}.",
        "On what day does the team of project {s} meet?|When is the meeting of project {s}?"
        "|What day is the meeting of project {s}?|On which weekday does project {s} meet?",
        "The meeting of project {s} was moved from {o} to {v}.",
    ),
    _relation(
        "company",
        "city",
        "{s} is based in {v}.|The headquarters of {s} are in {v}.|{s} has its main office in {v}.|{s} sits in {v}.",
        "Where is {s} based?|Where are the headquarters of {s}?|In which city is {s} based?"
        "|In which city does {s} sit?",
        "{s} moved its headquarters from {o} to {v}.",
    ),
    _relation(
        "company",
        "product",
        "{s} makes {v}.|{s} produces {v}.|{s} is known for its {v}.|{s} sells {v}.",
        "What does {s} make?|What does {s} produce?|What is {s} known for?|What does {s} sell?",
        "{s} stopped making {o} and makes {v} now.",
    ),
    _relation(
        "company",
        "year",
        "{s} was founded in {v}.|{s} has existed since {v}.|The year in which {s} was founded is {v}."
        "|{s} opened in {v}.",
        "When was {s} founded?|In which year was {s} founded?|Since when has {s} existed?|In what year did {s} open?",
    ),
    _relation(
        "company",
        "person",
        "{v} runs {s}.|The director of {s} is {v}.|{s} is run by {v}.|{s} is headed by {v}.",
        "Who runs {s}?|Who is the director of {s}?|By whom is {s} run?|Who heads {s}?",
        "{v} replaced {o} as the director of {s}.",
    ),
    _relation(
        "company",
        "number",
        "{s} has {v} employees.|{v} people work at {s}.|{s} employs {v} people.|The staff of {s} is {v} people.",
        "How many employees does {s} have?|How many people work at {s}?|How many people does {s} employ?"
        "|How large is the staff of {s}?",
    ),
)
