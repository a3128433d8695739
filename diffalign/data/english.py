"""A little English: words that exclude one another, words that only connect others, plurals."""

from __future__ import annotations


def words_of(text: str) -> frozenset[str]:
    """Of a line."""
    return frozenset(text.split())


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CLASSES: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "red": ("crimson", "scarlet"), "orange": (), "yellow": (), "green": ("emerald",), "cyan": ("turquoise", "teal"),
        "blue": ("navy", "azure"), "purple": ("violet", "magenta"), "pink": (), "brown": ("beige",), "black": (),
        "white": (), "grey": ("gray",),
    },
    {
        "wooden": (), "metal": ("metallic", "steel", "iron"), "glass": (), "plastic": (), "stone": ("marble",),
        "leather": (), "paper": ("cardboard",), "brick": (), "ceramic": ("porcelain",), "concrete": (),
    },
    {"striped": (), "spotted": ("polka-dot",), "checkered": ("plaid",), "floral": ()},
    {"sunny": (), "rainy": (), "snowy": (), "foggy": ("misty",), "stormy": ()},
)  # fmt: skip
"""Words of which one thing has one, each with others that say about the same."""
OPPOSITES = {
    "large": ("small", "tiny", "miniature"), "small": ("large", "big", "huge", "enormous", "gigantic", "massive"),
    "short": ("tall",), "thick": ("thin", "slim", "narrow"), "thin": ("thick", "wide"),
    "elderly": ("young",), "young": ("elderly",), "ancient": ("modern", "futuristic"), "modern": ("ancient",),
    "dry": ("wet",), "wet": ("dry",), "rough": ("smooth",), "smooth": ("rough",), "matte": ("shiny", "glossy"),
    "shiny": ("matte",), "dark": ("bright",), "bright": ("dark",), "sad": ("happy",), "happy": ("sad",),
    "closed": ("open",), "open": ("closed",), "dirty": ("clean",), "clean": ("dirty",),
}  # fmt: skip
"""What is said instead of the words behind it; "short" is the opposite of two words, so it stays."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "rectangle", "hexagon")
COLOURS = {w for name, others in CLASSES[0].items() for w in (name, *others)}
OF_CLASSES = {w for members in CLASSES for name, others in members.items() for w in (name, *others)}
ADJECTIVES = OF_CLASSES.union(*OPPOSITES.values())

ARTICLES = {"a", "an", "the", "his", "her", "its", "their", "my", "your", "our", "some", "another", "each", "every", "no"}
BE = {"is": "are", "was": "were", "has": "have"}
LINKS = {"is", "are", "was", "were", "painted", "dyed", "colored", "coloured"}
FUNCTION = (
    ARTICLES
    | LINKS
    | words_of(
        "has have be been and or but with without of in on at to from for by as into onto over under above below behind beside"
        " between near next inside outside underneath beneath through across around along against upon toward towards during"
        " while that which who whose where when this these those it he she they left right top front up down off out not than"
        " like very"
    )
)
"""Words at which a noun and what describes it ends."""
NOT_COUNTED = words_of(
    "lot couple group pair bunch bit few little row time hurry walk day night way side front top back left right background"
    " photo photograph picture image painting drawing portrait illustration render rendering view shot close-up closeup style"
    " variety number set series kind type piece sunset sunrise distance foreground middle center centre"
)
NOUNS_IN_ING = words_of(
    "building painting ring king string wing ceiling wedding drawing thing swing earring duckling pudding sling"
)
PAST = words_of(
    "sat stood held rode wore flew lay ate ran swam slept hung set made seen shown worn filled cut put built drawn broken torn"
    " lit bent frozen eaten driven hidden grown thrown caught split spread"
)
DENIALS = words_of("no not without never nothing neither")
IRREGULAR = {
    "child": "children", "person": "people", "foot": "feet", "tooth": "teeth", "mouse": "mice", "goose": "geese",
    "leaf": "leaves", "wolf": "wolves", "knife": "knives", "shelf": "shelves", "loaf": "loaves", "calf": "calves",
    "potato": "potatoes", "tomato": "tomatoes", "hero": "heroes",
    "sheep": "sheep", "deer": "deer", "fish": "fish", "aircraft": "aircraft",
}  # fmt: skip
SURFACES = words_of(
    "table desk bed chair couch sofa bench shelf roof box bridge tree umbrella car bus truck train rug blanket pillow counter"
    " stool ladder carpet mat stage"
)
NOT_UNDER = words_of("sea ocean water sun moon moonlight stars sky rain light lights influence construction all zero")
SWAPS = {
    "left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above",
    "inside": "outside", "outside": "inside",
}  # fmt: skip


def article(word: str) -> str:
    """``a`` or ``an`` before a word."""
    return "an" if word[:1] in "aeiou" and not word.startswith(("one", "uni", "eu", "use")) else "a"


def number(word: str) -> int:
    """Of a word or digits, up to ten; 0 for anything else."""
    if word in NUMBERS:
        return NUMBERS.index(word) + 1
    return int(word) if word.isdigit() and len(word) < 3 and int(word) <= len(NUMBERS) else 0


def plural(noun: str) -> str:
    """Of an English noun."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("man") and noun not in ("human", "german", "roman"):
        return noun[:-3] + "men"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def singular(noun: str) -> str | None:
    """What the noun is the plural of; None where it is of nothing."""
    known = {many: one for one, many in IRREGULAR.items()}
    tries = [known.get(noun, ""), noun[:-3] + "y", noun[:-3] + "man", noun[:-2], noun[:-1]]
    return next((one for one in tries if len(one) > 1 and plural(one) == noun), None)
