"""The page on which people compare answers: what it shows, its buttons and keys."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from hfllm.data.formats import Message, as_messages
from hfllm.errors import InputError
from hfllm.evaluation.html import plain, shown_messages, text_of
from hfllm.evaluation.votes import BAD, FIRST, SECOND, SKIP, TIE, Pair, Vote, Votes
from hfllm.stages.label.flags import MAX_NAME, is_name

# Answers a message, with the words of a model so far.
Reply = Callable[[Sequence[Message]], str]

# Votes sooner than a person can read are a key held down, or a double click.
LEAST_SECONDS = 0.4
# Nothing is fetched from elsewhere, whatever an answer says; Gradio's own scripts need the rest.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# elem_id of a button, its key, its words.
LEFT, RIGHT, UNDO = "left", "right", "undo"
BUTTONS = {
    LEFT: ("1", "Left"),
    TIE: ("2", "Tie"),
    RIGHT: ("3", "Right"),
    BAD: ("4", "Both bad"),
    SKIP: ("5", "Skip"),
    UNDO: ("u", "Undo"),
}
NAMES_OF_KEYS = json.dumps({key: name for name, (key, _) in BUTTONS.items()})
KEYS = f"""<script>
document.addEventListener("keydown", (event) => {{
  const place = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (place.closest && place.closest("input, textarea, select, [contenteditable=true]")) return;
  const name = {NAMES_OF_KEYS}[event.key];
  const button = name && document.getElementById("vote-" + name);
  if (button) {{ event.preventDefault(); button.click(); }}
}});
</script>"""
CSS = """
.gradio-container, .gradio-container > main { width: 100% !important; max-width: 1200px !important; }
.gradio-container { margin: 0 auto !important; }
.turn { border-radius: 12px; padding: 12px 16px; margin: 8px 0; border: 1px solid var(--border-color-primary); }
.turn .role { font-size: 12px; font-weight: 600; opacity: .65; margin-bottom: 4px; }
.turn .words { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; font-size: 16px; }
.turn.user { background: var(--background-fill-secondary); }
.turn.assistant { background: var(--block-background-fill); }
.turn details { margin-top: 6px; font-size: 14px; }
.turn details pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.turn img { max-width: min(100%, 420px); max-height: 320px; border-radius: 8px; display: block; margin: 6px 0; }
.side { font-size: 13px; font-weight: 600; opacity: .65; padding: 4px 2px 0; }
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin-top: 6px; }
.bar div { height: 100%; background: var(--primary-500); }
.done { text-align: center; padding: 40px 0; font-size: 18px; }
.votes { flex-wrap: wrap; }
.votes button { min-width: 120px !important; }
footer { display: none !important; }
@media (max-width: 640px) {
  .sides { flex-direction: column !important; }
  .votes button { min-width: 45% !important; }
}
"""


# Of events: no other program calls them, and what they show comes at once.
QUIET = {"api_visibility": "private", "show_progress": "hidden"}


# ---- the session of one page ----


@dataclass(frozen=True)
class Session:
    """What one open page shows.

    Args:
        name: of the annotator.
        pair: the id of the pair; empty when all are done.
        began: when it was shown.
        is_warned: whether it was said that a text was changed that the choice does not save.
    """

    name: str = ""
    pair: str = ""
    began: float = 0.0
    is_warned: bool = False


def _unchanged(session: Session) -> list[Any]:
    """Return what all parts of the page show where they stay as they are."""
    return [session, *[gr.skip()] * 7]


class Page:
    """The page.

    Args:
        votes: what is voted on, and where votes go.
        speakers: names of the models that can be talked to, with what answers.
    """

    def __init__(self, votes: Votes, speakers: Mapping[str, Reply] | None = None):
        self.votes, self.speakers = votes, dict(speakers or {})

    def blocks(self) -> gr.Blocks:
        """Return the page for Gradio."""
        with gr.Blocks(title="hfllm label", analytics_enabled=False, fill_width=True) as blocks:
            session = gr.State(Session())
            with gr.Row(equal_height=True):
                name = gr.Textbox(label="Your name", max_length=40, elem_id="name", scale=1, max_lines=1)
                progress = gr.HTML(elem_id="progress")
            with gr.Tab("Compare"):
                shown = self._comparison(session, progress)
            if self.speakers:
                with gr.Tab("Talk"):
                    self._conversation()
            views = [session, progress, *shown]
            blocks.load(self._load, [session], [name, *views], **QUIET)
            for event in (name.submit, name.blur):
                event(self._rename, [session, name], views, **QUIET)
        return blocks

    def _comparison(self, session: gr.State, progress: gr.HTML) -> list[gr.HTML | gr.Textbox]:
        prompt = gr.HTML(elem_id="prompt")
        with gr.Row(elem_classes="sides"):
            columns = []
            for side in (LEFT, RIGHT):
                with gr.Column():
                    columns.append(gr.HTML(elem_id=f"answer-{side}"))
        buttons = {}
        with gr.Row(elem_classes="votes"):
            for each, (key, words) in BUTTONS.items():
                variant = "primary" if each in (LEFT, RIGHT) else "secondary"
                buttons[each] = gr.Button(f"{words} ({key})", variant=variant, size="md", elem_id=f"vote-{each}")
        with gr.Accordion("Write a better answer", open=False, elem_id="edit"):
            texts = []
            with gr.Row(elem_classes="sides"):
                for side in (LEFT, RIGHT):
                    with gr.Column():
                        texts.append(gr.Textbox(label=f"{side.title()}, edited", lines=4, elem_id=f"text-{side}"))
            with gr.Row(elem_classes="votes"):
                edits = [gr.Button(f"Save the {side} text", elem_id=f"save-{side}") for side in (LEFT, RIGHT)]
        # What the browser shows: over a slow line that is still the pair before.
        seen = gr.Textbox(visible=False)
        shown = [prompt, *columns, *texts, seen]
        views = [session, progress, *shown]
        for each, button in buttons.items():
            if each == UNDO:
                button.click(self._undo, [session], views, **QUIET)
            else:
                button.click(self._voting(each), [session, seen, *texts], views, **QUIET)
        for side, button in zip((LEFT, RIGHT), edits, strict=True):
            button.click(self._voting(side, is_edit=True), [session, seen, *texts], views, **QUIET)
        return shown

    # ---- events ----

    def _load(self, session: Session, request: gr.Request) -> list[Any]:
        """Show the first pair of the name in the address, such as ?name=anna, or of the first annotator."""
        name = request.query_params.get("name") or (self.votes.annotators or ["me"])[0]
        return [name, *self._rename(session, name)]

    def _rename(self, session: Session, name: str) -> list[Any]:
        name = name.strip()
        if not is_name(name) or (self.votes.annotators and name not in self.votes.annotators):
            letters = f"up to {MAX_NAME} letters, digits, - _ . and spaces"
            known = f": one of {', '.join(self.votes.annotators)}" if self.votes.annotators else f": {letters}"
            return self._show(Session(), None, f"Please write your name{known}.")
        if name == session.name:
            return _unchanged(session)
        return self._show(Session(name), self.votes.next_of(name))

    def _voting(self, choice: str, is_edit: bool = False) -> Callable[..., list[Any]]:
        """Return what a button does.

        Args:
            choice: what it says.
            is_edit: whether it saves the text of its side; the buttons of a side do so where the text was changed.
        """

        def vote(session: Session, seen: str, *texts: str) -> list[Any]:
            seconds = time.time() - session.began
            if not session.pair or seen != session.pair or seconds < LEAST_SECONDS:
                return _unchanged(session)
            is_swapped = self.votes.is_swapped(session.name, session.pair)
            sides = {LEFT: SECOND if is_swapped else FIRST, RIGHT: FIRST if is_swapped else SECOND}
            pair, chosen = self.votes.pairs[session.pair], sides.get(choice, choice)
            shown = list(reversed(pair.answers)) if is_swapped else pair.answers
            changed = {
                side: text
                for side, text, answer in zip((LEFT, RIGHT), texts, shown, strict=True)
                if text.strip() not in ("", text_of(answer).strip())
            }
            edited = changed.pop(choice, None)
            if is_edit and edited is None:
                gr.Warning("The text is as it was: change it, or choose a side.")
                return _unchanged(session)
            if changed and not session.is_warned:
                sides = " and ".join(changed)
                gr.Warning(
                    f"You changed the {sides} text, which this does not save: choose that side, or press again."
                )
                return _unchanged(replace(session, is_warned=True))
            try:
                self.votes.add(Vote(session.pair, session.name, chosen, is_swapped, round(seconds, 2), edited))
            except InputError as error:
                raise gr.Error(str(error)) from None
            return self._show(session, self.votes.next_of(session.name))

        return vote

    def _undo(self, session: Session) -> list[Any]:
        pair = self.votes.undo(session.name) if session.name else None
        if pair is None:
            gr.Info("There is nothing to take back.")
            return _unchanged(session)
        return self._show(session, pair)

    def _show(self, session: Session, pair: Pair | None, message: str | None = None) -> list[Any]:
        """Return what all parts of the page show."""
        if pair is None:
            done = message or "All done. Thank you!"
            progress = self._progress(session.name) if session.name else ""
            return [replace(session, pair=""), progress, f'<div class="done">{plain(done)}</div>', *[""] * 5]
        answers = list(pair.answers)
        if self.votes.is_swapped(session.name, pair.id):
            answers.reverse()
        return [
            Session(session.name, pair.id, time.time()),
            self._progress(session.name),
            shown_messages(as_messages(pair.prompt), pair.images),
            *(shown_messages(answer, title=side.title()) for side, answer in zip((LEFT, RIGHT), answers, strict=True)),
            *map(text_of, answers),
            pair.id,
        ]

    def _progress(self, name: str) -> str:
        done, total, seconds = self.votes.progress(name)
        pace = "" if seconds is None else f", {seconds:.0f} s each"
        bar = f'<div class="bar"><div style="width:{100 * done / max(total, 1):.1f}%"></div></div>'
        return f'<div class="side">{done} of {total}{pace}</div>{bar}'

    # ---- talking ----

    def _conversation(self) -> None:
        """Make the tab that talks to one model, or to two side by side."""
        names = list(self.speakers)
        histories = gr.State([[] for _ in names])
        with gr.Row(elem_classes="sides"):
            views = []
            for index in range(len(names)):
                with gr.Column():
                    views.append(gr.HTML(elem_id=f"talk-{index}"))
        question = gr.Textbox(label="Ask", elem_id="ask", max_lines=6, placeholder="Enter sends")
        clear = gr.Button("New conversation", elem_id="talk-clear")

        def ask(texts: list[list[Message]], question: str) -> tuple[Any, ...]:
            if not question.strip():
                return (texts, "", *[gr.skip()] * len(names))
            asked = [[*history, {"role": "user", "content": question}] for history in texts]
            try:
                answers = [reply(history) for history, reply in zip(asked, self.speakers.values(), strict=True)]
            except InputError as error:
                raise gr.Error(str(error)) from None
            texts = [
                [*history, {"role": "assistant", "content": answer}]
                for history, answer in zip(asked, answers, strict=True)
            ]
            shown = (shown_messages(history, title=name) for history, name in zip(texts, names, strict=True))
            return (texts, "", *shown)

        question.submit(ask, [histories, question], [histories, question, *views], api_visibility="private")
        clear.click(
            lambda: ([[] for _ in names], *[""] * len(names)), None, [histories, *views], api_visibility="private"
        )
