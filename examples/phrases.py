"""Texts to be spoken: strings of digits, and short sentences from a small grammar."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH_SHARES = {1: 0.05, 2: 0.10, 3: 0.25, 4: 0.30, 5: 0.30}

LEXICON = {
    "NAME": (
        "anna ben carlos david emma frank grace henry julia kevin laura maria nina oscar peter rosa sam "
        "thomas victor walter"
    ),
    "DIGIT": "two three four five six seven eight nine",
    "COLOUR": "black blue brown golden green orange pink purple silver white yellow",
    "QUALITY": (
        "big broken clean cold empty famous heavy hungry lazy little lonely modern old quiet round shiny "
        "simple small strange tired tiny ugly warm wild wooden young"
    ),
    "ANIMAL": (
        "bird camel cat chicken dog dolphin donkey duck eagle elephant fox frog goat horse lion monkey "
        "mouse parrot penguin pig rabbit spider tiger turtle wolf zebra"
    ),
    "PERSON": (
        "actor artist baby baker doctor driver farmer father gardener girl king lawyer mother neighbor "
        "nurse pilot poet queen sailor singer sister soldier student teacher uncle waiter"
    ),
    "THING": (
        "apple basket bicycle blanket book bottle bridge button camera candle carpet chair clock coat "
        "curtain drum envelope engine guitar hammer hat jacket kettle ladder lamp letter magazine mirror "
        "necklace newspaper notebook orange painting pencil piano pillow pocket radio ribbon shirt shovel "
        "spoon suitcase table telephone ticket towel umbrella violin wallet window"
    ),
    "THINGS": (
        "apples bananas baskets bottles bricks buttons candles carrots chairs coins cookies cups envelopes "
        "flags flowers gloves keys lemons letters mushrooms oranges pencils pictures plates potatoes "
        "ribbons shirts spoons stamps stones tickets tomatoes trees windows"
    ),
    "PLACE": (
        "airport bakery bank barn beach cabin castle church city desert farm forest garden garage harbor "
        "hospital hotel island kitchen lake library market mountain museum office palace park river school "
        "station theater tower tunnel valley village"
    ),
    "DID": (
        "borrowed bought broke carried counted dropped found fixed forgot lost moved noticed opened packed "
        "painted picked pushed sold stole took wanted washed"
    ),
    "DO": (
        "bring carry clean count find fix follow forget hide keep move open paint pick push sell send take "
        "watch"
    ),
    "WENT": (
        "danced dreamed hurried laughed listened rested sang slept smiled stood stopped swam waited walked "
        "worked"
    ),
    "NEAR": "above across around behind below beside beyond inside near outside past under",
    "WHEN": "again alone always early often today together",
}
PATTERNS = (
    "NAME DID the COLOUR THING",
    "NAME DID DIGIT COLOUR THINGS",
    "NAME and NAME DID the THING",
    "the QUALITY ANIMAL WENT NEAR the PLACE",
    "the PERSON WENT NEAR the PLACE",
    "the PERSON DID DIGIT THINGS yesterday",
    "my PERSON DID that QUALITY ANIMAL",
    "our ANIMAL WENT with the QUALITY PERSON",
    "there are DIGIT COLOUR THINGS NEAR the PLACE",
    "please DO the COLOUR THING WHEN",
    "never DO that QUALITY ANIMAL",
    "DO the THING",
    "NAME WENT WHEN",
    "we WENT NEAR the QUALITY PLACE",
    "who DID my THING",
    "the PLACE is NEAR the PLACE",
)


def number_phrases(
    count: int, seed: int, exclude: Collection[str] = (), *, lengths: Mapping[int, float] | None = None
) -> list[str]:
    """Draw distinct strings of 1 to 5 spoken digits, such as "four two nine one", in random order.

    Every length is frequent, because models make errors on lengths that are rare in training. There are only
    ten phrases of one digit and a hundred of two, so a large sample has nearly all of them.

    Args:
        count: number of phrases.
        seed: random seed.
        exclude: phrases that may not be drawn.
        lengths: relative frequency of each number of digits; by default 1 to 5 digits.

    Raises:
        ValueError: fewer than `count` different phrases could be found.
    """
    sizes, shares = zip(*(lengths or LENGTH_SHARES).items(), strict=True)

    def draw(rng: random.Random) -> str:
        return " ".join(rng.choices(DIGITS, k=rng.choices(sizes, shares)[0]))

    return _draw_distinct(draw, count, seed, exclude)


def sentences(count: int, seed: int, exclude: Collection[str] = ()) -> list[str]:
    """Draw distinct short sentences, such as "anna found seven green bottles", of 3 to 8 words.

    Args:
        count: number of sentences.
        seed: random seed.
        exclude: sentences that may not be drawn.

    Raises:
        ValueError: fewer than `count` different sentences could be found.
    """
    lexicon = {kind: words.split() for kind, words in LEXICON.items()}

    def draw(rng: random.Random) -> str:
        slots = rng.choice(PATTERNS).split()
        return " ".join(rng.choice(lexicon.get(slot, [slot])) for slot in slots)

    return _draw_distinct(draw, count, seed, exclude)


def _draw_distinct(
    draw: Callable[[random.Random], str], count: int, seed: int, exclude: Collection[str]
) -> list[str]:
    rng, excluded = random.Random(seed), set(exclude)
    drawn: dict[str, None] = {}
    for _ in range(20 * count + 1000):
        if len(drawn) == count:
            break
        if (phrase := draw(rng)) not in excluded:
            drawn[phrase] = None
    if len(drawn) < count:
        raise ValueError(
            f"asked for {count} distinct phrases and found {len(drawn)}: ask for fewer or exclude less"
        )
    return list(drawn)
