"""Controls of questions about pictures: with another picture, the right answer is the one about that picture."""

from hfllm.data.images.files import image_key
from hfllm.data.world.pictures import answer_about, draw_examples
from hfllm.evaluation.pictures import Asked, is_right, shuffled_questions
from hfllm.stages.vision import build as vision_build
from hfllm.stages.vision.build import SEEN, SHUFFLED


def drawn(count):
    asked = []
    for example in draw_examples(3, count, part="evaluation"):
        (question,) = example.questions
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        asked.append(Asked(prompt, [example.picture], question.answer, question.family, scene=example.scene))
    return asked


def test_the_truth_about_other_pictures_is_that_of_what_they_show(monkeypatch):
    """A model that reads whatever it is shown without a fault is right as often as `other_truth` says."""
    questions = drawn(60)
    shuffled = shuffled_questions(questions)
    scenes = {image_key(each.images[0]): each.scene for each in questions}

    def reads(model, processor, prompts, images, max_new_tokens):
        texts = [prompt[-1]["content"][-1]["text"] for prompt in prompts]
        return [answer_about(scenes[image_key(shown[0])], text) for shown, text in zip(images, texts, strict=True)]

    monkeypatch.setattr(vision_build, "answer_pictures", reads)
    metrics = vision_build.judge_answers(None, None, {SEEN: questions, SHUFFLED: shuffled}).metrics
    by_hand = [
        is_right(answer_about(scenes[image_key(other.images[0])], other.question), own.answer)
        for own, other in zip(questions, shuffled, strict=True)
    ]
    assert metrics["seen_right"] == 1
    assert metrics["other_truth_right"] == metrics["shuffled_right"] == sum(by_hand) / len(by_hand)
    assert 0 < metrics["other_truth_right"] < 0.6, "pictures of others do not answer these questions"
