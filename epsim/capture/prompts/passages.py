"""Requests without an image: short passages with questions, sums, lists of words, small programs (`text_prompt`)."""

from collections.abc import Callable

import numpy as np

from epsim.capture.prompts.requests import Prompt

PASSAGES = (
    "The tide comes in twice a day on this coast, and each time the causeway to the island disappears. Drivers who "
    "do not read the table at the gate have to wait about five hours. Last summer the coastguard fetched eleven cars "
    "from the water, and nobody was hurt. The council has now put up a barrier that closes by itself.",
    "Bread dough rises because yeast eats sugar and gives off carbon dioxide. The gas is caught in a net of gluten, "
    "which kneading makes strong. In a cold kitchen this takes twice as long, but slow dough tastes better: bacteria "
    "have the time to make acids. A baker who is in a hurry uses more yeast and warmer water.",
    "The library lends tools as well as books. A drill may be kept for three days and a ladder for one. Whoever "
    "brings a tool back late pays one coin a day, and whoever brings it back broken has to help for an afternoon in "
    "the workshop. Most people who came to repair one thing have stayed to repair many.",
    "A heat pump moves warmth from a cold place to a warm one, as a refrigerator does. For each unit of electricity "
    "it delivers three or four units of heat, fewer when it is freezing outside. Old houses can be heated with one if "
    "the radiators are large enough, because the water in them is not as hot as that of a gas boiler.",
    "Two teams measured the same glacier. The first used stakes in the ice and found that it had become thinner by "
    "ninety centimetres in a year. The second compared pictures taken from aircraft and found one metre and ten. They "
    "agree within their errors, but the pictures also show where the ice was lost: almost all near the tongue.",
    "In the old town the streets follow the streams that once ran there. The dyers lived at the lowest stream, so "
    "that their colours would not reach the others, and the bakers at the highest. When the streams were covered, the "
    "names stayed: Upper Water Street is still the best place to buy bread, and there is no water in it.",
    "A queue at which jobs arrive at random grows without bound when the server is busy all the time. At eighty per "
    "cent the mean wait is four service times, if the times vary as an exponential does; at ninety per cent it is "
    "nine. If every job takes equally long, the wait is half of that. This is why a fast server should not be full.",
    "Mara sold her bicycle to her neighbour, who wanted to give it to his daughter. The daughter had already bought "
    "one, so he offered it to Mara's brother at a lower price. When Mara came to dinner at her brother's house, her "
    "bicycle stood in the hall, and she could not decide whether to laugh or to ask who had made a profit.",
    "Bees tell each other where flowers are with a dance. The angle between the dance and the vertical is the angle "
    "between the flowers and the sun, and the longer the dance, the farther the flight. On a cloudy day they still "
    "find the sun, as the polarisation of the light in any blue patch of the sky tells them where it must be.",
    "The committee met for the third time and again could not agree on the colour of the bridge. The engineers want "
    "grey, because it hides dirt; the shopkeepers want red, because it can be seen from the motorway. The mayor "
    "proposed to ask the school. The school has asked for a bridge with a slide, and the engineers are calculating.",
    "Salt lowers the freezing point of water, so roads are salted before frost. Below about minus ten degrees it "
    "helps little. The salt then runs into ditches, where some plants die and others, which used to grow only at the "
    "sea, have begun to spread along motorways. Some towns now use sand in side streets and salt on hills alone.",
    "The recording was made in a single night with two microphones. The singer had a cold, and the pianist had "
    "learnt the last song an hour before. On the tape one can hear a tram in the second verse. The company wanted to "
    "do it again, but by the time that there was a free studio, the band had separated, so it was printed as it was.",
)
PASSAGE_QUESTIONS = (
    "Summarise this in one sentence.",
    "What is the most surprising fact here?",
    "Write three questions that a reader could answer from this text.",
    "Explain this to a child of eight.",
    "Which statements are facts and which are opinions or guesses?",
    "Continue the text with two more sentences in the same style.",
    "Translate the first sentence into German and into French.",
    "List every number and quantity that is mentioned, with what it refers to.",
    "Give the text a title and say why you chose it.",
    "What follows from this for someone who has to make a decision? Give an example.",
)
WORDS = (
    *("anchor", "basket", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket"),
    *("kettle", "ladder", "magnet", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "tunnel"),
    *("umbrella", "valley", "window", "yellow", "zipper", "bottle", "copper", "dragon", "forest", "guitar"),
)

Asked = tuple[str, str | None]  # the text, and the answer where it is definite


def text_prompt(rng: np.random.Generator, name: str) -> Prompt:
    """Return a random request without an image; those of one kind repeat a text sooner or later."""
    text, answer = KINDS[rng.integers(len(KINDS))](rng)
    return Prompt(text=text, name=name, answer=answer)


def _passage(rng: np.random.Generator) -> Asked:
    passage = PASSAGES[rng.integers(len(PASSAGES))]
    question = PASSAGE_QUESTIONS[rng.integers(len(PASSAGE_QUESTIONS))]
    return f"{passage}\n\n{question}", None


def _two_passages(rng: np.random.Generator) -> Asked:
    first, second = rng.permutation(len(PASSAGES))[:2]
    return f"Text A: {PASSAGES[first]}\n\nText B: {PASSAGES[second]}\n\nWhat do the two texts have in common?", None


def _shopping(rng: np.random.Generator) -> Asked:
    num_boxes, num_each, num_eaten = (int(n) for n in rng.integers((3, 6, 1), (13, 25, 10)))
    text = (
        f"A shop gets {num_boxes} boxes with {num_each} apples each. On the way {num_eaten} apples are eaten. "
        "How many apples arrive? Show the calculation."
    )
    return text, str(num_boxes * num_each - num_eaten)


def _journey(rng: np.random.Generator) -> Asked:
    hours, speed = int(rng.integers(2, 10)), 10 * int(rng.integers(4, 13))
    text = (
        f"A train takes {hours} hours at a constant {speed} km/h. How far does it go, and how long at half the speed?"
    )
    return text, f"{hours * speed} km, {2 * hours} hours"


def _sort_words(rng: np.random.Generator) -> Asked:
    words = [WORDS[i] for i in rng.permutation(len(WORDS))[: rng.integers(4, 11)]]
    return f"Sort these words alphabetically: {', '.join(words)}.", ", ".join(sorted(words))


def _count_letters(rng: np.random.Generator) -> Asked:
    words = [WORDS[i] for i in rng.permutation(len(WORDS))[:3]]
    letter = "aenrt"[rng.integers(5)]
    question = f'How often does the letter "{letter}" occur in "{" ".join(words)}"?'
    return question, str(" ".join(words).count(letter))


def _program(rng: np.random.Generator) -> Asked:
    bound, step, add = (int(n) for n in rng.integers((5, 2, 1), (30, 6, 10)))
    text = (
        "What does this Python program print? Explain each line.\n\n"
        f"total = {add}\nfor n in range(1, {bound}):\n    if n % {step} == 0:\n        total += n\nprint(total)"
    )
    return text, str(add + sum(n for n in range(1, bound) if n % step == 0))


KINDS: tuple[Callable[[np.random.Generator], Asked], ...] = (
    *(_passage, _passage, _passage, _two_passages),
    *(_shopping, _journey, _sort_words, _count_letters, _program),
)
