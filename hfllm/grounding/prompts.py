"""Put passages into prompts, and check that they leave room for an answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.data.passages import with_passages
from hfllm.data.rows import Message
from hfllm.errors import InputError
from hfllm.grounding.found import Found

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A text, or messages for a chat template.
Prompt = str | list[Message]


def last_question(messages: Sequence[Message]) -> int | None:
    """Return the place of the last message of the user, `None` without one."""
    return next((place for place in reversed(range(len(messages))) if messages[place]["role"] == "user"), None)


def question_of(prompt: Prompt) -> str:
    """Return what a prompt asks: the text, or the last message of the user.

    Raises:
        InputError: when there is none.
    """
    if isinstance(prompt, str):
        return prompt
    place = last_question(prompt)
    if place is None:
        raise InputError(f"a prompt without a message of the user: {str(prompt)[:80]!r}")
    return prompt[place]["content"]


def grounded(prompt: Prompt, texts: Sequence[str]) -> Prompt:
    """Return a prompt with passages before its last question; without passages the prompt. It is not changed itself.

    Args:
        prompt: a text, or messages of which one is the user's.
        texts: the passages, the best first.
    """
    if isinstance(prompt, str) or not texts:
        return with_passages(prompt, texts) if texts else prompt
    place = last_question(prompt)
    asked = {**prompt[place], "content": with_passages(prompt[place]["content"], texts)}
    return [*prompt[:place], asked, *prompt[place + 1 :]]


def as_prompt(question: Prompt, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
    """Return a question as a message of the user, where the tokenizer has a chat template."""
    if isinstance(question, str) and tokenizer.chat_template:
        return [{"role": "user", "content": question}]
    return question


def check_questions(questions: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse questions that are no texts and no conversations, or that the tokenizer cannot write.

    Raises:
        InputError: with the question's number.
    """
    if isinstance(questions, str):
        raise InputError(f"questions must be a list, got the text {questions!r:.60}")
    for number, question in enumerate(questions, 1):
        if not isinstance(question, (str, list)):
            raise InputError(f"question {number} must be a text or a list of messages, got {question!r:.60}")
        if not isinstance(question, str) and not tokenizer.chat_template:
            raise InputError(
                f"question {number} is a conversation, and the tokenizer has no chat template: give texts"
            )
        try:
            str(question_of(question)).encode()
        except UnicodeEncodeError:
            raise InputError(f"question {number} has half a character (a lone surrogate)") from None


def check_room(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Sequence[Sequence[int]],
    found: Sequence[Sequence[Found]],
    max_new_tokens: int,
    numbers: Sequence[int] | None = None,
) -> None:
    """Refuse prompts that leave no room for an answer in the model's context.

    Args:
        tokens: of each prompt.
        found: the passages of each.
        max_new_tokens: of an answer.
        numbers: of the questions, where one has several prompts.

    Raises:
        InputError: with the question's number, the longest of its passages and the context; or for an empty prompt.
    """
    from hfllm.models.loading.saved import max_length_of

    context = max_length_of(model.config)
    for number, prompt, passages in zip(numbers or range(1, len(tokens) + 1), tokens, found, strict=True):
        if not prompt:
            raise InputError(f"question {number} has no token")
        if context is None or len(prompt) + max_new_tokens <= context:
            continue
        said = f"question {number}: its prompt with {len(passages)} passage(s) has {len(prompt)} tokens"
        limit = f"with max_new_tokens={max_new_tokens} more than the model's context of {context}"
        if not passages:
            raise InputError(f"{said}, {limit}")
        longest = max((each.passage for each in passages), key=lambda passage: len(passage.text))
        size = len(tokenizer(longest.text, add_special_tokens=False)["input_ids"])
        raise InputError(
            f"{said}, {limit} ({longest.source or 'the longest passage'} has {size}): take a smaller top_k, or cut "
            "passages to fewer max_tokens"
        )
