"""`ov3 vlm chat`: questions about a picture, in the terminal."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openvision3.commands.vlm_model import WhereOptions, load
from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from PIL.Image import Image

    from openvision3.vlm.folder import VLM

HELP = "/image FILE takes another picture, /reset forgets what was said, Ctrl-D ends"


@dataclass(frozen=True)
class ChatOptions(WhereOptions):
    """The picture, the model and the question."""

    image: Path = field(kw_only=True)  # the picture
    model: str = "demo"  # "demo", or a folder of `ov3 vlm train` or of any LLaVA
    question: str = ""  # answer this and end; empty: ask in the terminal, or read standard input to its end
    max_new_tokens: int = 256  # of an answer


def chat(options: Annotated[ChatOptions, tyro.conf.arg(name="")]) -> int:
    """Answers questions about a picture, word by word as they come; in a terminal, a conversation."""
    from openvision3.data.transforms import load_image

    if options.max_new_tokens < 1:
        raise OpenVisionError(f"--max-new-tokens {options.max_new_tokens}: expected at least 1")
    picture = load_image(options.image)
    asks = not options.question and sys.stdin.isatty()
    question = options.question or ("" if asks else _from_stdin())
    if not asks and not question:
        raise OpenVisionError("there is no question: give --question TEXT, or one on standard input")
    conversation = Conversation(load(options.model, options), picture, options.max_new_tokens)
    if asks:
        print(HELP, file=sys.stderr)
        _loop(conversation)
    else:
        conversation.say(question)
    return 0


def _from_stdin() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise OpenVisionError("standard input is not UTF-8 text") from None


class Conversation:
    """A picture, what was said about it, and the model that goes on."""

    def __init__(self, vlm: "VLM", picture: "Image", max_new_tokens: int):
        self.vlm, self.picture, self.max_new_tokens = vlm, picture, max_new_tokens
        self.messages: list[dict[str, Any]] = []

    def say(self, text: str) -> str:
        """Prints the answer as it comes, and keeps question and answer. An error leaves what was said before."""
        from openvision3.vlm.answering import question, stream

        messages = [*self.messages, question(text, 0 if self.messages else 1)]
        said = ""
        try:
            for piece in stream(self.vlm, messages, [self.picture], self.max_new_tokens):
                said += piece
                print(piece, end="", flush=True)
        finally:
            if said:
                print()
        if not said.strip():
            raise OpenVisionError("the model's answer is empty")
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": said.strip()}]}]
        return said.strip()


def _loop(conversation: Conversation) -> None:
    """Reads lines until the terminal's end; what goes wrong with one is said, and the next one is read."""
    from openvision3.commands.common import fail
    from openvision3.data.transforms import load_image

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            fail("what was typed is not UTF-8 text")
            continue
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                conversation.picture, conversation.messages = load_image(Path(rest.strip()).expanduser()), []
            elif command == "/reset":
                conversation.messages = []
            elif line.startswith("/"):
                raise OpenVisionError(f"there is no {command}: {HELP}")
            elif line:
                conversation.say(line)
        except OpenVisionError as error:
            fail(str(error))
