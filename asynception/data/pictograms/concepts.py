"""What a picture shows, whatever the variant, and on which side of the split that is.

With a split by picture, a network that remembers an icon would be tested on its outline.
"""

import hashlib

VARIATION_SELECTOR = "fe0f"
_SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
_JOINER, _FEMALE, _MALE, _RIGHTWARDS = "200d", "2640", "2642", "27a1"
EMOJI_MARKS = frozenset(
    [VARIATION_SELECTOR, *_SKIN_TONES, _JOINER, _FEMALE, _MALE, _RIGHTWARDS, "fe0e"]
)
"""Code points that vary an emoji and leave what it shows."""

_SAME_PERSON = {
    "1f468": "1f9d1",  # man, woman: adult
    "1f469": "1f9d1",
    "1f466": "1f9d2",  # boy, girl: child
    "1f467": "1f9d2",
    "1f474": "1f9d3",  # old man, old woman: older adult
    "1f475": "1f9d3",
    "1f478": "1f934",  # princess: prince
    "1fac5": "1f934",  # person with crown
    "1f483": "1f57a",  # woman dancing: man dancing
    "1f936": "1f385",  # Mrs. Claus: Santa Claus
    "1f9d1-1f384": "1f385",  # Mx Claus
    "1f46c": "1f46b",  # two men, two women, two people holding hands
    "1f46d": "1f46b",
    "1f9d1-1f91d-1f9d1": "1f46b",
    "1f9d1-2764-1f48b-1f9d1": "1f48f",  # kiss
    "1f9d1-2764-1f9d1": "1f491",  # couple with heart
    "1faf1-1faf2": "1f91d",  # handshake
    "1f9d1-1f9d2": "1f46a",  # families
    "1f9d1-1f9d2-1f9d2": "1f46a",
    "1f9d1-1f9d1-1f9d2": "1f46a",
    "1f9d1-1f9d1-1f9d2-1f9d2": "1f46a",
}
"""Code points that differ from another concept's in gender or number, or in writing, only."""

STYLES = "alt duotone fill filled outline outlined rounded simple variant"
STATES = "closed crossed disabled off on open slash slashed"
DIRECTIONS = (
    "back backward bottom down east forward horizontal left north right south top up vertical west"
)
BADGES = (
    "add alert bolt cancel check checked clock cog discount dollar edit exclamation heart lock "
    "minus pause pencil pin play plus question refresh remove search settings share star x"
)
"""Signs that icon sets draw small, in the corner of another icon."""
ICON_VARIATIONS = frozenset(f"{STYLES} {STATES} {DIRECTIONS} {BADGES}".split())


def emoji_concept(code_points: str) -> str:
    """The concept of an emoji given as '1f44b-1f3fb': the same in all tones, genders, directions.

    All vendors' pictures of it share the concept.
    """
    points = code_points.split("-")
    kept = [_SAME_PERSON.get(p, p) for p in points if p not in EMOJI_MARKS] or points
    joined = "-".join(kept)
    return f"emoji:{_SAME_PERSON.get(joined, joined)}"


def icon_concept(name: str) -> str:
    """The concept of an icon named as 'bell-plus-outline': the same in all its variants.

    Variants are styles, states, directions, numbers and the signs in a corner. The first word is
    no variant: 'check-circle' is a check. Icons of one name in several sets share the concept.
    """
    first, *rest = name.split("-")
    kept = {word for word in rest if word not in ICON_VARIATIONS and not word.isdigit()}
    return f"icon:{'-'.join([first, *sorted(kept - {first})])}"


def is_held_out(concept: str, val_share: float) -> bool:
    """Whether a concept is for validation: a hash says so, whatever other concepts there are."""
    return int.from_bytes(by_hash(concept)[:8], "big") < val_share * 2**64


def by_hash(text: str) -> bytes:
    """A sort key that shuffles the same way every time."""
    return hashlib.sha256(text.encode()).digest()
