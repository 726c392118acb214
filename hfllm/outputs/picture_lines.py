"""Lines of Python that a report shows for a model that sees."""


def picture_lines(folder: str, is_adapter: bool = False) -> list[str]:
    """Return the lines of Python that load the model in `folder`, which sees, and ask it about a picture.

    Args:
        is_adapter: whether that is an adapter, which is loaded on its base.
    """
    if is_adapter:
        return [
            "import hfllm",
            "from transformers import AutoModelForImageTextToText",
            f"model = AutoModelForImageTextToText.from_pretrained({folder!r})",
        ]
    return [
        "import hfllm",
        "from transformers import pipeline",
        f"look = pipeline('image-text-to-text', {folder!r})",
        "question = [{'type': 'image', 'url': 'picture.png'}, {'type': 'text', 'text': 'What color is the square?'}]",
        "print(look(text=[{'role': 'user', 'content': question}], max_new_tokens=8, return_full_text=False))",
    ]
