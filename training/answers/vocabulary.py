"""Names and values that facts are made of; every fifth of a list is kept for the test."""

from __future__ import annotations

from random import Random

_LISTS = {
    "first": (
        "Maria Peter Anna Lukas Sofia Daniel Emma Victor Laura Martin Julia Oscar Clara Henry Nina Felix Alice "
        "Simon Eva "
        "Thomas Ruth Adam Helena Bruno Irene Hugo Marta George Lena Paul Vera Marco Diana Walter Rosa Albert "
        "Ines Frank "
        "Olga Stefan Carla Leo Agnes Robert Tina Samuel Paula Edward Nora Karl Lucy Philip Greta Arthur Sarah "
        "Boris Elsa "
        "Rafael Monica Ivan Judith Gabriel Erika Conrad Fiona Louis Heidi Max Iris Otto Linda Ralph Miriam Theo "
        "Sylvia "
        "Jonas Hannah Erik Angela Oliver Amina Kofi Mei Hiro Priya Omar Leila Ravi Yuki Fatima Chen Aisha Diego "
        "Zara Tariq"
    ),
    "last": (
        "Lopez Smith Weber Rossi Novak Meyer Costa Brown Silva Keller Martin Fischer Moreau Hansen Walsh Berg "
        "Romano Clark "
        "Vogel Santos Murphy Klein Turner Ricci Olsen Garcia Becker Hughes Dubois Larsen Foster Bauer Marino "
        "Cooper Lang "
        "Nowak Reed Torres Schmidt Palmer Conti Wagner Ellis Ferrari Stone Lindberg Morris Haas Ramos Fox Petrov "
        "Tanaka "
        "Singh Okafor Kim Haddad Ivanov Chopra Nakamura Mensah Yilmaz Kowalski Andersen Marsh Barker Doyle Finch "
        "Grant"
    ),
    "city": (
        "Paris London Berlin Madrid Rome Vienna Prague Lisbon Dublin Oslo Helsinki Athens Warsaw Budapest Zurich "
        "Geneva "
        "Milan Turin Naples Venice Florence Hamburg Munich Cologne Dresden Leipzig Lyon Marseille Bordeaux "
        "Toulouse Porto "
        "Seville Valencia Barcelona Brussels Antwerp Amsterdam Rotterdam Copenhagen Stockholm Gothenburg Bergen "
        "Reykjavik "
        "Glasgow Edinburgh Manchester Liverpool Bristol Oxford Cambridge Boston Chicago Seattle Denver Dallas "
        "Houston "
        "Toronto Montreal Vancouver Sydney Melbourne Tokyo Kyoto Osaka Seoul Bangkok Mumbai Delhi Cairo Nairobi "
        "Lagos Lima"
    ),
    "job": (
        "baker teacher nurse pilot lawyer painter farmer doctor engineer carpenter librarian plumber journalist "
        "architect "
        "chemist cook dentist electrician firefighter gardener judge mechanic musician photographer physicist "
        "writer "
        "sailor surgeon tailor translator waiter accountant actor biologist butcher cashier coach dancer "
        "designer driver "
        "economist fisherman geologist hairdresser historian jeweller manager mathematician miner optician "
        "pharmacist"
    ),
    "colour": "red blue green yellow orange purple pink black white brown grey gold silver turquoise violet crimson",
    "animal": (
        "dog cat horse parrot rabbit hamster turtle goat pony snake canary goldfish donkey sheep duck goose "
        "lizard pig cow "
        "monkey owl fox wolf bear eagle"
    ),
    "petname": (
        "Bella Rocky Luna Buddy Coco Rex Daisy Shadow Ginger Oreo Milo Simba Nala Pepper Lucky Ziggy Biscuit "
        "Pumpkin Toffee "
        "Smokey Willow Jasper Mocha Hazel Bandit"
    ),
    "food": (
        "pizza sushi pasta soup salad rice bread cheese chocolate curry pancakes tacos risotto dumplings noodles "
        "lasagna "
        "steak salmon mushrooms tomatoes strawberries apples honey yogurt olives lentils potatoes paella goulash"
    ),
    "instrument": (
        "piano violin guitar flute drums cello trumpet harp saxophone clarinet organ accordion banjo viola "
        "trombone oboe "
        "mandolin bassoon"
    ),
    "language": (
        "Spanish French German Italian Portuguese Russian Polish Greek Turkish Arabic Hebrew Hindi Chinese "
        "Japanese Korean "
        "Swedish Norwegian Danish Finnish Dutch Hungarian Czech Latin Swahili Persian"
    ),
    "sport": (
        "tennis football basketball golf swimming rowing boxing cycling skiing hockey cricket rugby volleyball "
        "fencing "
        "surfing climbing sailing running badminton judo karate archery chess baseball"
    ),
    "car": "Toyota Ford Volvo Fiat Honda Tesla Audi Renault Mazda Nissan Jeep Kia Porsche Peugeot Skoda Subaru "
    "Lexus Seat",
    "product": (
        "lamps shoes chairs bicycles tractors clocks cameras toys glasses paper carpets engines batteries pianos "
        "tents boats "
        "windows helmets knives pumps soap tea medicine furniture robots drones phones bottles candles gloves"
    ),
    "project": (
        "Falcon Orchid Granite Comet Harbor Lantern Meadow Compass Glacier Thunder Amber Cedar Pioneer Horizon "
        "Mirage Summit "
        "Raven Cobalt Juniper Voyager Magnet Saffron Tempest Anchor Beacon Nebula Prism Quartz Velvet Zephyr "
        "Acorn Bamboo"
    ),
    "company": (
        "Northwind Brightex Solano Kestrel Ironwood Bluepeak Vantex Oakline Silverton Redfern Mapleton Corvane "
        "Deltron "
        "Highgate Lumora Nordvik Pelham Quantor Rivermark Stratton Tallis Umbra Westbrook Yarrow Zenith Arcadia "
        "Belmont"
    ),
    "subject": (
        "mathematics history biology physics chemistry geography philosophy economics law medicine music art "
        "literature "
        "astronomy psychology geology engineering sociology architecture linguistics"
    ),
    "month": "January February March April May June July August September October November December",
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}


class Vocabulary:
    """Draws names and values.

    Args:
        held_out: draw what is kept for the test, otherwise the rest.
        words: further words that stand in anybody's place now and then, so that no list is learned by heart; those kept
            for the test are left out.
        share: how often they do.
    """

    def __init__(self, held_out: bool, words: tuple[str, ...] = (), share: float = 0.0) -> None:
        kept = held_out_words()
        parts = {name: text.split() for name, text in _LISTS.items()}
        self._lists = {
            name: entries[4::5] if held_out else [entry for entry in entries if entry.lower() not in kept]
            for name, entries in parts.items()
        }
        self._words, self._share = tuple(word for word in words if word.lower() not in kept), share

    def draw(self, kind: str, rng: Random) -> str:
        """A value of this kind: of a list, or a number, a date, a time, a person."""
        if kind in ("month", "weekday"):
            return rng.choice(_LISTS[kind].split())
        if made := _MADE.get(kind):
            return made(rng)
        if kind == "person":
            last = f" {self._word('last', rng)}" if rng.random() < 0.6 else ""
            return self._word("first", rng) + last
        return self._word(kind, rng)

    def _word(self, kind: str, rng: Random) -> str:
        if self._words and rng.random() < self._share:
            return rng.choice(self._words)
        return rng.choice(self._lists[kind])


def held_out_words() -> set[str]:
    """Names and values that are kept for the test, in lower case."""
    return {entry.lower() for text in _LISTS.values() for entry in text.split()[4::5]}


def _date(rng: Random) -> str:
    day, month = rng.randint(1, 28), rng.choice(_LISTS["month"].split())
    return f"{day} {month}" if rng.random() < 0.5 else f"{month} {day}"


_MADE = {
    "number": lambda rng: str(rng.randint(2, rng.choice([20, 100, 999]))),
    "code": lambda rng: str(rng.randint(1000, 9999)),
    "year": lambda rng: str(rng.randint(1900, 2025)),
    "age": lambda rng: str(rng.randint(18, 90)),
    "date": _date,
    "time": lambda rng: f"{rng.randint(1, 12)} {rng.choice(['am', 'pm'])}",
    "money": lambda rng: f"{rng.randint(1, 99) * rng.choice([10, 100, 1000])} euros",
}
