"""What the demo does, and where its model is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import epmesh_server
from epmesh.errors import InvalidRequest

PROMPTS = (
    "In the beginning God created the heaven",
    "And it came to pass in those days",
    "The LORD is my shepherd",
    "Blessed are they that",
    "And Moses said unto the children of Israel",
    "Then Jesus answered and said unto them",
    "The fear of the LORD is",
    "And I saw a new heaven",
)
MAX_STEPS = 200  # with a prompt before them they fit the model's context of 256 tokens
_EXAMPLE = Path("examples", "moe_lm")


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """The run: its mesh, and what is generated.

    Attributes:
        num_steps: tokens to add to every prompt.
        temperature: of the sampling; each prompt draws from a generator seeded with `first_seed` plus its number, so
            that the text does not depend on which rank it is made on. With the defaults no choice of a token or of an
            expert is a near tie that rounding could decide; a test holds that.
        num_routers: of the second act, each with a part of the prompts.
        served_experts: the factory of what its ranks serve.
        exchange_timeout_s: how long a rank waits for another one, and a router for its sums.
    """

    nodes: int = 2
    ranks_per_node: int = 2
    prompts: tuple[str, ...] = PROMPTS
    num_steps: int = 64
    temperature: float = 0.6
    first_seed: int = 24
    num_routers: int = 2
    served_experts: str = "examples.moe_lm.serving:experts"
    exchange_timeout_s: float = 15.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise InvalidRequest(f"{self.num_steps} tokens a prompt; ask for 1 to {MAX_STEPS}")

    @property
    def world_size(self) -> int:
        """Ranks of the mesh."""
        return self.nodes * self.ranks_per_node

    @property
    def num_tokens(self) -> int:
        """Most tokens that are generated."""
        return len(self.prompts) * self.num_steps

    def share(self, rank: int) -> range:
        """Numbers of the prompts that `rank` continues."""
        return self._part(rank, self.world_size)

    def router_share(self, router: int) -> range:
        """Numbers of the prompts that `router` continues in the second act."""
        return self._part(router, self.num_routers)

    def _part(self, index: int, count: int) -> range:
        start, stop = (position * len(self.prompts) // count for position in (index, index + 1))
        return range(start, stop)

    def seeds(self, prompts: range) -> range:
        """Seeds of consecutive prompts."""
        return range(self.first_seed + prompts.start, self.first_seed + prompts.stop)


def find_checkout(package: Path | None = None) -> Path:
    """The source tree this code runs from: the model is part of it, and of no wheel.

    Args:
        package: where ``epmesh_server`` is; default: where it was imported from.

    Raises:
        InvalidRequest: there is no model.
    """
    package = package or Path(epmesh_server.__file__).resolve().parent
    root = package.parent.parent
    weights = root / _EXAMPLE / "weights.safetensors"
    if not weights.is_file():
        raise InvalidRequest(
            f"the demo's model is not here ({weights} is missing): it comes with the source tree, not with the"
            " installed package; run `make demo` in a checkout"
        )
    return root


def import_model(root: Path) -> ModuleType:
    """Imports the example from the source tree `root`, whatever else is named ``examples`` here."""
    if sys.path[:1] != [str(root)]:
        sys.path.insert(0, str(root))
    from examples import moe_lm

    return moe_lm
