"""``slim-jax convert``."""

from convert.cli.options import DtypeOption, JsonOption, OutArgument, Revision, SourceArgument
from convert.cli.sources import at_revision, keep_tokenizer, open_source, optional_tokenizer
from convert.display import print_result, progress


def convert(
    source: SourceArgument,
    out: OutArgument,
    dtype: DtypeOption = None,
    revision: Revision = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model to a slim-jax checkpoint, without quantizing it.

    Blocks are read and written one by one, so the model need not fit in memory.

      slim-jax convert models/Llama-3.2-1B out/llama

      slim-jax convert model.gguf out/model --dtype bfloat16
    """
    from slim_jax.store.checkpoint import save_source
    from slim_jax.store.checkpoint_sink import require_new

    require_new(out)
    model = open_source(at_revision(source, revision), dtype)
    tokenizer = optional_tokenizer(model)
    with progress("converting", model.config.num_layers) as advance:

        def on_block(done: int, total: int) -> None:
            advance()
            if done == total:
                keep_tokenizer(tokenizer, out)  # before the checkpoint is declared complete

        save_source(model, out, on_block)
    result = {"path": str(out), "blocks": model.config.num_layers}
    print_result(result, f"{out}: {result['blocks']} blocks, not quantized", as_json)
