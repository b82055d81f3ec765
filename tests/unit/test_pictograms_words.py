"""Words, concepts and the split of the pictogram set."""

import hypothesis.strategies as st
from hypothesis import given

from asynception.data.pictograms.building import choose_labels
from asynception.data.pictograms.concepts import emoji_concept, icon_concept, is_held_out
from asynception.data.pictograms.emoji_sets import emoji_words, without_selectors
from asynception.data.pictograms.icon_sets import phosphor_words
from asynception.data.pictograms.words import NOT_PLURALS, STOP_WORDS, singulars, split_words

MARKS = ["fe0f", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "200d", "2640", "2642", "27a1"]
VARIATIONS = ["outline", "filled", "fill", "duotone", "off", "slash", "variant", "left", "down"]
VARIATIONS += ["horizontal", "plus", "minus", "check", "x", "alert", "cog", "lock", "search"]
POINTS = st.sampled_from(["1f44b", "1f9d1", "1f680", "2764", "1f468", "1f1f3", "0023", "20e3"])
EMOJI = st.lists(POINTS, min_size=1, max_size=4)
NOUNS = st.sampled_from(["bell", "arrow", "file", "cloud", "star", "check", "off", "traffic"])


@given(st.data(), EMOJI, st.lists(st.sampled_from(MARKS), max_size=4))
def test_tones_genders_directions_and_selectors_leave_an_emoji_its_concept(data, points, marks):
    varied = list(points)
    for mark in marks:
        varied.insert(data.draw(st.integers(0, len(varied))), mark)
    assert emoji_concept("-".join(varied)) == emoji_concept("-".join(points))


@given(st.data(), st.lists(NOUNS, min_size=1, max_size=4), st.lists(st.integers(0, 99), max_size=2))
def test_styles_states_directions_badges_and_numbers_leave_an_icon_its_concept(
    data, nouns, numbers
):
    variations = data.draw(st.lists(st.sampled_from(VARIATIONS), max_size=4))
    name = list(nouns)
    for word in [*variations, *map(str, numbers)]:
        name.insert(data.draw(st.integers(1, len(name))), word)
    assert icon_concept("-".join(name)) == icon_concept("-".join(nouns))


def test_other_things_are_other_concepts():
    names = ["bell", "check", "off", "heart", "check-list", "bell-ring", "a-b"]
    assert len({icon_concept(name) for name in names}) == len(names)
    emoji = ["1f44b", "1f44c", "1f468", "1f466", "1f468-200d-1f680", "1f3fb", "1f3fc"]
    assert len({emoji_concept(one) for one in emoji}) == len(emoji)
    assert emoji_concept("1f469-1f3fe-200d-1f680") == emoji_concept("1f9d1-200d-1f680")


@given(st.text(), st.floats(0.01, 0.98), st.floats(0.001, 0.02))
def test_a_larger_share_keeps_what_was_held_out(concept, share, more):
    assert is_held_out(concept, share) <= is_held_out(concept, share + more)


def test_the_share_of_concepts_that_is_held_out_is_the_one_asked_for():
    for share in (0.05, 0.1, 0.5):
        held_out = sum(is_held_out(f"icon:{i}", share) for i in range(20_000))
        assert abs(held_out / 20_000 - share) < 0.01


@given(st.lists(st.text(max_size=20), max_size=5))
def test_words_are_lower_case_and_neither_numbers_nor_letters_nor_stop_words(texts):
    for word in split_words(texts):
        assert word == word.lower()
        assert len(word) > 1
        assert not word.isdigit()
        assert word.isalnum()
        assert word not in STOP_WORDS


def test_names_tags_and_categories_fall_into_words():
    texts = ["ab-test", "Files / Folders", "Café au lait", "24", "a", "person's hat"]
    assert split_words(texts) == {
        "ab",
        "test",
        "files",
        "folders",
        "cafe",
        "au",
        "lait",
        "person",
        "hat",
    }


WORDS = ["arrow", "arrows", "box", "boxes", "physics", "news", "new", "gas", "ga", "city", "cities"]


@given(st.sets(st.sampled_from(WORDS)))
def test_a_plural_becomes_its_singular_only_where_the_singular_is_known(vocabulary):
    found = singulars(vocabulary)
    pairs = {"arrows": "arrow", "boxes": "box", "cities": "city"}
    assert found == {k: v for k, v in pairs.items() if {k, v} <= vocabulary}
    assert not set(found) & NOT_PLURALS


@given(st.lists(st.frozensets(st.sampled_from("abcde"))), st.integers(1, 4))
def test_labels_are_the_words_that_enough_sets_hold_by_frequency_then_name(word_sets, min_count):
    labels = choose_labels(word_sets, min_count)
    counts = {word: sum(word in words for words in word_sets) for word in "abcde"}
    assert set(labels) == {word for word, count in counts.items() if count >= min_count}
    assert labels == sorted(labels, key=lambda word: (-counts[word], word))


def test_an_emoji_has_the_words_of_both_lists_and_a_tone_its_own_name_as_well():
    skins = [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}]
    wave = {"label": "waving hand", "hexcode": "1F44B", "tags": ["bye"], "group": 1, "subgroup": 3}
    keycap = {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "tags": ["hash"]}
    groups = {"groups": {"1": "people-body"}, "subgroups": {"3": "hand-fingers-open"}}
    words = emoji_words(
        [{**wave, "skins": skins}, keycap], groups, {"👋": ["hello"], "#️⃣": ["key_cap"]}
    )
    shared = {"waving", "hand", "bye", "hello", "people", "body", "fingers", "open"}
    assert words["1f44b"] == shared
    assert words["1f44b-1f3ff"] == shared | {"dark", "skin", "tone"}
    assert words[without_selectors("23-fe0f-20e3")] == {"keycap", "hash", "key", "cap"}


def test_phosphors_declarations_are_read_with_any_line_ends():
    types = 'enum IconCategory {\n    MAP = "maps & travel",\n    HEALTH = "health"\n}\n'
    icons = """export declare const icons: readonly [{
    readonly name: "anchor";
    readonly pascal_name: "Anchor";
    readonly categories: readonly [IconCategory.MAP];
    readonly tags: readonly ["*new*", "*updated*", "boat", "sea side"];
}, {
    readonly name: "asclepius";
    readonly pascal_name: "Asclepius";
    readonly alias: {
        readonly name: "caduceus";
        readonly pascal_name: "Caduceus";
    };
    readonly categories: readonly [IconCategory.HEALTH];
    readonly tags: readonly [];
}];"""
    expected = {
        "anchor": {"anchor", "boat", "sea", "side", "maps", "travel"},
        "asclepius": {"asclepius", "caduceus", "health"},
    }
    for line_end in ("\n", "\r\n"):
        texts = [text.replace("\n", line_end) for text in (types, icons)]
        assert phosphor_words(*texts) == expected
