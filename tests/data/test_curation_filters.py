"""What each filter keeps and drops, and why."""

import random
import re
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from datatrove.data import Document

from hfllm.data.curation.duplicates import DecontaminationFilter, common_words, evaluation_texts, normalized
from hfllm.data.curation.filters import (
    C4QualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    LengthFilter,
    SpamFilter,
    ToxicityFilter,
    fit,
    read_labeled,
    read_phrases,
    repeated_ngram_share,
    top_ngram_share,
    unwrapped,
)
from hfllm.data.curation.text import word_hashes, words_of
from hfllm.errors import InputError

PROSE = (
    "The river had been low all summer, and the people of the village walked across it to the market. "
    "On the far bank stood a mill that nobody had used since the war, with its wheel still hanging in the air. "
    "Children said that it turned at night, when the moon was full, though none of them had ever seen it. "
    "My grandmother laughed at this and told us that she had once worked there, grinding barley for the brewers.\n"
    "Later that year the rain came back. We had to take the long road over the bridge, and nobody spoke of the mill."
)


def verdict(step, text):
    """`True`, or the reason."""
    result = step.filter(Document(text, "id"))
    return result if result is True else result[1]


def cut_off(text, every):
    """The sentences of a text as lines, of which exactly one in `every` ends in dots."""
    lines = (text.replace("\n", " ") * 4).split(". ")
    lines = lines[: len(lines) // every * every]
    return "\n".join(line + ("..." if place % every == 0 else ".") for place, line in enumerate(lines))


def test_prose_passes_every_rule():
    for step in (
        *(LengthFilter(), GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(), LanguageFilter()),
        *(SpamFilter(), ToxicityFilter(["anything else"])),
    ):
        assert verdict(step, PROSE) is True, step.name


def test_length():
    assert verdict(LengthFilter(min_words=3), "one two three") is True
    assert verdict(LengthFilter(min_words=3), "one two, - ...") == "too_short"
    assert verdict(LengthFilter(), "token") == "too_short"


def test_words_of_scripts_without_spaces_are_characters():
    assert words_of("don't 1,000.5 x") == ("don't", "1,000.5", "x")
    assert words_of("你好 ok 世界") == ("你", "好", "ok", "世", "界")
    assert np.array_equal(word_hashes("Don’t pay 1,000"), word_hashes("don't PAY 1000"))
    assert not np.array_equal(word_hashes("a b"), word_hashes("b a"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("too few words of it", "too_few_words"),
        (PROSE * 3, True),
        (" ".join(["the", "of"] + ["a"] * 60), "mean_word_length"),
        (" ".join(["the", "of"] + ["incomprehensibilities"] * 60), "mean_word_length"),
        (PROSE + " #" * 12, "symbols"),
        (PROSE + " well..." * 14, "symbols"),
        ("\n".join(f"- {sentence}" for sentence in PROSE.replace("\n", " ").split(". ")), "bullet_lines"),
        (PROSE.replace(". ", "...\n") + "...", "ellipsis_lines"),
        # A third of the lines are cut off, and a quarter.
        (cut_off(PROSE, 3), "ellipsis_lines"),
        (cut_off(PROSE, 4), True),
        (PROSE + " 123 456" * 20, "words_without_letters"),
        (" ".join(f"{word}ish" for word in words_of(PROSE)), "stop_words"),
    ],
)
def test_gopher_quality(text, reason):
    assert verdict(GopherQualityFilter(max_words=500), text) == reason


def test_gopher_quality_has_an_upper_length():
    assert verdict(GopherQualityFilter(max_words=100), PROSE * 3) == "too_many_words"


TOKENIZED = (
    "The mill , built in 1,204 , was a well @-@ known one ; it ground 2 @,@ 300 sacks a year ( or 6 @.@ 3 a day ) , "
    "and its owner , <unk> of <unk> , sold flour \" to all who asked \" . He 's said to have left it to the town 's "
    "poor . The wheel , which was rebuilt in 1953 , 1977 and 2001 , still turns , though nobody now <unk> there ; it "
    "does n't pay . = = Later use = = In 1990 , the mill became a school , then an inn , then a school again ."
)


def test_punctuation_that_a_tokenizer_split_off_is_no_word_without_letters():
    tokens = TOKENIZED.split()
    assert sum(any(map(str.isalpha, token)) for token in tokens) < 0.8 * len(tokens)  # as Gopher counts
    assert verdict(GopherQualityFilter(), TOKENIZED) is True
    # Numbers still count, and so do the marks of tables and lists of prices.
    for part in ("123 4.5 ", "| ", "$5.00 , 6.00 ; ", "-> * "):
        assert verdict(GopherQualityFilter(), PROSE + " " + part * 40) == "words_without_letters", part


@pytest.mark.parametrize("mark", ["* * *", "***", "-----", "* &nbsp; *".replace("&nbsp;", "\xa0"), "§", "— — —"])
def test_breaks_between_the_scenes_of_a_book_are_no_repeated_paragraphs(mark):
    scenes = [f"{sentence.strip()}." for sentence in PROSE.replace("\n", " ").split(".") if sentence.strip()]
    for between in ("\n\n", "\n"):
        assert verdict(GopherRepetitionFilter(), f"{between}{mark}{between}".join(scenes)) is True
    # Words between them still are.
    assert verdict(GopherRepetitionFilter(), "\n\nRead more\n\n".join(scenes)) == "repeated_paragraphs"


def shares_by_counting(words, n):
    """Share of the top n-gram and of n-grams that repeat an earlier one, in the plain way."""
    grams = [tuple(words[index : index + n]) for index in range(len(words) - n + 1)]
    total, counts, seen, covered = sum(map(len, words)), Counter(grams), set(), set()
    for index, gram in enumerate(grams):
        if gram in seen:
            covered |= set(range(index, index + n))
        seen.add(gram)
    top = max(counts.values(), default=0)
    top_share = max((top * len("".join(gram)) for gram in counts if counts[gram] == top), default=0) / total
    return min(1, top_share) if top > 1 else 0, sum(len(words[index]) for index in covered) / total


@pytest.mark.parametrize("seed", range(5))
def test_ngram_shares_equal_those_of_plain_counting(seed):
    rng = random.Random(seed)
    words = [rng.choice(["red", "a", "house", "walks", "upon"][: seed + 2]) for _ in range(rng.randint(3, 80))]
    hashes, ends = word_hashes(" ".join(words)), np.cumsum([0, *map(len, words)])
    repeated = []
    for n in range(2, 11):
        top, again = shares_by_counting(words, n)
        assert top_ngram_share(hashes, ends, n) == pytest.approx(top)
        assert repeated_ngram_share(hashes, ends, n) == pytest.approx(again)
        repeated.append(again)
    # The filter stops at the first share that is low enough for all longer n-grams.
    assert repeated == sorted(repeated, reverse=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join(["Click here to go on."] * 3 + ["Something else."]), "repeated_lines"),
        ("\n\n".join(["A whole paragraph\nof two lines."] * 3), "repeated_paragraphs"),
        (PROSE + " buy now" * 40, "top_2gram"),
        (PROSE + " " + " ".join(PROSE.split()[:40]), "repeated_5grams"),
        ("said twice, said twice", True),
    ],
)
def test_gopher_repetition(text, reason):
    assert verdict(GopherRepetitionFilter(), text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE + "\nLorem ipsum dolor sit amet.", "lorem_ipsum"),
        (PROSE + "\nint main() { return 0; }", "curly_bracket"),
        ("Home\nAbout us\nContact\nOne sentence is all there is here.", "too_few_sentences"),
    ],
)
def test_c4_drops_pages(text, reason):
    assert verdict(C4QualityFilter(), text) == reason


def test_c4_removes_lines_and_keeps_the_rest():
    noise = ["Menu", "Too short.", "You must enable Javascript to see this page.", "We use cookies on this site now."]
    page = Document("\n".join([noise[0], *PROSE.split("\n"), *noise[1:], "This line goes on and on and ..."]), "id")
    assert C4QualityFilter().filter(page) is True
    assert page.text == PROSE


def test_c4_cuts_the_tail_of_a_line_that_is_an_article():
    article = " ".join(PROSE.split())
    page = Document(f"{article} See also: Mills, Rivers", "id")
    assert C4QualityFilter().filter(page) is True
    assert page.text == article


def test_c4_takes_the_paragraphs_of_wrapped_text_for_its_lines():
    book = (
        "The river had been low all summer, and the people of the village walked\n"
        "across it to the market, where they sold what little they had grown and\n"
        "bought thread.\n\nNobody spoke of the mill, which had not been used since the war came to\n"
        "that valley. It was still there. The wheel hung in the air."
    )
    assert len(unwrapped(book)) == 2
    page = Document(book, "id")
    assert C4QualityFilter().filter(page) is True
    assert page.text == book


def test_language():
    step = LanguageFilter(["en"])
    assert verdict(step, "Alle Menschen sind frei und gleich an Würde und Rechten geboren.") == "is_de"
    assert verdict(step, "Tous les êtres humains naissent libres et égaux en dignité et en droits.") == "is_fr"
    assert verdict(LanguageFilter(min_score=1.01), PROSE) == "uncertain"
    assert verdict(LanguageFilter(["de", "fr"]), "Alle Menschen sind frei und gleich an Würde geboren.") is True
    assert verdict(step, PROSE.upper()) is True
    # A foreign title does not decide about a long text.
    assert verdict(step, "Der Fluss und die alte Mühle\n" + PROSE) is True


def test_spam():
    spam = "WINNER!! You have won a £1000 prize. Call 09061701461 now to claim, or txt STOP to 80086."
    assert verdict(SpamFilter(), spam) == "spam"
    assert verdict(SpamFilter(max_score=1.0), spam) is True
    assert verdict(SpamFilter(), "ok i'll call you later when i get home, what do you want for dinner?") is True
    # One such word in a long text is no advertisement.
    assert verdict(SpamFilter(), PROSE + " She won a prize and was free to call us.") is True


WORD_PROBLEMS = (
    "Mira sells 24 jars of honey at the market for $7 each and pays $18 for her stall every week. How much "
    "money does she "
    "make in a week? She takes 24 * 7 = $168. After the stall she is left with 168 - 18 = $150. The answer is 150.",
    "A winter coat costs $120 and is on sale at a discount of 25%. Ali has saved $80. How many dollars does he "
    "need to save "
    "to buy the coat? The discount is 120 * .25 = $30. The coat costs 120 - 30 = $90. He needs 90 - 80 = $10.",
    "A phone company charges $15 for the first 100 minutes and $2 for every 10 minutes more. How much did Jo "
    "pay for 160 "
    "minutes? 160 - 100 = 60 minutes cost 6 * 2 = $12. Jo paid 15 + 12 = $27.",
    "Lena saved $600 for her new camera. She spent half of it on the camera and then gave $100 to her school. "
    "How much "
    "cash is left? The camera cost 600 / 2 = $300. She has 600 - 300 - 100 = $200 left. #### 200",
    "At the movies 4 tickets cost $36 and each customer gets a free drink worth $3. What is the cost of one "
    "ticket without "
    "the drink? One ticket costs 36 / 4 = $9. Without the drink it costs 9 - 3 = $6.",
)
ADVERTISEMENTS = (
    "Congratulations! Your mobile number has won a cash prize of £5000. To claim call 09058094455 now, 150ppm, "
    "18 only.",
    "FREE entry in our weekly draw! Text WIN to 80085 for your chance at a holiday. Txt STOP to end. Cost 150p/msg.",
    "URGENT! We tried to contact you: your award of £1500 is waiting. Claim it now on www.prizes.example.com or "
    "08712300220.",
)


def test_prices_and_prizes_are_no_spam_where_nothing_is_sold():
    for text in WORD_PROBLEMS:
        assert verdict(SpamFilter(), text) is True, text
    for text in ADVERTISEMENTS:
        assert verdict(SpamFilter(), text) == "spam", text
    # Nor does a story around it hide an advertisement of the same length.
    assert verdict(SpamFilter(), f"{WORD_PROBLEMS[0]} {' '.join(ADVERTISEMENTS)}") == "spam"


def test_spam_weights_can_be_fitted_to_other_data(tmp_path):
    rows = [(f"the camera and the video of day {day}", "spam") for day in range(20)]
    rows += [(f"winner of a free prize on day {day}", "ham") for day in range(20)]
    path = tmp_path / "mine.tsv"
    path.write_text("Label\tSMS\n" + "\n".join(f"{label}\t{text}" for text, label in rows))
    model = fit(*read_labeled(str(path)))
    assert model.score("a video camera") > 0.5 > model.score("a free prize")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "x", "accepted are .jsonl, .csv and .tsv"),
        ("a.tsv", "label\ttext\nmaybe\thello\n", "label 'maybe'"),
        ("a.csv", "label,text\nham,hello\n", "needs both spam and ham"),
        ("a.jsonl", "{", "a.jsonl"),
    ],
)
def test_bad_spam_files(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="--spam_train_file") as error:
        read_labeled(str(tmp_path / name))
    assert complaint in str(error.value)


def test_toxic_words_match_whole_words_and_phrases(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# mine\nGrump\nold goat\n\n")
    step = ToxicityFilter(read_phrases([str(path)]))
    assert verdict(step, "You GRUMP!") == "toxic_words"
    assert verdict(step, "that old\ngoat again") == "toxic_words"
    assert verdict(step, "grumpy old people and a goat") is True
    assert verdict(ToxicityFilter(["grump"], max_matches=1), "a grump") is True
    assert verdict(ToxicityFilter(["grump"], max_matches=1), "a grump, a grump") == "toxic_words"
    path.write_text("\n--\n")
    for file in (path, tmp_path / "none.txt"):
        with pytest.raises(InputError, match="--toxic_words"):
            read_phrases([str(file)])


QUESTION = "Natalia sold clips to 48 of her friends in April and then she sold half as many clips in May"
WORDS = QUESTION.split()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{PROSE} {' '.join(WORDS)} {PROSE}", "contaminated"),
        (f"{PROSE} {' '.join(WORDS[2:15])} {PROSE}", "contaminated"),
        (f"{PROSE} {' '.join(WORDS[2:14])} {PROSE}", True),
        (PROSE + "\nNATALIA, sold: clips (to) 48 of\nher friends; in april - and THEN she sold", "contaminated"),
        ("Is it true that cats like to sleep all day?", "contaminated"),
        ("Is it true that cats like to sleep?", True),
        ("What is love?", True),
    ],
)
def test_decontamination_finds_thirteen_words_in_a_row(text, reason):
    tests = [" ".join(WORDS), "True that cats like to sleep all day?", "What is love?"]
    assert verdict(DecontaminationFilter(tests), text) == reason


# Written for this test, in the manner of word problems.
PROBLEMS = [
    "A bakery on the corner bakes 14 trays of rolls each morning, and every tray holds 24 of them. By noon the "
    "baker has sold three quarters of the rolls, and in the afternoon she gives 20 to a school nearby. How many "
    "rolls are left in the shop when she locks its door in the evening?",
    "Tomas wants to paint a fence that is 36 meters long and 2 meters high. One can of paint covers 9 square "
    "meters and costs 11 dollars, but the store gives him the fifth can of every five for free. How much money "
    "does Tomas spend if he paints only the side which faces the street?",
    "Three sisters collect shells at the beach during a week of holidays. The oldest finds 17 on each of the "
    "first four days, the middle one finds twice as many as the youngest, and together they carry home 158 shells "
    "in a bucket. How many of them were found by the youngest sister?",
    "A train leaves the harbor at nine with 212 passengers in its six cars. At the first stop 38 of them get off "
    "and 55 get on, and at the second stop half of those who are still on board change to a bus. How many people "
    "ride on to the last station in the mountains?",
]
OTHERS = [
    *("river", "window", "under", "seldom", "bright", "carry", "fourteen", "loud"),
    *("paper", "often", "wheel", "soft", "garden", "twelve", "answer", "over"),
]
CYRILLIC = str.maketrans("aceopxyijsABCEHKMOPTXYIJS", "асеорхуіјѕАВСЕНКМОРТХУІЈЅ")


def every(step, change):
    def changed(text, first):
        parts = text.split()
        for index in range(first % step, len(parts), step):
            parts[index] = change(parts[index], OTHERS[index % len(OTHERS)])
        return " ".join(parts)

    return changed


@pytest.mark.parametrize(
    "change",
    [
        every(16, lambda word, other: other),
        every(10, lambda word, other: other),
        every(10, lambda word, other: ""),
        every(10, lambda word, other: f"{word} {other}"),
        lambda text, first: text.translate(CYRILLIC),
        lambda text, first: text.translate(str.maketrans("aeiovtx", "αειοντχ")),
        # A few letters, so that each word mixes alphabets.
        lambda text, first: re.sub("[eo]", lambda found: found[0].translate(CYRILLIC), text),
        lambda text, first: re.sub("[aeiou]", "\\g<0>\u0301", text),
        lambda text, first: text.replace("e", "e\u2063\u034f").replace("t", "\u202et\ufe0f"),
        lambda text, first: every(10, lambda word, other: other)(text, first).translate(CYRILLIC),
    ],
)
def test_decontamination_finds_copies_with_changed_words_and_letters(change):
    step = DecontaminationFilter([QUESTION, *PROBLEMS])
    for problem in PROBLEMS:
        for first in range(10):
            assert verdict(step, f"{PROSE}\n\n{change(problem, first)}\n\n{PROSE}") == "contaminated"


def test_decontamination_keeps_what_shares_only_words_or_their_order():
    step = DecontaminationFilter([QUESTION, *PROBLEMS])
    assert verdict(step, f"{PROSE} {' '.join(OTHERS)}") is True
    for problem in PROBLEMS:
        parts = problem.split()
        # The same words in another order, spread over a page, and every third one changed.
        assert verdict(step, " ".join(parts[::-1])) is True
        assert (
            verdict(step, " ".join(f"{' '.join(parts[i : i + 5])} {PROSE}" for i in range(0, len(parts), 5))) is True
        )
        assert verdict(step, every(3, lambda word, other: other)(problem, 0)) is True
    # Of texts a little longer than thirteen words a fifth may be changed, and of shorter ones nothing.
    assert verdict(DecontaminationFilter([" ".join(WORDS[:14])]), " ".join([*WORDS[:6], "ten", *WORDS[7:14]])) == (
        "contaminated"
    )
    assert verdict(DecontaminationFilter([" ".join(WORDS[:12])]), " ".join([*WORDS[:6], "ten", *WORDS[7:12]])) is True


def test_common_words_is_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (rng.integers(0, 6, rng.integers(0, 40)).astype(np.uint32) for _ in range(2))
        longest = np.zeros((len(one) + 1, len(other) + 1), int)
        for i, word in enumerate(one):
            for j, another in enumerate(other):
                longest[i + 1, j + 1] = (
                    longest[i, j] + 1 if word == another else max(longest[i, j + 1], longest[i + 1, j])
                )
        assert common_words(one, other) == longest[-1, -1]


def test_letters_that_look_alike_leave_other_alphabets_as_they_are():
    russian = "Все люди рождаются свободными и равными в своём достоинстве и правах, они наделены разумом и совестью"
    greek = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα, είναι προικισμένοι"
    step = DecontaminationFilter([russian, greek])
    for text in (russian, russian.upper(), greek, greek.upper()):
        assert verdict(step, text) == "contaminated"
    assert (
        verdict(step, " ".join(russian.split()[::-1])) is True and verdict(step, " ".join(greek.split()[::-1])) is True
    )
    assert normalized("ПРИВЕТ") == normalized("привет") and normalized("ёж") == normalized("ЕЖ")


ANSWER = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May. Then she sold 24*2 = <<24*2=48>>48 and later 48+24 = "
    "<<48+24=72>>72 altogether, which is more than Jason's 1,000 friends don't have.\n#### 72"
)


@pytest.mark.parametrize(
    "copy",
    [
        ANSWER,
        re.sub("<<.*?>>", "", ANSWER),
        re.sub("<<.*?>>|####.*", "", ANSWER),
        ANSWER.upper(),
        ANSWER.replace("'s", " 's").replace("don't", "do n't").replace("1,000", "1 @,@ 000"),
        ANSWER.replace("'", "’").replace("fi", "ﬁ"),
        ANSWER.replace(" ", "\u200b ").replace("altogether", "alto\u00adgether"),
        ANSWER.replace(" ", "\n\n"),
        "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in ANSWER),
    ],
)
def test_decontamination_sees_through_what_copies_lack_or_have_besides(copy):
    """Each part of thirteen words or fewer is found, in both directions."""
    for known, document in ((ANSWER, copy), (copy, ANSWER)):
        step = DecontaminationFilter([known])
        assert verdict(step, f"{PROSE}\n\n{document}\n\n{PROSE}") == "contaminated"
        # All of it counts, and not only a run that has no such mark.
        assert np.array_equal(word_hashes(normalized(known)), word_hashes(normalized(document)))
    assert verdict(DecontaminationFilter([ANSWER]), PROSE) is True


def test_what_decontamination_leaves_as_it_is():
    for text in ("a << b", "#### Heading 72", "it is Jason s", "me@home.org", "rock 'n roll", "x <<\n>> y", PROSE):
        assert normalized(text) == text
    # A page of openings takes no longer than another.
    assert normalized("<<" * 100_000) == "<<" * 100_000


def test_evaluation_texts_are_all_strings_of_a_row_and_their_join(tmp_path):
    path = tmp_path / "tests.jsonl"
    path.write_text(
        '{"question": "one two three four five", "choices": ["six seven", {"label": "eight nine"}], "n": 3}'
    )
    texts = evaluation_texts([str(path)])
    assert "one two three four five six seven eight nine" in texts
    path.write_text('{"question": "too short"}')
    with pytest.raises(InputError, match="holds no text of 8 words"):
        evaluation_texts([str(path)])
