"""Lines of Python that reports show for a saved model."""

from pathlib import Path

from hfllm.outputs.files import sees_pictures


def loading_lines(folder: str, task: str | None = None) -> list[str]:
    """Return the lines of Python that load the model in `folder` and its tokenizer, or its processor if it sees.

    Args:
        task: as PEFT names it, such as SEQ_CLS; by default that of a language model.
    """
    kinds = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
    kinds["QUESTION_ANS"] = "QuestionAnswering"
    words, reader = "CausalLM", ("tokenizer", "AutoTokenizer")
    if sees_pictures(Path(folder)):
        words, reader = "ImageTextToText", ("processor", "AutoProcessor")
    auto_class = f"AutoModelFor{kinds.get(task or '', words)}"
    # transformers supports bitsandbytes without hfllm; our own scheme and family need hfllm imported.
    return [
        "import hfllm",
        f"from transformers import {auto_class}, {reader[1]}",
        f"model = {auto_class}.from_pretrained({folder!r})",
        f"{reader[0]} = {reader[1]}.from_pretrained({folder!r})",
    ]


def speculative_lines(model: str, draft: str) -> list[str]:
    """Return the lines of Python that decode a model speculatively.

    Args:
        model: its folder or Hub id.
        draft: the expression that makes the draft, such as `Int8Draft()`.
    """
    return [
        "import hfllm",
        f"from hfllm.generation.speculative import {draft.partition('(')[0]}, speculative_generate",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({model!r})",
        f"model = AutoModelForCausalLM.from_pretrained({model!r})",
        f"draft = {draft}",
        "output = speculative_generate(model, draft, **tokenizer('...', return_tensors='pt'), max_new_tokens=64)",
    ]
