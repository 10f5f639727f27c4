"""Which characters of a rendered conversation, and so which of its tokens, the loss is taken on.

The loss is on every assistant turn, its end-of-turn token included, and nowhere else, unless data.train_roles,
data.train_on or a message's own `train` say otherwise. What a template writes after that token (the line break after
Qwen's <|im_end|>) is not learnt unless data.turn_end says so: generation has stopped by then. Where a template ends
turns with plain text alone, that text is the end of the turn.

A conversation is rendered and tokenised once, as a whole, so that its tokens are those that generation sees, and
the turns are found in it as ranges of characters. A template with {% generation %} blocks says itself where the
assistant's are. For others the rendering of each turn's history is a prefix of the whole; a template of which that is
not true writes the past differently once an answer follows, and is refused. Of other speakers' turns the header is
not learnt, which whoever generates writes: the turn is what is said, and an end-of-turn token that follows.
"""

import re
from typing import Any

import numpy as np

from jaxtune.config import DataSection
from jaxtune.data.template import assistant_turns
from jaxtune.data.turns import Message
from jaxtune.errors import DataError

Span = tuple[int, int]  # characters [start, end)


class BadBeginning(DataError):
    """A conversation that begins with the assistant, and a chat template that cannot do with it."""

    def __init__(self, where: str, why: str):
        super().__init__(
            f"{where}: the conversation begins with the assistant, and {why}; put a user's turn before it, or take "
            "the row out"
        )


_SPACE = re.compile(r"\s*")


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of the tokenizer's special tokens, the longest first; of none, one that never matches."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def learnt_turns(messages: list[Message], section: DataSection) -> list[int]:
    """Which messages the loss is on. A message's own `train` goes over data.train_on, and that over train_roles."""
    chosen = [at for at, said in enumerate(messages) if said["role"] in section.train_roles]
    if section.train_on == "last":
        chosen = chosen[-1:]
    return [at for at, said in enumerate(messages) if said.get("train", at in chosen)]


def supervised_spans(
    where: str, messages: list[Message], answer: dict[str, Any], special: re.Pattern[str], section: DataSection
) -> list[Span]:
    """Where those who are learnt speak in `answer`, which is ChatTemplate.render's for learnt_turns; in order.

    Raises:
        BadBeginning: the template does not tell where the assistant speaks who begins.
        DataError: the template has no {% generation %} blocks and rewrites history, or has blocks of which it is not
            plain whose they are.
    """
    text, turns = answer["text"], answer["turns"]
    # A turn ends before the next one's prompt does.
    stops = [*(before for _, before, _, _ in turns[1:]), len(text)]
    spans = _marked(where, messages, answer["marks"], section) if "marks" in answer else []
    for place, stop in zip(turns, stops):
        spans.append(_turn(where, text, messages[place[0]], special, section, (*place, stop)))
    return sorted(spans)


def _marked(where: str, messages: list[Message], marks: list[Span], section: DataSection) -> list[Span]:
    """The template's own marks of those assistant turns that are learnt."""
    if section.turn_end != "token":
        raise DataError(f"{where}: data.turn_end {section.turn_end}: {_SAYS_ITSELF}")
    spans, said = sorted((start, end) for start, end in marks), assistant_turns(messages)
    learnt = set(learnt_turns(messages, section))
    if learnt.issuperset(said):
        return spans
    if len(spans) != len(said):
        raise DataError(f"{where}: {_UNPLAIN.format(len(spans), len(said))}")
    return [span for at, span in zip(said, spans) if at in learnt]


_SAYS_ITSELF = "the chat template says itself what is learnt of a turn, with {% generation %}; leave turn_end out"
_UNPLAIN = (
    "some assistant turns are to be learnt and others not, but the chat template's {{% generation %}} blocks, of which "
    "it has {} for {} turns, do not tell which is whose; use a data.template with one block for each turn"
)
_REWRITES = (
    "the chat template rewrites history: it renders the messages up to message {} (the {}'s, counted from 0) "
    "differently on their own than within the whole conversation, so its turns cannot be told apart; use a "
    "data.template that marks them with {{% generation %}}, or one conversation for each assistant turn"
)


def _turn(
    where: str,
    text: str,
    message: Message,
    special: re.Pattern[str],
    section: DataSection,
    place: tuple[int, int | None, int | None, int | None, int | None],
) -> Span:
    """place: the message's index, where it begins, where it ends by its own prefix, where its words are, and where the
    next begins."""
    index, start, through, words, stop = place
    end = None
    if start is not None and message["role"] != "assistant":
        end = _end_of_others(text, start, through, message["content"], special)
    elif start is not None:
        whole = section.turn_end == "template"
        end = through if whole else _turn_end(text, start, through, words, stop, message, special)
    if start is None and index == 0 and message["role"] == "assistant":
        raise BadBeginning(where, "the chat template does not tell where its answer begins")
    if start is None or end is None:
        raise DataError(f"{where}: {_REWRITES.format(index, message['role'])}")
    return start, end


def _end_of_others(text: str, start: int, through: int | None, content: str, special: re.Pattern[str]) -> int:
    """After what is said at `start`, and the special token that follows it, if one does."""
    end = _end_of_words(text, start, content)
    after = _SPACE.match(text, end).end()  # type: ignore[union-attr]  # it matches the empty string
    end_token = special.match(text, after, len(text) if through is None else through)
    return end_token.end() if end_token else end


def _end_of_words(text: str, start: int, content: str) -> int:
    """After what is said at `start`, which the template may have trimmed."""
    return start + len(content if text.startswith(content, start) else content.strip())


def _turn_end(
    text: str,
    start: int,
    through: int | None,
    words: int | None,
    stop: int | None,
    message: Message,
    special: re.Pattern[str],
) -> int | None:
    """Where the turn that begins at `start` ends: after the first special token that follows its content, and those
    of the turn that follow it directly.

    through: the end of the text up to and with this turn, if that is a prefix of the whole; words: where its content
    is, if it is found; stop: no turn reaches further. Without a special token the turn is all that the template wrote
    for it, and so it is where tools are called, whose calls may have special tokens of their own. None: it cannot be
    told.
    """
    region_end = stop if through is None else through
    if region_end is None:
        return None
    end_token = words is not None and special.search(text, _end_of_words(text, words, message["content"]), region_end)
    if end_token:
        # What follows is the next turn's where this one's own text is not known (Llama 3's <|start_header_id|>).
        more = through is not None and re.compile(f"(?:{special.pattern})+").match(text, end_token.start(), through)
        return (more or end_token).end()
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
