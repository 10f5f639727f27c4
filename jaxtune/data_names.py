"""What the columns of data files, and the turns in them, are called: parts of the configuration's section `data`."""

from jaxtune.section import Section


class Columns(Section):
    """The names that the data's columns have; null: absent."""

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"
    system: str | None = "system"  # read when present
    history: str | None = "history"  # alpaca: [[question, answer], ...], read when present
    conversations: str = "conversations"  # sharegpt
    messages: str = "messages"
    tools: str | None = "tools"  # functions to call: a list or its JSON text, read when present
    text: str = "text"


# The columns that each format reads.
DATA_COLUMNS = {
    "alpaca": ("instruction", "input", "output", "system", "history", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "messages": ("messages", "system", "tools"),
    "text": ("text",),
    "megatron": (),
}
TEXTS = ("text", "megatron")  # formats of documents, which are learnt throughout; the others are of conversations


class Tags(Section):
    """What the turns of sharegpt and messages call their parts and their speakers; null: as the format does.

    A speaker named "" does not occur.
    """

    role: str | None = None  # key of the speaker: from (sharegpt), role (messages)
    content: str | None = None  # key of what is said: value, content
    user: str | None = None  # human or user; user
    assistant: str | None = None  # gpt or assistant; assistant
    system: str | None = None  # system
    observation: str | None = None  # what a tool replies: observation or tool; tool or function
    function: str | None = None  # the assistant's call of a tool as JSON text: function_call; none
