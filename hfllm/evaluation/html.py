"""Prompts and answers as HTML for people who judge them: every text is escaped, a stranger may have written it."""

import html
import json
from collections.abc import Sequence

from hfllm.data.formats import Message, content_text


def shown_messages(content: str | list[Message], images: Sequence[str] = (), title: str = "") -> str:
    """Return a prompt or an answer as HTML. Every text is escaped: answers are what a model or a stranger wrote.

    Args:
        content: text of the assistant, or messages; images stand at their positions, tool calls are folded.
        images: data URLs.
        title: in place of the assistant's role.
    """
    messages = [{"role": "assistant", "content": content}] if isinstance(content, str) else content
    waiting = list(images)
    parts = [_shown_message(message, waiting, title) for message in messages]
    # Images without a position come first.
    return "".join([*map(_image, waiting), *parts])


def _shown_message(message: Message, waiting: list[str], title: str) -> str:
    words = []
    content = message.get("content") or ""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part.get("type") == "text":
            words.append(f'<div class="words">{plain(part["text"])}</div>' if part["text"] else "")
        elif waiting:
            words.append(_image(waiting.pop(0)))
    if message.get("reasoning_content"):
        words.insert(0, _folded("thoughts", message["reasoning_content"]))
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = json.dumps(function.get("arguments"), ensure_ascii=False, indent=1, default=str)
        words.append(_folded(f"calls {function.get('name')}", arguments))
    role = plain(str(message.get("role", "assistant")))
    if role == "tool":
        of_tool = _folded(f"tool {message.get('name', '')}", content_text(content))
        return f'<div class="turn tool">{of_tool}</div>'
    shown = plain(title) if title and role == "assistant" else role
    return f'<div class="turn {role}"><div class="role">{shown}</div>{"".join(words)}</div>'


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{plain(title)}</summary><pre>{plain(text)}</pre></details>"


def _image(url: str) -> str:
    if not url.startswith("data:image/"):
        return ""
    return f'<img alt="image of the prompt" src="{html.escape(url, quote=True)}">'


def plain(text: str) -> str:
    """Return a text that HTML shows as it is; Gradio would fill in braces after a dollar sign."""
    return html.escape(text, quote=True).replace("$", "&#36;").replace("{", "&#123;").replace("`", "&#96;")


def text_of(answer: str | list[Message]) -> str:
    """Return the text of an answer that a person may edit: its last message's."""
    if isinstance(answer, str):
        return answer
    content = answer[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
