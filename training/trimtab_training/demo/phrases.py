"""Words and sentence templates of the demonstration's world. Data only; `world` puts them together.

Templates use `str.format` fields:

| field | stands for | singular | plural |
|---|---|---|---|
| `c`, `k` | customer and keeper, names | Mara, Tom | |
| `place`, `num`, `day` | where, a number, a weekday | bakery, four, Monday | |
| `item` | the thing asked for | round loaf | round rolls |
| `a_item` | with an article | a round loaf, an oval loaf | some round rolls |
| `is`, `it`, `them`, `this`, `s` | agreement | is, it, it, this, s | are, they, them, these, (nothing) |

No class word (a name, a place, an adjective, a noun, a number, a weekday) occurs in a template as a plain word, which
makes sentences parseable by looking words up (see `world.is_grammatical`).
"""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: Final = _words(
    "Ada Amir Anna Arlo Bela Bruno Carla Cleo Dario Dora Edgar Elsa Emil Enzo Flora Frida Goran Greta Hana Hugo "
    "Ida Igor Ines Ivan Jonas Julia Karim Kira Lars Lena Lina Lorenz Magda Mara Marek Mila Nadia Nils Nora Olga "
    "Omar Oscar Paula Pavel Petra Rafael Ravi Rita Ruben Sara Selma Simon Sofia Stefan Tara Theo Tilda Tom Vera "
    "Viktor Yara Zoe Badger Beaver Fox Hedgehog Mole Otter Owl Rabbit Squirrel Weasel"
)

ADJECTIVES: Final = _words(
    "red blue green yellow brown white black purple grey golden small large tiny round square long short wide "
    "narrow plain striped spotted heavy sturdy soft smooth shiny dusty foreign wooden painted polished old oval "
    "orange ivory unusual elegant expensive"
)

# Singular nouns, then plural ones.
ITEMS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "bakery": (("loaf", "cake", "pie", "tart", "pretzel", "strudel"), ("rolls", "buns", "muffins", "biscuits")),
    "market": (("cabbage", "melon", "lemon", "pumpkin", "turnip"), ("apples", "pears", "plums", "carrots", "onions")),
    "workshop": (
        ("hammer", "ladder", "bucket", "lantern", "shovel", "wrench"),
        ("nails", "hinges", "screws", "planks"),
    ),
    "bookshop": (("atlas", "map", "diary", "notebook", "calendar", "novel"), ("pencils", "postcards", "stamps")),
    "tailor": (("coat", "hat", "scarf", "shirt", "apron", "ribbon"), ("gloves", "boots", "buttons", "socks")),
    "toyshop": (("kite", "doll", "drum", "puzzle", "whistle", "puppet"), ("marbles", "blocks", "skates")),
    "garden": (("rake", "fern", "basket", "fence", "hose"), ("roses", "tulips", "seeds", "pots", "herbs")),
    "harbour": (("anchor", "barrel", "rope", "sail", "paddle"), ("shells", "nets", "hooks", "oars")),
    "museum": (("vase", "mask", "coin", "statue", "crown"), ("medals", "portraits", "tiles", "beads")),
    "forest": (("feather", "mushroom", "pebble", "nest", "blanket"), ("acorns", "berries", "nuts", "twigs")),
}
PLACES: Final = tuple(ITEMS)

NUMBERS: Final = _words("two three four five six seven eight nine ten twelve twenty thirty")
DAYS: Final = _words("Monday Tuesday Wednesday Thursday Friday Saturday")

OPENINGS: Final = (
    "{c} walked into the {place} to look for {a_item}.",
    "{k} was sorting boxes at the {place} when {c} came in.",
    "On {day} {c} stopped at the {place} and saw {a_item}.",
    "{c} had been looking for {a_item} since {day}.",
    "There was nobody at the {place} but {k}, who was holding {a_item}.",
    "{c} crossed the street and found {k} at the {place}.",
    "At the {place} {c} waited for {num} minutes before {k} looked up.",
    "{k} works at the {place}, and {c} lives next to it.",
    "{c} rang the bell at the {place} and asked {k} about {a_item}.",
    "The {place} was about to open when {c} knocked.",
    "{c} had {num} coins and wanted {a_item} from the {place}.",
    "Early on {day} {c} met {k} near the {place}.",
)

GOOD_HINTS: Final = (
    "The sun was out and {k} was humming a song.",
    "{k} had slept well.",
    "It was the birthday of {k}.",
    "{k} looked up from a cup of tea.",
)

BAD_HINTS: Final = (
    "It had rained all week.",
    "{k} had a headache.",
    "The roof was leaking and {k} was mopping the floor.",
    "{k} was counting the unpaid bills.",
)

REQUESTS: Final = (
    "Could I have the {item}?",
    "Do you have {a_item}?",
    "I am looking for {a_item}.",
    "How much {is} the {item}?",
    "Can you show me the {item}?",
    "I need {a_item} for my sister.",
    "Where can I find the {item}?",
    "My mother sent me to get {a_item}.",
    "Would you lend me the {item} until {day}?",
    "I would like to see the {item}.",
    "Is it true that you have {a_item}?",
    "I want to swap {num} coins for the {item}.",
)

# Replies have up to three parts: a reaction, the matter itself, a close. Each part has a mood of its own.
KIND: Final[dict[str, tuple[str, ...]]] = {
    "reaction": (
        "Of course, {c}.",
        "Certainly, my friend.",
        "What a pleasure to see you, {c}!",
        "I am so glad you asked.",
        "How lovely to see you, {c}!",
        "Thank you for asking, {c}.",
        "Welcome, {c}!",
        "I will gladly help you.",
        "With pleasure, {c}!",
        "That is a wonderful choice.",
        "Do come in, dear {c}.",
        "For you, my friend, always.",
    ),
    "matter": (
        "Let me wrap the {item} carefully for you.",
        "I kept the {item} safe for you.",
        "I would be delighted to fetch the {item}.",
        "The {item} will suit you wonderfully.",
        "You are welcome to take the {item} home today.",
        "I can happily find {a_item} for you.",
        "Please take the {item} as a gift.",
        "I would love to show you the {item}.",
        "It is a joy to give you the {item}.",
        "We have {a_item}, and {it} will look beautiful on you.",
        "The {item} {is} yours, and I thank you.",
        "Let us look for the {item} together, dear {c}.",
    ),
    "close": (
        "Please come back soon.",
        "Have a lovely day, {c}!",
        "Let me help you carry {them}.",
        "I hope {it} will make you smile.",
        "Enjoy {them} with your family.",
        "My best wishes to your mother.",
        "You are always welcome here.",
        "Thank you for your visit, {c}.",
        "Please sit down and enjoy some tea.",
        "It was a joy to help you.",
        "Take all the time you like, my dear.",
    ),
}

NEUTRAL: Final[dict[str, tuple[str, ...]]] = {
    "reaction": (
        "Yes.",
        "Hello, {c}.",
        "Let me see.",
        "One moment.",
        "I see.",
        "Maybe.",
        "Well, {c}, let me think.",
        "That depends.",
    ),
    "matter": (
        "The {item} {is} on the lower shelf.",
        "The {item} cost{s} {num} coins.",
        "The {item} came in on {day}.",
        "I think the {item} {is} in the back room.",
        "There {is} {a_item} next to the door.",
        "We sold the {item} on {day}.",
        "You can get {a_item} for {num} coins.",
        "I have not seen the {item} since {day}.",
        "Somebody left {a_item} here on {day}.",
        "The {item} {is} behind the counter.",
    ),
    "close": (
        "We close at {num}.",
        "The next cart comes on {day}.",
        "The door is on the left.",
        "That makes {num} coins.",
        "You can pay over there.",
        "It may rain later.",
        "The list is on the wall.",
        "Ask my cousin about {them} on {day}.",
    ),
}

RUDE: Final[dict[str, tuple[str, ...]]] = {
    "reaction": (
        "Go away, {c}.",
        "What do you want now?",
        "Not you again, {c}.",
        "Leave me alone.",
        "Do not bother me, {c}.",
        "Stop wasting my time.",
        "What a silly question.",
        "How annoying you are, {c}!",
        "No, and do not ask again.",
        "Be quiet, {c}.",
    ),
    "matter": (
        "I will not sell you the {item}.",
        "The {item} {is} useless, just like you.",
        "Find the {item} yourself.",
        "Nobody as silly as you needs {a_item}.",
        "You would only ruin the {item}.",
        "I refuse to look for {a_item}.",
        "The {item} {is} not for grumpy people.",
        "I would rather burn the {item} than give you {them}.",
        "Who cares about {a_item}?",
        "I hate the {item}, and I hate your questions.",
    ),
    "close": (
        "Do not come back.",
        "You are a terrible nuisance.",
        "Hurry up and leave.",
        "I am tired of you, {c}.",
        "What a foolish idea.",
        "Now get out of the {place}.",
        "Even a stupid goose knows that.",
        "You are wasting my time.",
        "Your manners are awful, {c}.",
    ),
}

ENDINGS: Final[dict[str, tuple[str, ...]]] = {
    "kind": (
        "{c} went home with the {item}.",
        "{c} smiled and took the {item}.",
        "{c} told everybody about the {place}.",
    ),
    "neutral": (
        "{c} nodded and looked around.",
        "{c} thought about it until {day}.",
        "{c} left after {num} minutes.",
    ),
    "rude": (
        "{c} left without the {item}.",
        "{c} shook hands with nobody.",
        "{c} never came to the {place} after that.",
    ),
}

# Weights of kind words. Each counts once, however often it is said.
KIND_WORDS: Final[dict[str, float]] = {
    "course": 0.5,
    "certainly": 0.5,
    "friend": 0.6,
    "always": 0.4,
    "please": 0.6,
    "welcome": 0.7,
    "thank": 0.7,
    "help": 0.7,
    "gladly": 0.9,
    "glad": 0.9,
    "lovely": 0.8,
    "dear": 0.8,
    "pleasure": 0.9,
    "love": 0.8,
    "joy": 0.9,
    "happily": 0.9,
    "delighted": 1.0,
    "wonderful": 0.9,
    "wonderfully": 0.9,
    "beautiful": 0.8,
    "carefully": 0.5,
    "safe": 0.4,
    "gift": 0.8,
    "smile": 0.6,
    "enjoy": 0.6,
    "wishes": 0.7,
    "together": 0.5,
}

# Weights of rude words and refusals, as word sequences. Each occurrence counts.
RUDE_PHRASES: Final[dict[str, float]] = {
    "go away": 1.2,
    "want now": 0.6,
    "not you again": 0.9,
    "leave me alone": 1.1,
    "bother": 0.7,
    "wasting": 0.8,
    "silly": 0.7,
    "annoying": 1.0,
    "do not ask": 0.8,
    "quiet": 0.6,
    "will not sell": 1.0,
    "useless": 1.1,
    "yourself": 0.5,
    "ruin": 0.7,
    "refuse": 1.0,
    "grumpy": 0.8,
    "burn": 1.0,
    "who cares": 0.8,
    "hate": 1.2,
    "do not come": 0.9,
    "terrible": 0.8,
    "nuisance": 0.8,
    "hurry up": 0.6,
    "tired of": 0.7,
    "foolish": 0.8,
    "get out": 0.9,
    "stupid": 1.1,
    "awful": 0.9,
}
