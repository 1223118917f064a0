"""Text out of prompts: the model's dense part here, its experts wherever the router finds them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import epmesh
from epmesh import DeadlineExceeded, InvalidRequest, Overloaded
from examples.moe_lm.numpy_model import ExpertRows, Floats, NumpyModel, SequenceCache
from examples.moe_lm.tokenizer import Tokenizer

_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TextGenerator:
    """Continues prompts greedily; any number of them at once, on one event loop.

    Each sequence sends its own rows. Those of sequences that are under way together meet at the ranks, which compute
    together what waits there.
    """

    def __init__(self, router: epmesh.AsyncRouter, model: NumpyModel, tokenizer: Tokenizer) -> None:
        self._router, self._model, self._tokenizer = router, model, tokenizer

    def encode(self, prompt: str, max_tokens: int) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InvalidRequest: prompt and continuation do not fit into the model's context.
        """
        tokens = [self._tokenizer.end, *self._tokenizer.encode(prompt)]
        context = self._model.config.context
        if len(tokens) + max_tokens - 1 > context:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens and max_tokens is {max_tokens}; the model takes {context}, so "
                f"ask for less or shorten the prompt"
            )
        return tokens

    async def pieces(self, prompt: list[int], max_tokens: int, deadline: float) -> AsyncGenerator[str]:
        """The continuation as it grows, in pieces that are whole characters.

        Args:
            deadline: ``time.monotonic`` value.

        Raises:
            EpmeshError: as `epmesh.AsyncRouter.forward`.
        """
        tokens: list[int] = []
        given = 0
        async with aclosing(self._tokens(prompt, max_tokens, deadline)) as growing:
            async for token in growing:
                tokens.append(token)
                text = self._tokenizer.decode(tokens)
                if not text.endswith(_CUT_CHARACTER):  # the rest of its bytes is yet to come
                    yield text[given:]
                    given = len(text)
        if rest := self._tokenizer.decode(tokens)[given:]:
            yield rest

    async def _tokens(self, prompt: list[int], max_tokens: int, deadline: float) -> AsyncGenerator[int]:
        cache, tokens = SequenceCache(), prompt
        for _ in range(max_tokens):
            logits = await self._advance(tokens, cache, deadline)
            token = int(logits.argmax())
            if token == self._tokenizer.end:
                return
            yield token
            tokens = [token]

    async def _advance(self, tokens: list[int], cache: SequenceCache, deadline: float) -> Floats:
        one, begun = self._model.advance(tokens, cache), cache.length > 0
        try:
            rows = next(one)
            while True:
                rows = one.send(await self._ask(rows, deadline, begun or rows.layer > 0))
        except StopIteration as done:
            logits: Floats = done.value
            return logits

    async def _ask(self, rows: ExpertRows, deadline: float, begun: bool) -> Floats:
        """Has the experts work on rows; where ranks are overloaded, what was begun waits and what was not is refused:
        work that is thrown away would make it worse."""
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(message="the request's time is over")
            try:
                sums: Floats = await self._router.forward(
                    rows.hidden_states, rows.topk_weights, rows.topk_ids, layer=rows.layer, timeout=left_s
                )
                return sums
            except Overloaded as error:
                if not begun or time.monotonic() + error.retry_after_s > deadline:
                    raise
                await asyncio.sleep(error.retry_after_s)
