"""Feedback in the database: one word per person and choice, kept with the rollout."""

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import text

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError
from trimtab_adapters.contract.feedback import Feedback
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage import database as database_module
from trimtab_server.storage.database import Database
from trimtab_server.storage.feedback import ChoiceName, SqlFeedback
from trimtab_server.storage.rollouts import SqlRolloutReader, insert_rollouts

pytestmark = pytest.mark.anyio

MakeRollout = Callable[..., Rollout]


class Desk(SqlFeedback):
    """Over a database; what is in `late` reaches it with a flush. The clock goes on by one second at each look."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, self.arrive, clock=self.tick)
        self.database = database
        self.late: list[Rollout] = []
        self.num_flushes = 0
        self.now = 100.0

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def insert(self, *rollouts: Rollout) -> None:
        with self.database.writing() as connection:
            insert_rollouts(self.database, connection, rollouts)

    async def arrive(self) -> None:
        self.num_flushes += 1
        self.insert(*self.late)

    async def read(self) -> dict[str, list[Feedback]]:
        reader = SqlRolloutReader(self.database)
        return {rollout.id: rollout.feedback async for rollout in reader.read(RolloutFilter())}


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


async def test_feedback_is_read_with_its_rollout(desk: Desk, make_rollout: MakeRollout) -> None:
    desk.insert(make_rollout("a", choice_index=0), make_rollout("b", choice_index=1))
    first = await desk.put(ChoiceName(1, completion_id="req-1"), rating=0.5, comment="nul \x00", user="ann")
    await desk.put(ChoiceName(1, completion_id="req-1"), preferred_index=0)
    assert (first.completion_id, first.rollout_id, first.index) == ("req-1", "b", 1)
    assert await desk.read() == {
        "a": [],
        "b": [
            Feedback(rating=0.5, comment="nul \x00", user="ann", created_at=101.0, updated_at=101.0),
            Feedback(preferred_index=0, created_at=102.0, updated_at=102.0),
        ],
    }


async def test_the_next_word_of_the_same_one_takes_the_place_of_the_last(desk: Desk, make_rollout: MakeRollout) -> None:
    desk.insert(make_rollout("a", choice_index=0))
    for user in ("ann", None):
        await desk.put(ChoiceName(0, completion_id="req-1"), rating=1.0, comment="good", user=user)
        stored = await desk.put(ChoiceName(0, completion_id="req-1"), rating=-1.0, user=user)
        assert (stored.feedback.rating, stored.feedback.comment, stored.feedback.user) == (-1.0, None, user)
        assert stored.feedback.updated_at == stored.feedback.created_at + 1.0
    assert len((await desk.read())["a"]) == 2


async def test_a_rollout_that_is_still_on_its_way_is_waited_for(desk: Desk, make_rollout: MakeRollout) -> None:
    desk.late = [make_rollout("a", choice_index=0)]
    await desk.put(ChoiceName(0, completion_id="req-1"), rating=1.0)
    await desk.put(ChoiceName(0, completion_id="req-1"), rating=0.5)
    assert desk.num_flushes == 1


async def test_what_was_not_returned_or_is_not_logged_cannot_be_rated(desk: Desk, make_rollout: MakeRollout) -> None:
    desk.insert(make_rollout("a", chosen=False), make_rollout("b", request_id="req-2", choice_index=0))
    for name in (ChoiceName(0, completion_id="req-1"), ChoiceName(1, completion_id="req-2"), ChoiceName(0, "none")):
        with pytest.raises(NotFoundError) as error:
            await desk.put(name, rating=1.0)
        assert (error.value.param, error.value.code) == ("completion_id", "completion_not_found")


async def test_the_callers_own_request_id_names_an_answer_unless_several_have_it(
    desk: Desk, make_rollout: MakeRollout
) -> None:
    desk.insert(make_rollout("a", choice_index=0, metadata={"x_request_id": "mine"}))
    assert (await desk.put(ChoiceName(0, request_id="mine"), rating=1.0)).completion_id == "req-1"
    with pytest.raises(NotFoundError) as error:
        await desk.put(ChoiceName(0, request_id="theirs"), rating=1.0)
    assert error.value.param == "request_id"
    desk.insert(make_rollout("b", request_id="req-2", choice_index=0, metadata={"x_request_id": "mine"}))
    with pytest.raises(InvalidRequestError, match="Several answers") as ambiguous:
        await desk.put(ChoiceName(0, request_id="mine"), rating=1.0)
    assert ambiguous.value.code == "ambiguous_request_id"


async def test_the_preferred_choice_is_one_of_the_same_prompt(desk: Desk, make_rollout: MakeRollout) -> None:
    for index in range(4):  # two choices of each of two prompts
        desk.insert(make_rollout(f"{index}", choice_index=index, metadata={"prompt_index": index // 2}))
    stored = await desk.put(ChoiceName(2, completion_id="req-1"), preferred_index=3)
    assert stored.feedback.preferred_index == 3
    for other in (1, 4):
        with pytest.raises(InvalidRequestError, match="no choice of the same prompt"):
            await desk.put(ChoiceName(2, completion_id="req-1"), preferred_index=other)


async def test_deleted_rollouts_take_their_feedback_with_them(desk: Desk, make_rollout: MakeRollout) -> None:
    desk.insert(make_rollout("a", choice_index=0))
    await desk.put(ChoiceName(0, completion_id="req-1"), rating=1.0)
    with desk.database.writing() as connection:
        connection.execute(text("DELETE FROM rollouts"))
        for table in ("feedback", "rollout_rewards", "rollout_adapters"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0


async def test_rewards_and_request_ids_of_earlier_rollouts_are_found(database_url: str) -> None:
    database = Database(database_url)
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).parent / "migrations"))
    if database.is_sqlite and (file := database.engine.url.database):
        Path(file).parent.mkdir(parents=True)
    rewards = '[{"name":"r","version":"1","raw":%s,"calibrated":0.5}]'
    with database.writing() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0005")
        for number in range(2100):  # more than two batches
            connection.execute(
                text(
                    "INSERT INTO rollouts (id, schema_version, request_id, created_at, duration_s, route, base_model, "
                    "endpoint, prompt_token_ids, output_text, output_token_ids, steering, sampling, candidate_index, "
                    "num_candidates, chosen, rewards, metadata) VALUES (:id, 1, :id, 1.0, 0.1, 'r', 'b', "
                    "'completions', :ids, '', :ids, '[]', '{}', 0, 1, true, :rewards, :metadata)"
                ),
                {
                    "id": f"{number:04}",
                    "ids": b"",
                    "rewards": rewards % ("NaN" if number == 7 else number),
                    "metadata": '{"x_request_id":"mine"}' if number == 2050 else "{}",
                },
            )
    database.migrate()
    reader = SqlRolloutReader(database)
    where = RolloutFilter(reward="r", min_reward=2098.0, max_calibrated=0.5)
    assert [rollout.id async for rollout in reader.read(where)] == ["2098", "2099"]
    assert len([rollout async for rollout in reader.read(RolloutFilter(reward="r"))]) == 2100
    with database.reading() as connection:
        found = connection.execute(text("SELECT id FROM rollouts WHERE x_request_id = 'mine'")).scalars().all()
    assert found == ["2050"]
    database.close()
