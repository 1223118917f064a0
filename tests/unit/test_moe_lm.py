"""The example model: split over ranks it computes what it computes in one process, and it has learned English."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from torch import Tensor  # noqa: E402

from examples import moe_lm  # noqa: E402
from examples.moe_lm import corpus, evaluate, numpy_model, tokenizer, weights  # noqa: E402

WORLD_SIZE = 4
NUM_STEPS = 8
PROMPTS = ("And it came to pass", "The LORD", "In the beginning God created the heaven", "Blessed are", "He that")
SMALL = moe_lm.MoeConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, expert_size=16, context=32)
HELD_OUT = Path(evaluate.__file__).with_name("heldout.txt")


class FakeMesh:
    """A plain dispatch and combine between threads: everybody shows everything, everybody takes what it needs."""

    def __init__(self, shares: Sequence[Sequence[int]]) -> None:
        self.shares = shares
        self.barrier = threading.Barrier(len(shares), timeout=30)
        self.board: list[tuple[Tensor, ...]] = [()] * len(shares)

    def show(self, rank: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        self.board[rank] = tensors
        self.barrier.wait()
        seen = list(self.board)
        self.barrier.wait()
        return seen


class FakeCommunicator:
    """One rank of a `FakeMesh`; a row goes once to every rank that holds one of its experts."""

    def __init__(self, mesh: FakeMesh, rank: int) -> None:
        self.mesh, self.rank, self.world_size = mesh, rank, len(mesh.shares)
        self.num_exchanges = 0
        self.num_received_rows = 0

    def dispatch(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        shown = self.mesh.show(self.rank, hidden_states, topk_weights, topk_ids)
        self._routes = [[self._wanted(ids, share) for share in self.mesh.shares] for _, _, ids in shown]
        mine = [routes[self.rank] for routes in self._routes]
        columns = zip(*shown, strict=True)
        x, w, ids = (torch.cat([t[rows] for t, rows in zip(column, mine, strict=True)]) for column in columns)
        self.num_exchanges += 1
        self.num_received_rows += len(x)
        return x, w, ids

    def combine(self, hidden_states: Tensor) -> Tensor:
        shown = self.mesh.show(self.rank, hidden_states)
        own = self._routes[self.rank]
        total: Tensor = torch.zeros(len(own[0]), hidden_states.shape[1])
        for rank, (rows,) in enumerate(shown):
            start = sum(int(routes[rank].sum()) for routes in self._routes[: self.rank])
            total[own[rank]] += rows[start : start + int(own[rank].sum())]
        return total

    @staticmethod
    def _wanted(ids: Tensor, share: Sequence[int]) -> Tensor:
        wanted: Tensor = torch.isin(ids, torch.tensor(share)).any(dim=1)
        return wanted


def on_every_rank(body: Callable[[FakeCommunicator], moe_lm.Generation]) -> list[moe_lm.Generation]:
    mesh = FakeMesh([moe_lm.linear_share(16, WORLD_SIZE, rank) for rank in range(WORLD_SIZE)])
    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        return list(pool.map(body, [FakeCommunicator(mesh, rank) for rank in range(WORLD_SIZE)]))


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vocabulary() -> moe_lm.Tokenizer:
    return moe_lm.load_tokenizer()


@pytest.fixture(scope="module")
def reference() -> moe_lm.MoeLanguageModel:
    return moe_lm.load()


@pytest.fixture
def small_weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights.save(moe_lm.MoeLanguageModel(SMALL), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_model_split_over_four_ranks_generates_what_the_reference_does(
    reference: moe_lm.MoeLanguageModel, vocabulary: moe_lm.Tokenizer, temperature: float
) -> None:
    prompts = moe_lm.encode_prompts(vocabulary, PROMPTS)
    shares = [[0, 1], [2], [], [3, 4]]  # rank 2 has no sequence at all

    def run(comm: FakeCommunicator) -> moe_lm.Generation:
        mine = moe_lm.linear_share(16, comm.world_size, comm.rank)
        model = moe_lm.load(expert_ids=mine, backend=moe_lm.MeshExperts(comm))
        own = shares[comm.rank]
        generation = moe_lm.generate(
            model,
            [prompts[index] for index in own],
            end=vocabulary.end,
            num_steps=NUM_STEPS,
            temperature=temperature,
            seeds=own,
        )
        assert comm.num_exchanges == NUM_STEPS * model.config.num_layers
        assert comm.num_received_rows > 0
        return generation

    expected = moe_lm.generate(reference, prompts, end=vocabulary.end, num_steps=NUM_STEPS, temperature=temperature)
    for own, generation in zip(shares, on_every_rank(run), strict=True):
        assert torch.equal(generation.tokens, expected.tokens[own])
        torch.testing.assert_close(generation.logits, expected.logits[own], atol=1e-4, rtol=0)


def test_empty_batch_makes_every_exchange(small_weights: Path) -> None:
    calls: list[int] = []

    class Counting(moe_lm.LocalExperts):
        def forward(
            self, layer: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: moe_lm.Experts
        ) -> Tensor:
            calls.append(layer)
            return super().forward(layer, hidden_states, topk_weights, topk_ids, experts)

    generation = moe_lm.generate(moe_lm.load(small_weights, backend=Counting()), [], end=299, num_steps=3)
    assert generation.tokens.shape == (0, 3)
    assert generation.logits.shape == (0, 3, 300)
    assert calls == [0, 1] * 3


def test_shorter_prompts_in_a_batch_get_the_logits_they_get_alone(small_weights: Path) -> None:
    model = moe_lm.load(small_weights)
    prompts = [[299, 1, 2, 3, 4, 5], [299, 7], [299]]
    together = moe_lm.generate(model, prompts, end=-2, num_steps=4)
    for row, prompt in enumerate(prompts):
        alone = moe_lm.generate(model, [prompt], end=-2, num_steps=4)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=0)


def test_ended_sequences_have_no_tokens_and_cost_no_rows(small_weights: Path) -> None:
    model = moe_lm.load(small_weights)
    first = moe_lm.generate(model, [[299, 5], [299, 6, 7]], end=-2, num_steps=1).tokens[:, 0].tolist()
    generation = moe_lm.generate(model, [[299, 5], [299, 6, 7]], end=first[0], num_steps=4)
    assert generation.tokens[0].tolist() == [first[0], *[moe_lm.NO_TOKEN] * 3]
    assert not generation.logits[0, 1:].any()
    tokens = torch.tensor([[moe_lm.NO_TOKEN, 3], [4, 5]])
    routings: list[moe_lm.model.Routing] = []
    model(tokens, routings=routings)
    assert [len(routing.topk_ids) for routing in routings] == [3, 3]


def test_cached_steps_give_the_logits_of_one_full_pass(small_weights: Path) -> None:
    model = moe_lm.load(small_weights)
    generation = moe_lm.generate(model, [[299, 1, 2]], end=-2, num_steps=5)
    whole = model(torch.cat([torch.tensor([[299, 1, 2]]), generation.tokens[:, :-1]], dim=1))
    torch.testing.assert_close(generation.logits[0], whole[0, 2:], atol=1e-5, rtol=0)


def test_step_that_raised_can_be_repeated(small_weights: Path) -> None:
    class FailsOnce(moe_lm.LocalExperts):
        failures = 1

        def forward(
            self, layer: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: moe_lm.Experts
        ) -> Tensor:
            if layer == 1 and self.failures:
                self.failures -= 1
                raise ConnectionError("a peer is lost")
            return super().forward(layer, hidden_states, topk_weights, topk_ids, experts)

    def decoder(backend: moe_lm.ExpertBackend) -> moe_lm.Decoder:
        sampler = moe_lm.Sampler(0.8, [3])
        return moe_lm.Decoder(moe_lm.load(small_weights, backend=backend), [[299, 4]], sampler, end=299)

    shaken, steady = decoder(FailsOnce()), decoder(moe_lm.LocalExperts())
    with pytest.raises(ConnectionError):
        shaken.step()
    for _ in range(3):
        (token, logits), (expected_token, expected_logits) = shaken.step(), steady.step()
        assert torch.equal(token, expected_token)
        assert torch.equal(logits, expected_logits)


def test_generation_repeats_itself_for_the_same_seed_only(
    reference: moe_lm.MoeLanguageModel, vocabulary: moe_lm.Tokenizer
) -> None:
    def tokens(seed: int) -> list[int]:
        prompts = moe_lm.encode_prompts(vocabulary, ["And"])
        result = moe_lm.generate(reference, prompts, end=vocabulary.end, num_steps=12, temperature=1.0, seeds=[seed])
        chosen: list[int] = result.tokens[0].tolist()
        return chosen

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_callback_sees_the_tokens_grow(small_weights: Path) -> None:
    seen: list[Tensor] = []
    generation = moe_lm.generate(
        moe_lm.load(small_weights),
        [[299], [299]],
        end=-2,
        num_steps=3,
        on_step=lambda step, tokens: seen.append(tokens),
    )
    assert [tokens.shape for tokens in seen] == [(2, 1), (2, 2), (2, 3)]
    assert torch.equal(seen[-1], generation.tokens)


def test_text_longer_than_the_context_is_refused(small_weights: Path) -> None:
    with pytest.raises(ValueError, match="outgrow context 32"):
        moe_lm.generate(moe_lm.load(small_weights), [[299] * 30], end=-2, num_steps=4)


def test_share_holds_the_named_experts_only() -> None:
    whole = moe_lm.load_experts_share(moe_lm.WEIGHTS, range(16))
    for share, everything in zip(moe_lm.load_experts_share(moe_lm.WEIGHTS, [9, 2]), whole, strict=True):
        assert share.expert_ids == (9, 2)
        assert torch.equal(share.up, everything.up[[9, 2]])
        assert torch.equal(share.down, everything.down[[9, 2]])
    assert [share.up.shape[0] for share in moe_lm.load_experts_share(moe_lm.WEIGHTS, [])] == [0] * len(whole)


def test_loading_does_not_wake_the_compiler_of_torch() -> None:
    code = (
        "import sys; from examples import moe_lm; moe_lm.load(expert_ids=[3]); sys.exit('torch._dynamo' in sys.modules)"
    )
    root = Path(moe_lm.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=200, check=False).returncode == 0


def test_share_of_an_unknown_expert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts \[16\]"):
        moe_lm.load_experts_share(moe_lm.WEIGHTS, [3, 16])


def test_linear_shares_cover_every_expert_once() -> None:
    shares = [moe_lm.linear_share(16, 3, rank) for rank in range(3)]
    assert shares == [range(6), range(6, 11), range(11, 16)]


def test_served_shares_add_up_to_all_experts() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, moe_lm.load_config().hidden_size)
    ids = torch.tensor([[0, 9], [15, 3], [-1, 4], [-1, -1], [8, 7]])
    topk_weights = torch.rand(5, 2)
    parts = [
        moe_lm.ServedExperts(moe_lm.load_experts_share(moe_lm.WEIGHTS, share)) for share in (range(8), range(8, 16))
    ]
    whole = moe_lm.ServedExperts(moe_lm.load_experts_share(moe_lm.WEIGHTS, range(16)))
    total = sum(part(2, x, topk_weights, ids) for part in parts)
    torch.testing.assert_close(total, whole(2, x, topk_weights, ids), atol=1e-5, rtol=0)
    assert not whole(2, x, topk_weights, ids)[3].any()
    assert whole(2, x.bfloat16(), topk_weights, ids).dtype == torch.bfloat16
    assert parts[0](2, x[:0], topk_weights[:0], ids[:0]).shape == (0, x.shape[1])


def test_vocabulary_gives_back_any_text(vocabulary: moe_lm.Tokenizer) -> None:
    for text in (HELD_OUT.read_text(encoding="ascii"), "naïve 3.14\t(é)\n\n", ""):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_vocabulary_merges_the_most_frequent_pair_first() -> None:
    learned = tokenizer.train_tokenizer(["aab aab ab"], vocab_size=256 + 2 + 1)
    assert [learned.decode([token]) for token in (256, 257)] == ["ab", "aab"]
    assert learned.end == 258


def test_chapters_are_split_and_references_dropped() -> None:
    verses = "Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\nExo2:1 And there went.\n"
    assert corpus.split_chapters(verses) == ["In the beginning.\nAnd the earth.\n", "Thus.\n", "And there went.\n"]


def test_committed_weights_beat_every_unigram_on_held_out_text(
    reference: moe_lm.MoeLanguageModel, vocabulary: moe_lm.Tokenizer
) -> None:
    text = HELD_OUT.read_text(encoding="ascii")
    # Frequencies taken from the held-out text itself: no unigram model trained elsewhere can do better.
    best_unigram = evaluate.baselines(vocabulary, [text], [text])
    learned = evaluate.bits_per_byte(reference, vocabulary, [text])
    assert learned < 0.8 * best_unigram["token unigram"]
    assert learned < 0.6 * best_unigram["byte unigram"]


def test_numpy_form_predicts_what_the_model_does(
    reference: moe_lm.MoeLanguageModel, vocabulary: moe_lm.Tokenizer
) -> None:
    def all_experts(rows: numpy_model.ExpertRows) -> numpy_model.Floats:
        x, topk_weights = torch.from_numpy(rows.hidden_states), torch.from_numpy(rows.topk_weights)
        share = reference.layers[rows.layer].experts
        sums: numpy_model.Floats = moe_lm.run_expert_rows(
            share, x, topk_weights, torch.from_numpy(rows.topk_ids)
        ).numpy()
        return sums

    light = numpy_model.NumpyModel.load()
    for prompt in moe_lm.encode_prompts(vocabulary, PROMPTS):
        expected = moe_lm.generate(reference, [prompt], end=vocabulary.end, num_steps=NUM_STEPS)
        cache, tokens = numpy_model.SequenceCache(), prompt
        for step in range(NUM_STEPS):
            logits = numpy_model.run(light.advance(tokens, cache), all_experts)
            torch.testing.assert_close(torch.from_numpy(logits), expected.logits[0, step], atol=1e-4, rtol=0)
            tokens = [int(logits.argmax())]
            assert tokens[0] == expected.tokens[0, step]


def test_numpy_form_refuses_text_longer_than_the_context() -> None:
    light = numpy_model.NumpyModel.load()
    with pytest.raises(ValueError, match="outgrows the context of 256"):
        next(light.advance([1] * 257, numpy_model.SequenceCache()))


def test_numpy_form_needs_no_torch() -> None:
    code = (
        "import sys; from examples import moe_lm; from examples.moe_lm.config import load_config;"
        "moe_lm.NumpyModel.load(); moe_lm.load_tokenizer(); load_config(); sys.exit('torch' in sys.modules)"
    )
    root = Path(moe_lm.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=200, check=False).returncode == 0
