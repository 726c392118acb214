"""Responses that a text ends: they are cut there, and count as ended."""

from hfllm.generation.responses import sample_responses, sample_with_ends

PROMPTS = ["Go", "What is 1 plus 2?", "Where does the old owl sing?", "Hi"]


def test_responses_are_cut_at_the_first_text_that_ends_them(make_model, tokenizer):
    model = make_model()
    whole = [said[0] for said in sample_with_ends(model, tokenizer, PROMPTS, 24, do_sample=False, batch_size=3)]
    assert [[each.text] for each in whole] == sample_responses(model, tokenizer, PROMPTS, 24, do_sample=False)
    # What one of them says in its middle, and some others may not.
    stop = next(each.text[8:11] for each in whole if len(each.text) > 16 and each.text.isascii())
    cut = [
        said[0]
        for said in sample_with_ends(
            model, tokenizer, PROMPTS, 24, do_sample=False, batch_size=3, stop_strings=("zyxwv", stop)
        )
    ]
    assert any(stop in each.text for each in whole)
    for before, after in zip(whole, cut, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.has_ended == (before.has_ended or stop in before.text)
