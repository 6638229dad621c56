"""``slim-jax generate``."""

from typing import Annotated

import typer

from convert.cli.options import SourceArgument
from convert.cli.sources import encode, open_source, require_positions, tokenizer_of, whole_decoder
from convert.display import Stream


def generate(
    source: SourceArgument,
    prompt: Annotated[
        list[str], typer.Option(show_default=False, metavar="TEXT", help="May be given several times.")
    ],
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="At most this many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Draw from the likeliest tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> None:
    """Continue a prompt, token by token to the terminal.

    slim-jax generate out/q2 --prompt "The capital of France is" --max-tokens 32

    slim-jax generate out/q3 --prompt "Once" --prompt "Never" --temperature 0.8 --top-p 0.95
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"--top-p is {top_p}, expected more than 0 and at most 1")
    from slim_jax.model.generate import generate as run_generate

    opened = open_source(source)
    tokenizer = tokenizer_of(source, opened)
    prompts = [encode(tokenizer, text) for text in prompt]
    for text, ids in zip(prompt, prompts):
        if not ids:
            raise ValueError(f"--prompt {text!r} has no tokens, expected some text")
        require_positions("prompt and --max-tokens together", len(ids) + max_tokens, opened)
    model = whole_decoder(source, opened)
    stream = Stream(tokenizer, prompt) if len(prompt) == 1 else None
    texts = run_generate(
        model,
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=list(opened.config.eos_token_ids),
        on_token=None if stream is None else stream.take,
    )
    if stream is not None:
        stream.close()
        return
    for text, ids in zip(prompt, texts):
        typer.echo(text + tokenizer.decode(ids, skip_special_tokens=True))
        typer.echo("")
