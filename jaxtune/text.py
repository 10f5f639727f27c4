"""Between text and token ids, for generation: prompts in, and text that comes piece by piece out.

How training data becomes tokens is data/'s work; a chat template is rendered by the same sandbox there, so that
a conversation is asked as it was learnt.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from jaxtune.data.template import open_template
from jaxtune.errors import DataError

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
BROKEN = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet one


def encode_prompt(tokenizer: Any, prompt: str | Messages, system: str | None = None) -> list[int]:
    """The token ids that a model is asked with.

    prompt: plain text, encoded as the tokenizer does it but for an end of text behind it, after which nothing would
    follow; or messages (role and content, a text or parts of type text), which go through the chat template up to the
    point where the assistant begins. system: the first message where there is none.

    Raises:
        DataError: not messages, not UTF-8, no chat template, or one that refuses these messages.
    """
    if isinstance(prompt, str):
        _check_utf8(prompt)
        return _without_end(tokenizer, tokenizer(prompt, return_special_tokens_mask=True))
    prompt = _as_texts(prompt)
    if system is not None and all(message["role"] != "system" for message in prompt):
        prompt = [{"role": "system", "content": system}, *prompt]
    for message in prompt:
        _check_utf8(message["content"])
    require_template(tokenizer)
    with open_template(tokenizer) as template:
        return list(tokenizer(template.prompt(prompt), add_special_tokens=False)["input_ids"])


def require_template(tokenizer: Any) -> None:
    """
    Raises:
        DataError: it has no chat template, without which there are no messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, which makes text of messages; give plain text for the model to "
            "continue (jaxtune generate --prompt)"
        )


def _without_end(tokenizer: Any, found: Any) -> list[int]:
    """The ids of an encoded text without the end token that the tokenizer itself has put behind it.

    In front the same token may stand, as OPT's does, which an empty text begins with.
    """
    ids, added = found["input_ids"], found["special_tokens_mask"]  # 0 where a special token stands in the text
    ends = ids[-1:] == [tokenizer.eos_token_id] and added[-1] and ids != [tokenizer.bos_token_id]
    return list(ids[:-1] if ends else ids)


def _as_texts(messages: Any) -> Messages:
    """Messages each of whose contents is one text: parts are joined, as they are in data."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"expected a text, or a list of messages; found {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(
                f'expected messages such as {{"role": "user", "content": "Hello"}}, with a role out of '
                f"{', '.join(ROLES)}; found {message!r:.80}"
            )
    return [{**message, "content": _text_of(message)} for message in messages]


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"the {message['role']}'s message: expected a content of text, or of parts such as "
            f'{{"type": "text", "text": "Hello"}}; found {content!r:.80}'
        )
    return "".join(texts)


def _check_utf8(text: str) -> None:
    """Refuse what Python has for bytes that are no character: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not UTF-8: {text[max(error.start - 40, 0) : error.start + 40]!r}") from None


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of an answer, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_pieces(tokenizer: Any, pieces: Iterable[list[int]]) -> Iterator[str]:
    """The text of token ids that arrive in pieces, as soon as whole characters are known.

    The pieces joined are `decode` of all ids. A character that several tokens spell comes with the last of
    them; bytes that never become one come at the end, as they would from `decode`.
    """
    # The window begins with tokens whose text is out already: some decoders write a token as what precedes it asks.
    window: list[int] = []
    shown, known = "", 0  # the text of the first `known` tokens in the window
    for ids in pieces:
        window.extend(ids)
        text = decode(tokenizer, window)
        if len(text) > len(shown) and not text.endswith(BROKEN):
            yield text[len(shown) :]
            window = window[known:]
            shown, known = decode(tokenizer, window), len(window)
    rest = decode(tokenizer, window)[len(shown) :]
    if rest:
        yield rest
