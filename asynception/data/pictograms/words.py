"""Labels out of what authors wrote: tags, categories and names, as lower-case words."""

import re
import unicodedata
from collections.abc import Iterable, Mapping

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "alt am an and are as at be by can de do etc for from get go got has how if in into is it "
        "its let me my new no not of oh on or put re so st than that the their this to us variant "
        "via vs who with you your",
    )
)
"""Words that say nothing of a picture; `new`, `alt` and `variant` are marks of the packages."""

NOT_PLURALS = frozenset(
    re.findall(
        r"\w+",
        "aids arms aws axes briefs customs glasses goods gps https ios laos leaves means news "
        "pants sms",
    )
)
"""Words that would lose their meaning with their last letter."""

MIN_SINGULAR_LENGTH = 3


def split_words(texts: Iterable[str]) -> frozenset[str]:
    """Lower-case words of `texts` without accents, stop words, numbers and single letters."""
    text = unicodedata.normalize("NFKD", " ".join(texts))
    plain = "".join(c for c in text if not unicodedata.combining(c))
    words = re.findall(r"[^\W_]+", plain.lower().replace("'s", "").replace("’s", ""))
    return frozenset(w for w in words if len(w) > 1 and not w.isdigit() and w not in STOP_WORDS)


def singulars(vocabulary: Iterable[str]) -> Mapping[str, str]:
    """The singular of every plural in `vocabulary` whose singular is there as well.

    Authors differ in number: one's `arrow` is another's `arrows`. A word that is never used
    without its s, as `physics`, stays as it is.
    """
    known = frozenset(vocabulary)
    found = {}
    for word in known - NOT_PLURALS:
        singular = next((s for s in _possible_singulars(word) if s in known), None)
        if singular is not None:
            found[word] = singular
    return found


def _possible_singulars(word: str) -> list[str]:
    possible = []
    if word.endswith("s") and not word.endswith("ss"):
        possible.append(word[:-1])
    if word.endswith("ies"):
        possible.append(word[:-3] + "y")
    if word.endswith(("ches", "shes", "sses", "xes")):
        possible.append(word[:-2])
    return [s for s in possible if len(s) >= MIN_SINGULAR_LENGTH]
