"""Benchmark scores: a model as EleutherAI's lm-evaluation-harness (`lm_eval`) expects it.

:class:`Scores` answers the harness's requests and does not import it. :func:`evaluate` runs the harness on a
model and needs ``pip install slim-jax[scores]``. Neither needs PyTorch.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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


class Scores:
    """A model that answers the three kinds of requests of the harness's ``LM``, in the requests' order.

    Args:
      model: the decoder, dense or packed.
      tokenizer: the model's tokenizer.
    """

    def __init__(self, model: Decoder, tokenizer: Any) -> None:
        super().__init__()  # calls the harness's LM.__init__ where that class is mixed in
        self.model, self.tokenizer, self.config = model, tokenizer, model.config

    @functools.cached_property
    def reader(self) -> Reader:
        return Reader(self.model)

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.model)

    @property
    def prefix(self) -> int:
        """Token that precedes a text without context.

        Raises:
          ConvertError: the tokenizer has neither a BOS nor an EOS token.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ConvertError("the tokenizer has neither bos_token nor eos_token, expected one")

    def loglikelihood(self, requests: Requests) -> list[tuple[float, bool]]:
        """Log-probability of each ``(context, continuation)``, and whether it is the greedy one."""
        pairs = [self._pair(*request.args) for request in requests]
        found = self._judge("log-likelihoods", pairs)
        for request, result in zip(requests, found):
            self._keep("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: Requests) -> list[float]:
        """Log-probability of all tokens of each ``(text,)``, in windows as long as the model allows."""
        windows = [list(self._windows(self._encode(request.args[0]))) for request in requests]
        judged = iter(self._judge("windows", list(itertools.chain(*windows))))
        found = [float(sum(log_p for log_p, _ in itertools.islice(judged, len(own)))) for own in windows]
        for request, result in zip(requests, found):
            self._keep("loglikelihood_rolling", request.args, result)
        return found

    def generate_until(self, requests: Requests) -> list[str]:
        """Text that the model writes for each ``(context, options)``, up to one of ``options["until"]``."""
        found: dict[int, str] = {}
        ids = [self._encode(request.args[0]) or [self.prefix] for request in requests]

        def options(index: int) -> str:
            return json.dumps(requests[index].args[1], sort_keys=True)

        order = sorted(range(len(requests)), key=lambda index: (options(index), -len(ids[index])))
        with progress("texts", len(requests)) as advance:
            for _, alike in itertools.groupby(order, key=options):
                for batch in itertools.batched(alike, ROWS):
                    texts = self._write([ids[index] for index in batch], requests[batch[0]].args[1])
                    for index, text in zip(batch, texts):
                        found[index] = text
                        self._keep("generate_until", requests[index].args, text)
                        advance()
        return [found[index] for index in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """Name that distinguishes this tokenizer's chat template in the harness's cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the model's own chat template, if one is asked for."""
        return self.tokenizer.chat_template if chat_template else None

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

    def _encode(self, text: str, **how: Any) -> Ids:
        """Returns token ids; no special tokens are added to a text that already begins with the prefix."""
        if not how and text.startswith(self.tokenizer.decode([self.prefix])):
            how = {"add_special_tokens": False}
        return list(self.tokenizer(text, verbose=False, **how)["input_ids"])

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Returns the tokens of both, encoded together and split where the context alone ends.

        Tokens may cross the border, and spaces go with the word that follows, as in the harness's own models.
        """
        if not context.strip():
            continuation = context + continuation
            whole = self._encode(continuation, add_special_tokens=False)
            split = 1
            whole = whole if whole[:1] == [self.prefix] else [self.prefix, *whole]
        else:
            bare = context.rstrip()
            whole = self._encode(context + continuation)
            split = len(self._encode(bare))
        if len(whole) <= split or split == 0:
            raise ConvertError(
                f"the continuation {continuation!r} has no tokens of its own after {context[-20:]!r}"
            )
        return whole[:split], whole[split:]

    def _windows(self, tokens: Ids) -> Iterator[tuple[Ids, Ids]]:
        """Yields contexts and continuations such that each of ``tokens`` is predicted once.

        The last window's context is as long as the positions allow. The text always follows :attr:`prefix`,
        even where its tokens already begin with it: the harness counts this way.
        """
        most, begun = self.config.max_positions, [self.prefix, *tokens]
        for start in range(0, len(tokens), most):
            end = min(start + most, len(tokens))
            first = 0 if start == 0 else end - most
            yield begun[first : start + 1], begun[start + 1 : end + 1]

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

    def _keep(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        """Stores a result in the harness's cache of answers, if it has one."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(kind, args, result)


def require_harness() -> None:
    """Checks that the harness is installed.

    Raises:
      ConvertError: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConvertError("scores need the package lm_eval: pip install 'slim-jax[scores]'")


@functools.cache
def harness_class() -> type:
    """Returns the harness's model class, and registers it as ``slim-jax`` with the argument ``pretrained``.

    Raises:
      ConvertError: lm_eval is not installed.
    """
    require_harness()
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    class HarnessScores(Scores, LM):
        """:class:`Scores` as a model class of the harness, which creates it from ``pretrained=SOURCE``."""

        def __init__(
            self,
            model: Decoder | None = None,
            tokenizer: Any = None,
            *,
            pretrained: str | None = None,
            batch_size: Any = None,  # the harness always passes these three; they are ignored
            max_batch_size: Any = None,
            device: Any = None,
        ) -> None:
            if model is None:
                if pretrained is None:
                    raise ConvertError(f"{NAME} has no model, expected pretrained=SOURCE among the arguments")
                source = open_model(pretrained)
                model, tokenizer = read_decoder(source), source_tokenizer(source)
            super().__init__(model, tokenizer)

    return register_model(NAME)(HarnessScores)


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
      ConvertError: lm_eval is not installed, or a task does not exist.
    """
    require_harness()
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks, which breaks with JAX's threads
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints tables and notes
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if folder is None else str(folder))
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise ConvertError(_unknown(unknown[0], manager.all_tasks))
        model = harness_class()(read_decoder(source), source_tokenizer(source))
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
