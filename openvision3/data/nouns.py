"""Singular and plural of the demo's names, in English that can be read back.

Some names can't be counted as they are: bread comes in loaves, jeans in pairs. Those take a measure word.
"""

_MEASURES = {
    "pair": "eyeglasses jeans sunglasses goggles gloves socks shorts skis scissors headphones maracas cherries",
    "bunch": "grapes",
    "handful": "peanuts beans blueberries",
    "set": "chains",
    "stack": "pancakes",
    "box": "popcorn",
    "loaf": "bread",
    "strip": "bacon",
    "stick": "butter",
    "plate": "spaghetti",
    "piece": "sushi candy coral",
    "head": "broccoli garlic lettuce",
    "ear": "corn",
    "bar": "soap",
}
_MEASURES_OF_SEVERAL_WORDS = {
    "crossed swords": "pair",
    "ballet shoes": "pair",
    "bowling pins": "set",
    "french fries": "box",
    "ice cream": "bowl",
    "shaved ice": "bowl",
    "meat on bone": "piece",
    "canned food": "can",
    "bubble tea": "cup",
    "toilet paper": "roll",
}
MEASURES = {
    name: measure for measure, names in _MEASURES.items() for name in names.split()
} | _MEASURES_OF_SEVERAL_WORDS

_UNCHANGED = {"sheep", "fish", "deer", "moose", "bison", "shrimp", "squid", "blowfish", "jellyfish", "kiwifruit"}
_IRREGULAR = {
    "mouse": "mice",
    "ox": "oxen",
    "goose": "geese",
    "die": "dice",
    "wolf": "wolves",
    "leaf": "leaves",
    "loaf": "loaves",
    "scarf": "scarves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "mosquito": "mosquitoes",
    "tornado": "tornadoes",
    "snowman": "snowmen",
    "bow and arrow": "bows and arrows",
    "nut and bolt": "nuts and bolts",
}
_INNER = (" of ", " with ", " on ")  # what follows qualifies the noun before it: ears of rice


def singular(name: str) -> str:
    """How one of a thing is named, without article: "apple", "pair of jeans"."""
    return f"{MEASURES[name]} of {name}" if name in MEASURES else name


def plural(name: str) -> str:
    """How several of a thing are named: "apples", "pairs of jeans", "ears of rice"."""
    noun = singular(name)
    for inner in _INNER:
        if inner in noun:
            head, rest = noun.split(inner, 1)
            return _plural_noun(head) + inner + rest
    return _plural_noun(noun)


def _plural_noun(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    rest, _, last = noun.rpartition(" ")
    return f"{rest} {_plural_word(last)}".strip()


def _plural_word(word: str) -> str:
    if word in _UNCHANGED:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def with_article(noun: str) -> str:
    """The noun after "a" or "an", by sound."""
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel or noun.startswith('hour') else 'a'} {noun}"
