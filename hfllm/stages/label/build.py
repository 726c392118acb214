"""Labeling by people: the pairs of answers, the server of the page, and the report."""

import base64
import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Row, as_messages, counted, to_preference, to_prompt
from hfllm.data.images.files import read_image
from hfllm.data.images.rows import MARK, png_of, take_images
from hfllm.data.loading import load_rows
from hfllm.errors import InputError, refuse_if
from hfllm.evaluation.votes import BAD, FIRST, LABELS, SECOND, SKIP, TIE, VOTES, Pair, Votes
from hfllm.flags import changed
from hfllm.outputs.figures import mean_of
from hfllm.outputs.progress import progress
from hfllm.outputs.report import Found, write_atomically
from hfllm.outputs.verdict import Promise
from hfllm.runs.command_line import say
from hfllm.runs.stage import Stage
from hfllm.stages.label.flags import LabelArguments

if TYPE_CHECKING:
    from hfllm.stages.chat.speaker import Speaker

PAIRS = "pairs.json"
CHOSEN, REJECTED = "chosen", "rejected"
# Prompts whose answers are sampled together.
BATCH = 16


ARTIFACTS = {"pairs": PAIRS, "votes": VOTES, "labels": LABELS}


# ---- the run ----


def stage_of(args: LabelArguments) -> Stage:
    """Return the run: where the page is does not change the pairs, nor who labels which."""
    if args.model_name_or_path is None and args.world is not None:
        raise InputError(
            "which model? hfllm label FOLDER_OR_ID --dataset_name prompts.jsonl; or --dataset_name PAIRS, rows that "
            "bring both answers"
        )
    stage = Stage("label", args, without=("host", "port"))
    stage.check()
    return stage


def load_speakers(args: LabelArguments) -> "dict[str, Speaker]":
    """Load the models that answer, by their names; none where the rows bring both answers."""
    from hfllm.stages.chat.speaker import load_speaker

    # A revision is one of the first model's repository.
    revisions = {args.model_name_or_path: args.model_revision, args.other_model_name_or_path: "main"}
    return {
        name: load_speaker(changed(args, model_name_or_path=name, model_revision=revision))
        for name, revision in revisions.items()
        if name
    }


def votes_of(args: LabelArguments, pairs: Sequence[Pair]) -> Votes:
    """Return the votes in the output folder."""
    return Votes(Path(args.output_dir), pairs, args.annotators or (), args.overlap, args.seed)


# ---- pairs ----


def read_rows(args: LabelArguments) -> list[Row]:
    """Return the rows to label: with `prompt`, and where no model is named `chosen` and `rejected`; and `images`.

    Raises:
        InputError: when there are none.
    """
    if args.world is not None:
        return [dict(task.prompt_row()) for task in args.world.evaluation_tasks(args.num_prompts)]
    folder = Path(args.dataset_name) if Path(args.dataset_name).is_dir() else Path(args.dataset_name).parent
    has_model = args.model_name_or_path is not None

    def mapper(origin: str, row: Row) -> Row:
        rest, images = take_images(origin, row)
        urls = [_data_url(read_image(image, origin, folder)) for image in images]
        converted = to_prompt(origin, rest) if has_model else to_preference(origin, rest)
        kept = ("prompt", CHOSEN, REJECTED, "tools")
        return {name: converted[name] for name in kept if converted.get(name)} | ({"images": urls} if urls else {})

    rows = load_rows(args.row_source, mapper, most=args.num_prompts)
    refuse_if(not rows, f"--dataset_name {args.dataset_name} has no rows")
    return rows


def _data_url(image: Any) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_of(image)).decode()}"


def pairs_of(rows: Sequence[Row]) -> list[Pair]:
    """Return the rows of a dataset with two answers as pairs."""
    sides = (CHOSEN, REJECTED)
    return [_pair(index, row, [row[side] for side in sides], sides) for index, row in enumerate(rows)]


def sampled_pairs(rows: Sequence[Row], speakers: "Mapping[str, Speaker]", args: LabelArguments) -> list[Pair]:
    """Return the rows' prompts with two samples of one model, or one of each of two; equal ones are left out."""
    samples: list[list[str]] = [[] for _ in rows]
    each = 2 if len(speakers) == 1 else 1
    with progress(total=len(rows) * len(speakers), unit="prompt") as bar:
        for speaker in speakers.values():
            for begin in range(0, len(rows), BATCH):
                some = rows[begin : begin + BATCH]
                for index, texts in enumerate(_answers(speaker, some, each, args, begin), begin):
                    samples[index] += texts
                bar.update(len(some))
    sources = list(speakers) * each
    pairs = [_pair(index, row, texts, sources) for index, (row, texts) in enumerate(zip(rows, samples, strict=True))]
    different = [pair for pair in pairs if pair.answers[0] != pair.answers[1]]
    if len(different) < len(pairs):
        say(f"label: {len(pairs) - len(different)} of {len(pairs)} prompts are left out: both answers are equal")
    refuse_if(not different, "both answers are equal to each prompt: a higher --label_temperature makes others")
    return different


def _answers(
    speaker: "Speaker", rows: Sequence[Row], count: int, args: LabelArguments, begin: int
) -> Sequence[Sequence[str]]:
    from transformers import set_seed

    from hfllm.generation.responses import sample_responses
    from hfllm.generation.streaming import StreamSettings

    if not any(row.get("images") for row in rows):
        prompts = [row["prompt"] for row in rows]
        if speaker.tokenizer.chat_template is not None:
            prompts = list(map(as_messages, prompts))
        tools = [row.get("tools") for row in rows]
        sampling = {"num_return_sequences": count, "seed": args.seed + begin, "temperature": args.label_temperature}
        named = (speaker.model, speaker.tokenizer, prompts, args.max_new_tokens)
        return sample_responses(*named, tools=tools, **sampling)
    set_seed(args.seed + begin)
    settings = StreamSettings({"do_sample": True, "temperature": args.label_temperature})
    result = []
    for row in rows:
        encoded = speaker.encoded(_with_images(row))
        result.append([speaker.speak(encoded, settings, lambda text, tokens: None).text for _ in range(count)])
    return result


def _with_images(row: Row) -> list[dict[str, Any]]:
    """Return a prompt whose first question has the row's images where it names no positions."""
    parts = [{"type": "image", "image": read_image(url, "a row")} for url in row.get("images") or ()]
    messages = [dict(message) for message in as_messages(row["prompt"])]
    question = next(message for message in messages if message["role"] == "user")
    question["content"] = [*parts, {"type": "text", "text": question["content"].replace(MARK, "").strip()}]
    return messages


def _pair(index: int, row: Row, answers: Sequence[Any], sources: Sequence[str]) -> Pair:
    content = json.dumps([row["prompt"], list(answers)], default=str)
    number = f"{index}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return Pair(number, row["prompt"], list(answers), list(sources), row.get("images") or [], row.get("tools") or [])


def saved_pairs(folder: Path, identity: Mapping[str, Any]) -> list[Pair] | None:
    """Return the pairs of an earlier session with the same flags and files; `None` where there is none.

    Raises:
        InputError: when the folder holds the pairs of other flags, which votes were given to.
    """
    path = folder / PAIRS
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        pairs, before = [Pair(**each) for each in saved["pairs"]], saved["identity"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: expected the pairs that hfllm label wrote") from None
    now = json.loads(json.dumps(identity, default=str))
    differs = next((name for name in {**before, **now} if before.get(name) != now.get(name)), None)
    if differs is not None:
        raise InputError(
            f"--output_dir {folder} holds the pairs of other flags ({differs} {before.get(differs)!r}, now "
            f"{now.get(differs)!r}): choose another"
        )
    return pairs


def save_pairs(folder: Path, pairs: Sequence[Pair], identity: Mapping[str, Any]) -> None:
    """Write pairs, whole or not at all: votes name them by their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"identity": dict(identity), "pairs": [pair.__dict__ for pair in pairs]}
    write_atomically(folder / PAIRS, json.dumps(content, ensure_ascii=False, default=str) + "\n")


# ---- the page ----


def serve(votes: Votes, speakers: "Mapping[str, Speaker]", host: str, listening: socket.socket) -> None:
    """Serve the page until Ctrl-C."""
    # Before Gradio is imported: it would report its use.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import uvicorn

    from hfllm.runs.local import address_of
    from hfllm.stages.label.page import Page

    app = application(Page(votes, {name: _reply_of(speaker) for name, speaker in speakers.items()}), host)
    names = f"/?name={votes.annotators[0]}" if votes.annotators else ""
    say(f"label: {len(votes.pairs)} pairs at {address_of(listening)}{names} (Ctrl-C ends and writes the report)")
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    try:
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:
        # Uvicorn hands it on after it has closed.
        return


def application(page: Any, host: str = "127.0.0.1") -> Any:
    """Return the page as an ASGI application that answers to this machine's names alone, where it listens there."""
    import gradio
    from fastapi import FastAPI

    from hfllm.runs.local import LOOPBACK, LocalOnly
    from hfllm.stages.label.page import CSS, HEADERS, KEYS

    # Fonts of the machine: none are fetched.
    theme = gradio.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    looks = {"theme": theme, "css": CSS, "head": KEYS, "footer_links": []}
    app = gradio.mount_gradio_app(FastAPI(), page.blocks(), path="", show_error=True, ssr_mode=False, **looks)
    return LocalOnly(app, LOOPBACK if host in LOOPBACK else None, HEADERS)


def _reply_of(speaker: "Speaker") -> Any:
    def reply(messages: Sequence[dict[str, Any]]) -> str:
        (answer,) = speaker.answer(messages, lambda text, tokens: None)
        return answer["content"]

    return reply


# ---- report ----


def report_of(votes: Votes) -> Found:
    """Return what people said: how many labels, how long they took, whom they prefer and how far they agree."""
    counts = {choice: sum(vote.choice == choice for vote in votes.votes) for choice in (TIE, BAD, SKIP)}
    decided = [vote for vote in votes.votes if vote.choice in (FIRST, SECOND)]
    sources = next(iter(votes.pairs.values())).sources
    votes.write_rows()
    metrics: dict[str, float] = {
        "pairs": len(votes.pairs),
        "labels": len(votes.votes),
        "decided": len(decided),
        "ties": counts[TIE],
        "both_bad": counts[BAD],
        "skipped": counts[SKIP],
        "edited": sum(vote.edited is not None for vote in votes.votes),
        "rows": sum(1 for _ in votes.rows()),
    }
    promises = []
    if decided:
        metrics["seconds_per_label"] = sorted(vote.seconds for vote in votes.votes)[len(votes.votes) // 2]
        metrics |= mean_of("left_preferred", [float((vote.choice == FIRST) != vote.is_swapped) for vote in decided])
    if sources[0] != sources[1] and decided:
        # The votes on one pair are alike: a pair counts once.
        by_pair: dict[str, list[float]] = {}
        for vote in decided:
            by_pair.setdefault(vote.pair, []).append(float(vote.choice == SECOND))
        metrics |= mean_of("second_preferred", [sum(each) / len(each) for each in by_pair.values()])
        # Answers of a dataset are not compared: people say whether they agree with it.
        if CHOSEN not in sources:
            promises.append(Promise(f"answers of {sources[1]} preferred", "second_preferred", 0.5, "by chance"))
    kappa, value, common = votes.agreement()
    metrics |= {} if value is None else {kappa: value, f"{kappa}_n": common}
    table = [
        {"annotator": name, "labels": done, "of": total, "seconds each": "" if seconds is None else f"{seconds:.1f}"}
        for name in dict.fromkeys([*votes.annotators, *(vote.annotator for vote in votes.votes)])
        for done, total, seconds in [votes.progress(name)]
    ]
    agreement = "" if value is None else f", {kappa.replace('_', ' ')} {value:.2f} on {common}"
    about = [counted(metrics["labels"], "label"), f"by {counted(len(table), 'annotator')}"]
    summary = f"{' '.join(about)} on {counted(len(votes.pairs), 'pair')}: {counted(metrics['rows'], 'row')}"
    return Found(metrics, f"{summary} for hfllm reward{agreement}", {"Annotators": table}, {}, promises)
