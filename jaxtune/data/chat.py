"""Which characters of a rendered conversation, and so which of its tokens, the loss is taken on.

The loss is on every assistant turn, its end-of-turn token included, and nowhere else. What a template writes after
that token (the line break after Qwen's <|im_end|>) is not learnt: generation has stopped by then. Where a template
ends turns with plain text alone, that text is the end of the turn.

A conversation is rendered and tokenised once, as a whole, so that its tokens are those that generation sees, and
the turns are found in it as ranges of characters. A template with {% generation %} blocks says itself where they
are. For others the rendering of each turn's history is a prefix of the whole; a template of which that is not true
writes the past differently once an answer follows, and is refused.
"""

import re
from typing import Any

import numpy as np

from jaxtune.data.formats import Message
from jaxtune.errors import DataError

Span = tuple[int, int]  # characters [start, end)


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of the tokenizer's special tokens, the longest first; of none, one that never matches."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def supervised_spans(
    where: str, messages: list[Message], answer: dict[str, Any], special: re.Pattern[str]
) -> list[Span]:
    """Where the assistant speaks in `answer`, which is one of ChatTemplate.render's; in order.

    Raises:
        DataError: the template has no {% generation %} blocks and rewrites history.
    """
    if "marks" in answer:
        return sorted((start, end) for start, end in answer["marks"])
    text, turns = answer["text"], answer["turns"]
    # A turn ends before the next one's prompt does.
    stops = [*(prompt for _, prompt, _ in turns[1:]), len(text)]
    spans = []
    for (index, prompt, through), stop in zip(turns, stops):
        end = None
        if prompt is not None:
            end = _turn_end(text, prompt, through, stop, messages[index]["content"], special)
        if end is None:
            raise DataError(f"{where}: {_REWRITES.format(index)}")
        spans.append((prompt, end))
    return spans


_REWRITES = (
    "the chat template rewrites history: it renders the messages up to message {} (an assistant's, counted from 0) "
    "differently on their own than within the whole conversation, so its turns cannot be told apart; use a "
    "data.template that marks them with {{% generation %}}, or one conversation for each assistant turn"
)


def _turn_end(
    text: str, start: int, through: int | None, stop: int | None, content: str, special: re.Pattern[str]
) -> int | None:
    """Where the turn that begins at `start` ends: after the first special token that follows its content.

    through: the end of the text up to and with this turn, if that is a prefix of the whole; stop: no turn reaches
    further. Without a special token the turn is all that the template wrote for it. None: it cannot be told.
    """
    region_end = stop if through is None else through
    if region_end is None:
        return None
    said = next((part for part in (content, content.strip()) if text.find(part, start, region_end) >= 0), None)
    if said is not None:
        end_token = special.search(text, text.find(said, start, region_end) + len(said), region_end)
        if end_token:
            return end_token.end()
    if through is None:
        return None
    written = text[start:through].rstrip()
    last = [match.end() for match in special.finditer(written)][-1:]
    return start + len(written) if last == [len(written)] else through


def token_mask(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """bool [tokens]: which tokens have a character in a span. offsets: int [tokens, 2], characters [start, end).

    Some tokenizers trim white space off the offsets; a token that is nothing else has an empty range then, and is
    given the characters since the token before it.
    """
    mask: np.ndarray = np.zeros(len(offsets), bool)
    if not len(offsets):
        return mask
    starts, ends = offsets[:, 0], offsets[:, 1]
    before = np.concatenate(([0], ends[:-1]))
    starts = np.where(starts >= ends, np.minimum(before, starts), starts)
    for start, end in spans:
        mask |= (ends > start) & (starts < end)
    return mask


def shared_starts(offsets: np.ndarray, spans: list[Span]) -> int:
    """How many spans begin inside a token, which is then half the prompt's and half the answer's.

    Generation never gets to choose such a token: its prompt ends with another one. Where the tokenizer trims its
    offsets this goes unseen.
    """
    return sum(bool(np.any((offsets[:, 0] < start) & (offsets[:, 1] > start))) for start, _ in spans)
