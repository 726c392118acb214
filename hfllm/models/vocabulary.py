"""Whether a model has an embedding for each token of a tokenizer, and embeddings for new tokens."""

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str | None = None) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for: training would end at the first of them.

    Tokens that no text here can contain, such as the place of an image in a model of words (Gemma 3), bring a warning.

    Args:
        name: of the model, for the complaint.

    Raises:
        InputError: with both sizes and one of the tokens.
    """
    embeddings = model.get_input_embeddings()
    if embeddings is None or getattr(embeddings, "weight", None) is None:
        return
    # ZeRO-3 keeps a part of the rows in each process.
    rows = getattr(embeddings.weight, "ds_shape", embeddings.weight.shape)[0]
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    sizes = f"the tokenizer has {max(beyond.values()) + 1} tokens and model {name!r} embeddings for {rows}"
    unusable = [token for token in beyond if not _is_special_and_unused(token, tokenizer)]
    if unusable:
        first = min(unusable, key=beyond.__getitem__)
        raise InputError(
            f"{sizes}, none for {first!r}: take the model's own tokenizer, or give it rows for the new ones and save "
            "it (model.resize_token_embeddings(len(tokenizer)))"
        )
    warnings.warn(f"{sizes}: texts must not contain {', '.join(sorted(beyond)[:3])}", stacklevel=2)


def _is_special_and_unused(token: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a token is a mark that neither padding, ends and beginnings nor the chat template use."""
    added = tokenizer.added_tokens_decoder.get(tokenizer.convert_tokens_to_ids(token))
    used = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    is_special = added is not None and added.special
    return is_special and token not in used and token not in str(tokenizer.chat_template or "")


def add_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> list[str]:
    """Add tokens to a tokenizer and give the model rows for them; return those that were new.

    A new row is the mean of the rows of the tokens that wrote the same text before, so the model begins with what it
    knows of that. Tokens of the form `<|...|>` become special ones; others are ordinary, which decoding with
    `skip_special_tokens=True` keeps.

    Raises:
        InputError: under DeepSpeed ZeRO-3, where each process has a part of the rows.
    """
    import torch
    from transformers import AddedToken
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise InputError("new tokens cannot be added under DeepSpeed ZeRO-3: add them in one process first")
    new = [token for token in dict.fromkeys(tokens) if token not in tokenizer.get_vocab()]
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in new]
    for token in new:
        is_special = re.fullmatch(r"<\|.*\|>", token) is not None
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False)], special_tokens=is_special)
    if not new:
        return new
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(new)
    tables = {id(each.weight): each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each}
    with torch.no_grad():
        for table in tables.values():
            for row, parts in zip(ids, pieces, strict=True):
                table.weight[row] = table.weight[parts].mean(0)
                if getattr(table, "bias", None) is not None:
                    table.bias[row] = table.bias[parts].mean()
    return new
