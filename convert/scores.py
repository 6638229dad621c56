"""Benchmark scores: a model as EleutherAI's lm-evaluation-harness (`lm_eval`) expects it.

Importing this module needs ``pip install slim-jax[scores]``, and registers the model class :class:`Scores` as
``slim-jax``. :func:`evaluate` runs the harness on a model. Neither needs PyTorch.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from convert.display import progress
from convert.errors import ConvertError, listed
from convert.readers.load import open_model, source_tokenizer
from convert.text import Text, as_template
from slim_jax.eval.likelihood import judge
from slim_jax.eval.perplexity import Reader
from slim_jax.infer.generate import Generator
from slim_jax.model.decoder import Decoder
from slim_jax.store.source import Source, read_decoder

NAME = "slim-jax"
ROWS = 16
"""Generation requests that are answered at once in one batch."""
MAX_TOKENS = 256
"""Tokens of an answer if the task sets no limit: the harness's own default."""
HOW_LONG = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Ids = list[int]
Requests = Sequence[Any]
"""The harness's ``Instance`` objects; only ``args`` is read."""


@register_model(NAME)
class Scores(TemplateLM):
    """A model of the harness; it answers each kind of requests in the requests' order.

    Args:
      model: the decoder, dense or packed; None to open ``pretrained``.
      tokenizer: the model's tokenizer.
      pretrained: a SOURCE of the command line, as the harness's ``pretrained=SOURCE``.
      batch_size, max_batch_size, device: given by the harness, and ignored.
    """

    def __init__(
        self,
        model: Decoder | None = None,
        tokenizer: Any = None,
        *,
        pretrained: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if model is None:
            if pretrained is None:
                raise ConvertError(f"{NAME} has no model, expected pretrained=SOURCE among the arguments")
            source = open_model(pretrained)
            model, tokenizer = read_decoder(source), source_tokenizer(source)
        self.model, self.tokenizer, self.config = model, tokenizer, model.config

    @functools.cached_property
    def reader(self) -> Reader:
        return Reader(self.model)

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.model)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token that precedes a text without context.

        Raises:
          ConvertError: the tokenizer has neither a BOS nor an EOS token.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ConvertError("the tokenizer has neither bos_token nor eos_token, expected one")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """Returns token ids; no special tokens are added to a text that already begins with the prefix."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], Ids, Ids]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        for (context, continuation), _, ids in requests:
            if not ids:
                raise ConvertError(
                    f"the continuation {continuation!r} has no tokens of its own after {context[-20:]!r}"
                )
        pairs = [(context or [self.prefix_token_id], after) for _, context, after in requests]
        found = self._judge("log-likelihoods", pairs)
        for (texts, *_), result in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: Requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of all tokens of each ``(text,)``, in windows as long as the model allows."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.config.max_positions, 1
                )
            ]
            for request in requests
        ]
        judged = iter(self._judge("windows", list(itertools.chain(*windows))))
        found = [float(sum(log_p for log_p, _ in itertools.islice(judged, len(own)))) for own in windows]
        for request, result in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def generate_until(self, requests: Requests, disable_tqdm: bool = False) -> list[str]:
        """Text that the model writes for each ``(context, options)``, up to one of ``options["until"]``."""
        found: dict[int, str] = {}
        ids = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]

        def options(index: int) -> str:
            return json.dumps(requests[index].args[1], sort_keys=True)

        order = sorted(range(len(requests)), key=lambda index: (options(index), -len(ids[index])))
        with progress("texts", len(requests)) as advance:
            for _, alike in itertools.groupby(order, key=options):
                for batch in itertools.batched(alike, ROWS):
                    texts = self._write([ids[index] for index in batch], requests[batch[0]].args[1])
                    for index, text in zip(batch, texts):
                        found[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                        advance()
        return [found[index] for index in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """Name that distinguishes this tokenizer's chat template in the harness's cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation with the model's chat template."""
        return as_template(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _judge(self, what: str, pairs: list[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        with progress(what, len(pairs)) as advance:

            def judged(count: int) -> None:
                for _ in range(count):
                    advance()

            return [(log_p, greedy) for log_p, greedy in judge(self.reader, pairs, on_judged=judged)]

    def _write(self, prompts: list[Ids], options: dict[str, Any]) -> list[str]:
        """Generates texts for prompts that share their options; pads the batch to a power of two."""
        most = int(next((options[name] for name in HOW_LONG if options.get(name) is not None), MAX_TOKENS))
        room = self.config.max_positions - most
        if room < 1:
            raise ConvertError(
                f"a task asks for {most} tokens, the model has {self.config.max_positions} positions"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        special = self.tokenizer.get_added_vocab()  # decoded text lacks added tokens: match by id
        stop = {*self.config.eos_token_ids, *(special[text] for text in until if text in special)}
        if self.tokenizer.eos_token_id is not None:
            stop.add(self.tokenizer.eos_token_id)
        sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not options.get("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0.0
        elif "temperature" not in sampling:
            sampling["temperature"] = 1.0
        texts = [Text(self.tokenizer, [text for text in until if text]) for _ in prompts]
        rows = 1 << (len(prompts) - 1).bit_length()
        filled = [prompt[-room:] for prompt in [*prompts, *prompts[:1] * (rows - len(prompts))]]

        def take(row: int, token: int) -> bool:
            return row >= len(texts) or texts[row].take(token)

        self.generator.generate(filled, max_tokens=most, stop=sorted(stop), on_token=take, **sampling)
        return [text.text for text in texts]


def evaluate(
    source: Source,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs the harness on a model, dense or packed, and returns its results.

    Args:
      source: the model, with a tokenizer.
      tasks: names of tasks, groups of tasks, or tags.
      limit: maximum number of questions of each task; None for all.
      fewshot: solved questions before each question; None for the task's own number.
      folder: folder with more tasks, YAML files of the harness's kind.

    Returns:
      The measures of each task and group, by the harness's names (``acc,none``).

    Raises:
      ConvertError: a task does not exist.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks, which breaks with JAX's threads
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints tables and notes
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if folder is None else str(folder))
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise ConvertError(_unknown(unknown[0], manager.all_tasks))
        model = Scores(read_decoder(source), source_tokenizer(source))
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=fewshot,
            task_manager=manager,
            log_samples=False,
        )
    return {
        task: {name: value for name, value in measures.items() if name != "alias" and value != " "}
        for task, measures in found["results"].items()
    }


def _unknown(task: str, tasks: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(task, tasks, n=4) or [name for name in tasks if task in name]
    hint = f"near names: {listed(near, 4)}" if near else f"it has {len(tasks)} tasks"
    return f"lm_eval has no task {task}, {hint}"
