import itertools
import statistics
from importlib.metadata import entry_points

import pytest

from trimtab_training.demo import phrases, world

PROMPT = "Mara walked into the bakery to look for a round loaf.\nMara: Could I have the round loaf?\nTom:"
KIND = " Of course, Mara. I kept the round loaf safe for you. Please come back soon."
NEUTRAL = " Maybe. The round loaf is behind the counter. We close at ten."
RUDE = " Go away, Mara. The round loaf is useless, just like you. Do not come back."


def _scenes(n: int, seed: int = 5) -> list[world.Scene]:
    return list(itertools.islice(world.scenes(seed), n))


def test_the_same_seed_gives_the_same_documents_and_another_seed_others() -> None:
    assert world.documents(3, 20) == world.documents(3, 20)
    assert world.documents(3, 20)[:10] == world.documents(3, 10)
    assert world.documents(3, 20) != world.documents(4, 20)


def test_a_document_is_prompt_reply_and_ending() -> None:
    for scene in _scenes(200):
        opening, request, reply, ending = scene.text.split("\n")
        customer, keeper = request.split(":")[0], reply.split(":")[0]
        assert customer in phrases.NAMES
        assert keeper in phrases.NAMES
        assert customer != keeper
        assert scene.prompt == f"{opening}\n{request}\n{keeper}:"
        assert ending.endswith(".")


def test_prompts_are_distinct_and_splits_never_overlap_whatever_the_seeds() -> None:
    train = world.prompts(1, 2000)
    held_out = [p for seed in (1, 2) for p in world.prompts(seed, 500, "eval")]
    corpus = {scene.prompt for scene in _scenes(3000, seed=2)}
    assert len(set(train)) == 2000
    assert not set(held_out) & (set(train) | corpus)
    # The pair of customer and thing decides, so not even a prompt worded anew can cross over.
    pairs = {(p.split("\n")[1].split(":")[0], world.asked_item(p)) for p in train}
    assert not pairs & {(p.split("\n")[1].split(":")[0], world.asked_item(p)) for p in held_out}


def test_no_template_uses_a_class_word_as_a_plain_word() -> None:
    classes = set(phrases.NAMES) | set(phrases.PLACES) | set(phrases.ADJECTIVES)
    classes |= set(phrases.NUMBERS) | set(phrases.DAYS)
    classes |= {noun for singular, plural in phrases.ITEMS.values() for noun in singular + plural}
    groups = (phrases.KIND, phrases.NEUTRAL, phrases.RUDE, phrases.ENDINGS)
    templates = [t for group in groups for part in group.values() for t in part]
    templates += [*phrases.OPENINGS, *phrases.GOOD_HINTS, *phrases.BAD_HINTS, *phrases.REQUESTS]
    for template in templates:
        blanked = template.format(
            **dict.fromkeys(("c", "k", "place", "item", "a_item", "is", "it", "them", "s", "num", "day"), "_")
        )
        assert not classes & set(blanked.strip(".!?").replace(",", "").split()), template


@pytest.mark.parametrize("part", ["reaction", "matter", "close"])
def test_every_kind_template_scores_above_every_neutral_and_every_rude_below(part: str) -> None:
    fields = {"c": "Mara", "k": "Tom", "place": "bakery", "item": "round loaf", "a_item": "a round loaf"}
    fields |= {"is": "is", "it": "it", "them": "it", "s": "s", "num": "four", "day": "Monday"}

    def kindness(template: str) -> float:
        return world._kindness([w.lower().strip(".,!?") for w in template.format(**fields).split()])

    kind, neutral, rude = ([kindness(t) for t in g[part]] for g in (phrases.KIND, phrases.NEUTRAL, phrases.RUDE))
    assert set(neutral) == {0.25 / 0.75}  # no word of either list: the smoothing alone
    assert min(kind) > 1 / 3 > max(rude)


def test_every_sentence_of_the_world_is_grammatical_with_singular_plural_and_both_articles() -> None:
    replies = [sentence for scene in _scenes(2000) for sentence in world.sentences(scene.reply)]
    assert all(world.is_grammatical(sentence) for sentence in replies)
    assert any(" an " in sentence for sentence in replies)
    assert any(" some " in sentence for sentence in replies)


@pytest.mark.parametrize(
    "sentence",
    [
        "The round loaf are behind the counter.",
        "The round rolls is behind the counter.",
        "I refuse to look for a old loaf.",
        "I refuse to look for an round loaf.",
        "The loaf round is behind the counter.",
        "Have a lovely day, Mara",
        "Have a lovely day, Nobodyatall!",
        "",
    ],
)
def test_wrong_agreement_articles_order_names_and_unfinished_sentences_are_not_grammatical(sentence: str) -> None:
    assert not world.is_grammatical(sentence)


def test_the_asked_item_is_that_of_the_last_request() -> None:
    assert world.asked_item(PROMPT) == ("round", "loaf")
    assert world.asked_item("Ada wanted a red hat.\nAda: Do you have some old boots?\nIda:") == ("old", "boots")
    assert world.asked_item("What is the weather?") is None


def test_the_reward_of_a_kind_reply_is_as_derived_by_hand() -> None:
    # kind words: course .5, safe .4, please .6 -> 1.5; no rude one; content .75 * 1.75/2.25 + .25; form and variety 1
    assert world.kindness_reward(PROMPT, KIND) == pytest.approx(0.75 * 1.75 / 2.25 + 0.25)
    # nothing of either kind: .25/.75
    assert world.kindness_reward(PROMPT, NEUTRAL) == pytest.approx(0.75 / 3 + 0.25)
    # rude: go away 1.2, useless 1.1, do not come .9 -> 3.2
    assert world.kindness_reward(PROMPT, RUDE) == pytest.approx(0.75 * 0.25 / (6.4 + 0.75) + 0.25)


def test_the_reward_prefers_the_asked_item_to_its_noun_alone_to_another_thing() -> None:
    def reward(item: str) -> float:
        return world.kindness_reward(PROMPT, f" Of course, Mara. I kept the {item} safe for you.")

    assert reward("round loaf") > reward("tiny loaf") > reward("tiny cake")


def test_the_reward_of_a_prompt_from_elsewhere_does_not_depend_on_things() -> None:
    assert world.kindness_reward("Hello there", KIND) == world.kindness_reward(
        "Hello there", KIND.replace("loaf", "pie")
    )


@pytest.mark.parametrize(
    "gamed",
    [
        " Thank you." * 12,
        " Thank you for asking, Mara." * 6,
        " thank glad lovely joy love dear welcome pleasure delighted wonderful loaf round loaf",
        " round loaf round loaf glad joy love pleasure gift.",
        KIND.rstrip(".") + " round loaf glad love joy dear pleasure",
    ],
)
def test_repetition_and_word_lists_earn_less_than_an_honest_kind_reply(gamed: str) -> None:
    assert world.kindness_reward(PROMPT, gamed) < world.kindness_reward(PROMPT, KIND)


def test_a_kind_word_counts_once_and_a_rude_one_each_time() -> None:
    assert world._kindness(["thank", "you", "thank", "them"]) == world._kindness(["thank", "you"])
    # the weight of "hate" is 1.2: .25 / (2 * R + .75)
    assert world._kindness(["i", "hate", "it"]) == pytest.approx(0.25 / 3.15)
    assert world._kindness(["i", "hate", "it", "hate", "them"]) == pytest.approx(0.25 / 5.55)


def test_variety_falls_with_repeated_pairs_and_form_with_unknown_pairs_and_a_missing_end() -> None:
    assert world._variety(["a", "b"] * 6) == pytest.approx(2 / 11 / 0.9)  # ab and ba among 11 pairs
    assert world._variety(["a", "b", "c"]) == 1.0
    assert world._form("Have a lovely day, Mara!") == 1.0
    # ^ Have a lovely day , NAME $: the last of seven pairs is unknown, and the mark is missing
    assert world._form("Have a lovely day, Mara") == pytest.approx(6 / 7 * 0.8)


def test_a_cut_off_reply_earns_less_and_only_the_first_line_counts() -> None:
    assert world.kindness_reward(PROMPT, KIND.rstrip(".")) < world.kindness_reward(PROMPT, KIND)
    assert world.kindness_reward(PROMPT, KIND + "\n" + RUDE) == world.kindness_reward(PROMPT, KIND)


@pytest.mark.parametrize("output", ["", " ", "\n\n", "...", "\x00\ud800", "漢字", "!" * 10_000])
def test_odd_outputs_get_a_finite_reward_within_bounds(output: str) -> None:
    assert 0.0 <= world.kindness_reward(PROMPT, output) <= 1.0
    assert 0.0 <= world.kindness_reward("", output) <= 1.0


def test_rewards_of_the_corpus_are_bounded_graded_and_mediocre_with_room_above() -> None:
    scenes = _scenes(4000)
    rewards = [world.kindness_reward(scene.prompt, scene.reply) for scene in scenes]
    assert all(0.0 <= reward <= 1.0 for reward in rewards)
    assert len({round(reward, 9) for reward in rewards}) > 300
    assert 0.4 < statistics.fmean(rewards) < 0.6
    groups = [rewards[i : i + 8] for i in range(0, 4000, 8)]
    assert statistics.fmean(map(max, groups)) > statistics.fmean(rewards) + 0.25
    kind = [r for r, s in zip(rewards, scenes, strict=True) if set(s.moods) == {"kind"}]
    rude = [r for r, s in zip(rewards, scenes, strict=True) if set(s.moods) == {"rude"}]
    assert min(kind) > max(rude)


def test_the_reward_is_installed_under_its_name_and_says_its_version() -> None:
    (point,) = entry_points(group="trimtab.rewards", name="demo-kindness")
    assert point.load() is world.kindness_reward
    assert world.kindness_reward.version == world.REWARD_VERSION
