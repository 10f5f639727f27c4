"""The configuration's section `data`: where rows come from, what stands in them, and what is made of them.

It is part of config.py, which would be too long with it.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxtune.errors import listing
from jaxtune.section import LARGEST, Positive, Section


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


TURN_KEYS = {"sharegpt": ("from", "value"), "messages": ("role", "content")}  # of the speaker, and of what is said


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


class SourceSection(Section):
    """Files whose rows are alike, and what stands in them."""

    path: str | list[str] = []  # a file, a directory, a pattern such as data/*.jsonl or a hub id, or several
    format: Literal["alpaca", "sharegpt", "messages", "text", "megatron"] = "alpaca"  # of the rows; megatron: tokens
    columns: Columns = Columns()
    without: list[str] = []  # columns that must be absent, null or empty, of pictures say: a row with one is bad
    tags: Tags = Tags()  # sharegpt and messages
    system: str | None = None  # first message of every conversation that has none
    split: str | None = None  # of a data set on the hub; null: train
    subset: str | None = None  # of a data set on the hub: a configuration of its README, or a directory
    revision: str | None = None  # of a data set on the hub: branch, tag or commit
    on_bad_line: Literal["error", "skip"] = "error"  # skip: left out and counted, up to 5 of them or 0.1% of the rows
    num_samples: Positive | None = None  # rows, the same ones in each run; past those there are, some come again
    dialect: Literal["jaxtune", "llamafactory"] = "jaxtune"  # llamafactory: rows that it leaves out are left out

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def several(self) -> str | None:
        """The key that names sources in place of this one, if any does."""
        return None

    @model_validator(mode="after")
    def _no_empty_path(self):
        if "" in self.paths:  # it would be the directory that jaxtune was started in
            raise ValueError("path is empty: name a file, a directory or the id of a data set")
        return self

    @model_validator(mode="after")
    def _only_this_format(self):
        if self.several:  # each has its own
            return self
        of_rows = ("split", "subset", "revision", "on_bad_line", "num_samples", "without") * (self.format == "megatron")
        for name in ("system", "dialect", *of_rows) if self.format in TEXTS else ():
            if getattr(self, name) != SourceSection.model_fields[name].default:
                what = "rows" if name in of_rows else "conversations"
                raise ValueError(f"{name} is for {what} and would do nothing with format {self.format}")
        if self.format not in ("sharegpt", "messages") and self.tags != Tags():
            raise ValueError(f"tags are for sharegpt and messages and would do nothing with format {self.format}")
        for name, field in Columns.model_fields.items():
            if name not in DATA_COLUMNS[self.format] and getattr(self.columns, name) != field.default:
                allowed = ", ".join(DATA_COLUMNS[self.format]) or "no columns"
                raise ValueError(f"columns.{name} is not read by format {self.format}, which reads {allowed}")
        return self


class MixedSource(SourceSection):
    """One of several sources."""

    path: str | list[str]  # as data.path
    name: str | None = None  # in reports and metrics; absent: its path
    weight: Annotated[float, Field(gt=0)] | None = None  # share beside the others'; none: each example once an epoch


class DataSection(SourceSection):
    """What it learns from."""

    sources: list[MixedSource] = []  # in place of path: several sources, each with a format of its own
    dataset: str | list[str] = []  # in place of both: names in a dataset_info.json, which LLaMA-Factory's users have
    dataset_dir: str = "data"  # where that dataset_info.json and its files are
    template: str | None = None  # file of a Jinja chat template in place of the tokenizer's own
    max_length: Annotated[int, Field(gt=1, le=LARGEST)] = 1024  # tokens of one sequence or pack
    too_long: Literal["drop", "truncate", "error", "split"] = "truncate"  # past max_length; split: a text, into pieces
    train_on_prompt: bool = False  # the loss on every token, not on the assistant's turns alone
    train_roles: list[Literal["assistant", "user", "system", "tool"]] = ["assistant"]  # whose turns are learnt
    train_on: Literal["all", "last"] = "all"  # their turns: every one, or a conversation's last
    turn_end: Literal["token", "template"] = "token"  # learnt up to: a turn's end token, or all that follows in it
    packing: bool | Literal["in_order"] = True  # several conversations in one sequence; in_order: as they come
    share_prefix: bool = False  # what all conversations begin with is computed once for all that stand in a pack
    shuffle: bool = True  # anew in each epoch, by seed and epoch alone
    streaming: bool = False  # rows are read and tokenised as steps need them, and not kept; with train.steps
    shuffle_buffer: Positive = 10000  # of streaming: rows that are shuffled and packed together
    cache: str | None = None  # where tokens are kept; null: $JAXTUNE_CACHE/tokens, else ~/.cache/jaxtune/tokens

    @property
    def datasets(self) -> list[str]:
        """The names in `dataset`, which may be one text with commas."""
        names = self.dataset.split(",") if isinstance(self.dataset, str) else self.dataset
        return [name.strip() for name in names]

    @property
    def several(self) -> str | None:
        return "dataset" if self.datasets else "sources" if self.sources else None

    @property
    def only_texts(self) -> bool:
        """Whether there are no conversations, as far as the configuration alone tells."""
        return not self.datasets and all(part.format in TEXTS for part in self.parts)

    @property
    def parts(self) -> list[SourceSection]:
        """The sources; of one alone, this section itself.

        Raises:
            DataError: the dataset_info.json of `dataset` is wrong.
        """
        if self.datasets:
            from jaxtune.data.dataset_info import read_sources

            return [*read_sources(self)]
        return [*self.sources] or [self]

    @property
    def common_system(self) -> str | None:
        """The `system` of every source of conversations; None: they have none, or not all the same."""
        sources: list[SourceSection] = [*self.sources] or [self]  # those of a dataset_info.json have this section's
        lines = {source.system for source in sources if source.format not in TEXTS}
        return lines.pop() if len(lines) == 1 else None

    @model_validator(mode="after")
    def _all_weights_or_none(self):
        without = [part.name or listing(part.paths, 2) for part in self.sources if part.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(
                f"sources: some have a weight and some have none ({listing(without)}); give all of them one"
            )
        if len(self.sources) == 1 and not without:
            raise ValueError("sources: a weight is a share beside others', and would do nothing with one source")
        names = [part.name for part in self.sources if part.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: a name stands twice ({listing(names)})")
        return self

    @model_validator(mode="after")
    def _one_way_to_name_files(self):
        if self.several:
            if self.datasets and self.sources:
                raise ValueError("dataset and sources are both set; keep one")
            for name, field in SourceSection.model_fields.items():
                if getattr(self, name) != field.default and (self.several, name) != ("dataset", "system"):
                    raise ValueError(f"{name} is for a single source; with {self.several}, each has its own")
        elif not self.paths:
            raise ValueError("path is missing: name a file, several, sources with a path each, or a dataset")
        if self.dataset_dir != type(self).model_fields["dataset_dir"].default and not self.datasets:
            raise ValueError("dataset_dir would do nothing without dataset")
        return self

    @model_validator(mode="after")
    def _nothing_of_conversations_alone(self):
        if self.only_texts:
            for name in ("template", "train_on_prompt", "train_roles", "train_on", "turn_end"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} is for conversations and would do nothing with format {self.parts[0].format}"
                    )
        elif self.too_long == "split":
            raise ValueError(
                f"too_long: split is for format {' and '.join(TEXTS)}: the second piece of a conversation would be an "
                "answer without its question; allowed with conversations: drop, truncate, error"
            )
        return self

    @model_validator(mode="after")
    def _packs_to_share_in(self):
        if self.share_prefix and not self.packing:
            raise ValueError(
                "share_prefix is what the conversations of a pack share, and would do nothing without packing"
            )
        if self.share_prefix and self.streaming:
            raise ValueError(
                "share_prefix looks at what all conversations begin with, which streaming has not read; "
                "set one of them to false"
            )
        return self

    @model_validator(mode="after")
    def _nothing_that_a_stream_cannot_know(self):
        if self.shuffle_buffer != type(self).model_fields["shuffle_buffer"].default and not self.streaming:
            raise ValueError("shuffle_buffer would do nothing without streaming")
        if self.streaming and any(part.format == "megatron" for part in [self, *self.sources]):
            raise ValueError("streaming is for rows; format megatron is read by memory map, whatever its size")
        return self

    @model_validator(mode="after")
    def _one_way_to_choose_turns(self):
        if not self.train_roles or len(set(self.train_roles)) < len(self.train_roles):
            raise ValueError("train_roles: expected at least one role, each once")
        for name in ("train_roles", "train_on", "turn_end"):
            if self.train_on_prompt and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} would do nothing with train_on_prompt, which learns every token")
        return self
