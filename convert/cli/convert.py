"""``slim-jax convert``."""

from convert.cli.options import DtypeOption, JsonOption, OutArgument, SourceArgument
from convert.cli.sources import keep_tokenizer, open_source, optional_tokenizer, require_new
from convert.display import print_result, progress


def convert(
    source: SourceArgument, out: OutArgument, dtype: DtypeOption = None, as_json: JsonOption = False
) -> None:
    """Convert a model to a slim-jax checkpoint, without quantizing it.

    Blocks are read and written one by one, so the model need not fit in memory.

      slim-jax convert models/Llama-3.2-1B out/llama

      slim-jax convert model.gguf out/model --dtype bfloat16
    """
    require_new(out)
    from slim_jax.run import checkpoint

    model = open_source(source, dtype)
    tokenizer = optional_tokenizer(model)
    with progress("converting", model.config.num_layers) as advance:
        checkpoint.save_source(model, out, on_block=lambda *_: advance())
    keep_tokenizer(tokenizer, out)
    result = {"path": str(out), "blocks": model.config.num_layers}
    print_result(result, f"{out}: {result['blocks']} blocks, not quantized", as_json)
