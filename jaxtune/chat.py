"""A conversation on the terminal: several turns, each answer as it comes. One answer alone is `jaxtune generate`."""

import sys
from collections.abc import Callable
from dataclasses import replace

from jaxtune.api import LoadedModel
from jaxtune.console import say, told_when_full
from jaxtune.errors import OutputError, UserError
from jaxtune.sampling import Sampling
from jaxtune.text import Messages, require_template

PROMPT = "> "
HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


class Chat:
    """What was said so far, and whom it is said to.

    write: where the answers' text goes, piece by piece.
    """

    def __init__(self, model: LoadedModel, sampling: Sampling, max_new_tokens: int, write: Callable[[str], None]):
        self.model, self.sampling, self.max_new_tokens, self.write = model, sampling, max_new_tokens, write
        self.messages: Messages = []

    def talk(self) -> None:
        """Until the other side leaves.

        Raises:
            DataError: the model has no chat template.
        """
        require_template(self.model.tokenizer)
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives `input` a history and line editing

            say(HELP)
        while True:
            line = self._next_line()
            if line is None or line.strip() == "/exit":
                return
            if line.strip() == "/reset":
                self.messages = []
                say("A new conversation.")
            elif line.strip().startswith("/"):
                say(f"There is no {line.split()[0]}. {HELP}")
            elif line.strip():
                self.answer(line)

    def answer(self, line: str) -> None:
        """Say `line`, and stream what comes back. What an answer has when it is stopped stays in the conversation;
        a question that cannot be answered does not."""
        self.messages.append({"role": "user", "content": line})
        said: list[str] = []
        try:
            for piece in self._pieces():
                said.append(piece)
                self.write(piece)
        except KeyboardInterrupt:
            self.write(" [stopped]")
        except OutputError:
            raise
        except UserError as error:
            say(f"{error}\n/reset begins anew.")
            self.messages.pop()
            return
        self.write("\n")
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _pieces(self):
        # Each turn has a seed of its own, so that a question asked twice may get two answers.
        s = replace(self.sampling, seed=(self.sampling.seed + len(self.messages)) % 2**32)
        return self.model.generate(
            self.messages, self.max_new_tokens, s.temperature, s.top_k, s.top_p, s.seed, stream=True
        )

    def _next_line(self) -> str | None:
        """What the user types; None when they leave. Ctrl-C gives up the line."""
        try:
            with told_when_full():
                return input(PROMPT) if sys.stdin.isatty() else input()
        except EOFError:
            if sys.stdin.isatty():
                self.write("\n")
            return None
        except KeyboardInterrupt:
            self.write("\n")
            return ""
