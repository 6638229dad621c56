"""``slim-jax chat``."""

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.cli.options import (
    CacheDtype,
    Devices,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Revision,
    Seed,
    SourceArgument,
    Temperature,
    TopK,
    TopP,
)
from convert.cli.sources import at_revision, devices_mesh, open_source, tokenizer_of, whole_decoder
from convert.display import Stream, say

if TYPE_CHECKING:
    from convert.text import Conversation
    from slim_jax.infer.generate import Generator


def chat(
    source: SourceArgument,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="System message: instructions to the model before the conversation."
        ),
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    cache_dtype: CacheDtype = None,
    devices: Devices = 1,
    revision: Revision = None,
) -> None:
    """Chat with a model, using its own chat template. Each line is a message; Ctrl-C stops an answer.

    /reset starts a new conversation, /exit or the end of the input quits.

    slim-jax chat smollm2

    slim-jax chat out/q3 --system "Answer in one sentence." --temperature 0
    """
    from convert.text import Conversation
    from slim_jax.infer.generate import Generator
    from slim_jax.infer.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    mesh = devices_mesh(devices, cores=True)
    opened = open_source(at_revision(source, revision))
    conversation = Conversation(tokenizer_of(opened), source, system)
    stop = [*opened.config.eos_token_ids, *conversation.end_of_turn()]
    generator = Generator(whole_decoder(opened), cache_dtype=cache_dtype, mesh=mesh, consume=True)
    how = {"stop": stop, "max_tokens": max_tokens, **dataclasses.asdict(sampling)}
    while (line := _read()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            conversation.messages.clear()
        elif line.startswith("/"):
            say(f"{line} is no command, expected /reset or /exit")
        elif line:
            conversation.say("user", line)
            _answer(generator, conversation, seed + len(conversation.messages), how)


def _answer(generator: "Generator", conversation: "Conversation", seed: int, how: dict[str, Any]) -> None:
    """Prints an answer to the last message and adds it to the conversation."""
    from convert.text import Text

    ids, positions = conversation.prompt(), generator.config.max_positions
    if len(ids) >= positions:
        say(f"the conversation has {len(ids)} tokens, the model {positions} positions: try /reset")
        conversation.messages.pop()
        return
    stream = Stream(Text(conversation.tokenizer))
    most = min(how["max_tokens"], positions - len(ids))
    with contextlib.suppress(KeyboardInterrupt):
        generator.generate([ids], **{**how, "max_tokens": most, "seed": seed}, on_token=stream.take)
    stream.close()
    conversation.say("assistant", stream.text.text)
    say(stream.rate())


def _read() -> str | None:
    """The next line of the input; None at its end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - enables line editing and history
    try:
        return input("> ").strip()
    except EOFError:
        return None
