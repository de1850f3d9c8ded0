"""A run that starts from another one's weights."""

import logging

from configs.build import build_data, build_model
from configs.runs import start_from
from tests.commands import resolved
from tests.scripts.runs import SMALL, make_run, write_books


def test_a_run_that_reads_the_sequences_of_its_weights_in_the_same_order_says_so(tmp_path, caplog):
    """Another seed, length or packing gives other sequences in another order."""
    books = write_books(tmp_path / "books")
    run = make_run(tmp_path, books)
    place = ("data=files", f"data.path={books}", f"data.cache={tmp_path / 'cache'}", f"init_from={run}")
    others = ["data.seed=9", "data.sequence_length=128", "data.packing=best_fit"]
    for changes in ([], *([each] for each in others)):
        config = resolved(*SMALL, *place, *changes)
        data = build_data(config["data"])
        data.setup()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            start_from(str(run), build_model(config, data.vocabulary), data)
        found = [line for line in caplog.messages if "in another order" in line]
        assert len(found) == (not changes), changes
        assert changes or (f"init_from={run}" in found[0] and f"data.seed={data.seed + 1} " in found[0])
