"""What the node does on its ranks' pages in each step of a commit, told by a fake coordinator."""

from __future__ import annotations

import pytest

from epmesh.errors import InvalidRequest, StaleEpoch
from epmesh.v1 import membership_service_pb2, rank_service_pb2
from epmesh.v1.view_pb2 import RANK_MODE_SERVE as SERVE
from tests.integration.fake_coordinator import EP, WORLD
from tests.integration.node_under_test import mesh
from tests.integration.waiting import on_event_loop, until


@on_event_loop
async def test_prepare_raises_fences_before_it_reads_what_has_begun() -> None:
    async with mesh() as m:
        first, second = await m.rank(1), await m.rank(2)
        await m.commit(1, [0, 1])
        pages = [await first.page(), await second.page()]
        rows = [page.open_group(EP, 0) for page in pages]
        rows[0].begun, rows[1].begun = 7, 5
        rows[0].completed, rows[1].completed = 4, 3
        prepared = await m.session.prepare(2)
        assert [page.fence for page in pages] == [2, 2]
        assert [page.committed for page in pages] == [1, 1]
        shown = {entry.group_id: (entry.begun, entry.completed) for entry in prepared.progress}
        assert shown == {WORLD: (0, 0), EP: (7, 3)}


@on_event_loop
async def test_prepare_shows_the_coordinators_losses() -> None:
    async with mesh() as m:
        first, _ = await m.rank(1), await m.rank(2)
        await m.commit(1, [0, 1])
        page = await first.page()
        await m.session.prepare(2, lost=[1, 99])
        assert page.lost() == {1}  # 99 is in no view


@pytest.mark.parametrize("counter", ["dispatched", "completed"])
@on_event_loop
async def test_finish_waits_until_the_cut_is_reached(counter: str) -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        page = await rank.page()
        row = page.open_group(EP, 0)
        row.begun = 2
        row.dispatched = row.completed = 1
        await m.session.prepare(2)
        m.session.finish(2, {EP: 2}, members_unchanged=counter == "dispatched")
        await until(lambda: page.cut_epoch == 2)
        assert row.cut == 2
        assert m.session.reports.empty()
        setattr(row, counter, 2)
        finished = await m.session.expect("finished")
        assert finished.epoch == 2


@on_event_loop
async def test_finish_gives_up_at_its_time_limit() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        row = (await rank.page()).open_group(EP, 0)
        row.begun = 2
        await m.session.prepare(2)
        m.session.finish(2, {EP: 2}, timeout_s=0.05)
        finished = await m.session.expect("finished")
        assert {entry.group_id: entry.completed for entry in finished.progress}[EP] == 0


@on_event_loop
async def test_finish_with_abort_waits_for_nobody() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        page = await rank.page()
        page.open_group(EP, 0).begun = 2
        await m.session.prepare(2)
        m.session.finish(2, {EP: 2}, abort=True)
        await m.session.expect("finished")
        assert page.abort_epoch == 2


@on_event_loop
async def test_a_rank_that_begins_after_finish_still_finds_the_cut() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        page = await rank.page()
        await m.session.prepare(2)
        m.session.finish(2, {EP: 3}, members_unchanged=True)
        await m.session.expect("finished")
        row = page.open_group(EP, 0)
        row.begun = 1
        await until(lambda: row.cut == 3)


@on_event_loop
async def test_another_prepare_ends_a_wait_for_the_cut() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        page = await rank.page()
        page.open_group(EP, 0).begun = 2
        await m.session.prepare(2)
        m.session.finish(2, {EP: 2})
        await until(lambda: page.cut_epoch == 2)
        assert (await m.session.prepare(3)).epoch == 3
        assert page.fence == 3
        m.session.finish(3, {EP: 2}, abort=True)
        assert (await m.session.expect("finished")).epoch == 3


@on_event_loop
async def test_commit_shows_the_epoch_and_sends_the_view() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        page = await rank.page()
        await m.commit(5, [0])
        assert (await rank.view(5)).epoch == 5
        assert page.committed == 5
        assert page.fence >= 5
        late = await m.rank(2)
        assert (await late.view(5)).epoch == 5
        assert (await late.page()).committed == 5


@on_event_loop
async def test_commit_clears_losses_that_the_view_no_longer_has() -> None:
    async with mesh() as m:
        first, second = await m.rank(1), await m.rank(2)
        await m.commit(1, [0, 1])
        page = await first.page()
        await second.hang_up()
        await until(lambda: page.lost() == {1})
        await m.commit(2, [0])
        assert page.lost() == frozenset()
        assert page.committed == 2


@on_event_loop
async def test_a_rank_that_dies_while_its_view_is_being_committed_stays_lost() -> None:
    async with mesh() as m:
        first, second = await m.rank(1), await m.rank(2)
        await m.session.expect_ranks([0, 1])
        view = m.session.make_view(1)
        await second.hang_up()
        await m.session.expect_ranks([0])
        await m.session.commit(view)
        assert (await first.page()).lost() == {1}


@on_event_loop
async def test_a_member_that_a_view_leaves_out_is_evicted() -> None:
    async with mesh() as m:
        first, second = await m.rank(1), await m.rank(2)
        await m.commit(1, [0, 1])
        page, kept = await second.page(), await first.page()
        del m.session.ranks[1]
        await m.session.commit(m.session.make_view(2))
        assert page.closed
        assert not kept.closed
        with pytest.raises(StaleEpoch, match="rank 1 is no member of epoch 2"):
            await second.view(3)
        await m.session.expect_ranks([0])


@on_event_loop
async def test_evict_ends_the_named_process_with_its_reason() -> None:
    async with mesh() as m:
        await m.rank(1)
        second = await m.rank(2)
        await m.session.expect_ranks([0, 1])
        refusal = InvalidRequest("layer 3 has 8 experts, not 9")
        stale = membership_service_pb2.RankIncarnation(rank=0, incarnation=99)
        named = membership_service_pb2.RankIncarnation(rank=1, incarnation=2)
        m.session.command(evict=membership_service_pb2.Evict(error=refusal.to_proto(), ranks=[stale, named]))
        with pytest.raises(InvalidRequest, match="layer 3 has 8 experts"):
            await second.view(1)
        await m.session.expect_ranks([0])


@on_event_loop
async def test_unreachable_peers_are_passed_on_under_the_reporters_number() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        failure = membership_service_pb2.LinkFailure(target=9, target_incarnation=4)
        await rank.send(unreachable=rank_service_pb2.UnreachablePeers(failures=[failure]))
        while not (report := await m.session.expect("links")).failures:
            pass
        assert [(one.reporter, one.target, one.target_incarnation) for one in report.failures] == [(0, 9, 4)]
        await rank.hang_up()
        assert not (await m.session.expect("links")).failures


@on_event_loop
async def test_another_mode_and_front_are_reported_to_the_coordinator() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.session.expect_ranks([0])
        await rank.send(update=rank_service_pb2.UpdateRank(mode=SERVE, front_endpoint="tcp://127.0.0.1:9"))
        (shown,) = (await m.session.expect("ranks")).ranks
        assert (shown.rank.mode, shown.rank.front_endpoint) == (SERVE, "tcp://127.0.0.1:9")


@on_event_loop
async def test_a_mode_that_does_not_exist_ends_the_session_with_the_reason() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await rank.send(update=rank_service_pb2.UpdateRank(mode=77))  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="rank mode is 77"):
            await rank.view(1)
        await m.session.expect_ranks([])
