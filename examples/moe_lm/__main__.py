"""Continue prompts: in one process, the reference that a mesh is compared with, or with the experts on a mesh.

python -m examples.moe_lm "And it came to pass" --num-tokens 150 --temperature 0.7
python -m examples.moe_lm "And it came to pass" --router 127.0.0.1:7400
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from torch import Tensor

from .config import VOCABULARY, WEIGHTS
from .experts import RoutedExperts
from .generation import generate
from .model import MoeLanguageModel
from .tokenizer import encode_prompts, load_tokenizer
from .weights import load


def main() -> None:
    """Command line: print each prompt with its continuation, the first one as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--num-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--router", metavar="HOST:PORT", help="a node of a mesh whose ranks serve the experts")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--vocabulary", type=Path, default=VOCABULARY)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.vocabulary)

    def show(step: int, tokens: Tensor) -> None:
        print(tokenizer.decode(tokens[0, step:].tolist()), end="", flush=True)

    print(args.prompts[0], end="", flush=True)
    with contextlib.ExitStack() as stack:
        generation = generate(
            _load(args.weights, args.router, stack),
            encode_prompts(tokenizer, args.prompts),
            end=tokenizer.end,
            num_steps=args.num_tokens,
            temperature=args.temperature,
            seeds=range(args.seed, args.seed + len(args.prompts)),
            on_step=show,
        )
    for prompt, text in zip(args.prompts[1:], generation.texts(tokenizer)[1:], strict=True):
        print(f"\n\n{prompt}{text}", end="")
    print()


def _load(weights: Path, router: str | None, stack: contextlib.ExitStack) -> MoeLanguageModel:
    """The whole model, or all but its experts, which a mesh has; `stack` closes the router."""
    if router is None:
        return load(weights)
    import epmesh

    return load(weights, expert_ids=(), backend=RoutedExperts(stack.enter_context(epmesh.Router(router))))


if __name__ == "__main__":
    main()
