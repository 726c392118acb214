"""A plot of images in a grid with captions, and the Python to load a vision-language model."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.outputs.report import new_figure, save_figure

if TYPE_CHECKING:
    from PIL.Image import Image


# ---- picture grids ----


# Letters of a caption line, over all columns.
LINE = 132


@dataclass
class PictureGrid:
    """Images side by side: `captions` has the lines below them, `is_right` decides the color of the lines."""

    title: str
    pictures: "Sequence[Image]"
    captions: Sequence[str]
    is_right: Sequence[bool]
    columns: int = 6

    def draw(self, path: Path) -> bool:
        """Draw to a PNG; return False, and draw nothing, if there is no image."""
        if not self.pictures:
            return False
        rows = -(-len(self.pictures) // self.columns)
        figure, axes = new_figure(0.5 + 1.75 * rows)
        axes.axis("off")
        axes.set_title(self.title)
        for index, (picture, caption, is_right) in enumerate(
            zip(self.pictures, self.captions, self.is_right, strict=True)
        ):
            row, column = divmod(index, self.columns)
            inset = axes.inset_axes((column / self.columns, 1 - (row + 0.72) / rows, 0.9 / self.columns, 0.7 / rows))
            inset.imshow(picture, interpolation="nearest")
            inset.set_xticks([])
            inset.set_yticks([])
            lines = [textwrap.fill(line, LINE // self.columns) for line in caption.splitlines()]
            inset.set_xlabel("\n".join(lines), fontsize=6, color="tab:green" if is_right else "tab:red")
        save_figure(figure, path)
        return True


# ---- picture lines ----
# Lines of Python in a report about a vision-language model.


def picture_lines(folder: str, is_adapter: bool = False) -> list[str]:
    """Return the lines of Python to load the vision-language model in `folder` and ask it about an image.

    Args:
        is_adapter: whether the model is an adapter, to be loaded on its base.
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
