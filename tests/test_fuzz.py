"""A few seconds of the fuzzers that need no relay of their own; the long run is `python -m tests.fuzz`."""

import pytest

from tests.figures import figure
from tests.fuzz import answers, urls

FUZZERS = {
    "addresses": (urls.run_addresses, 2.0),
    "answers": (answers.run, 5.0),
    "proxies": (urls.run_proxies, 2.0),
    "urls": (urls.run, 3.0),
}
SEED = 20260115


@pytest.mark.parametrize("name", FUZZERS)
def test_no_input_makes_anything_but_a_clean_answer(name, caplog):
    """What comes from strangers is taken or refused, and never ends in a traceback."""
    run, seconds = FUZZERS[name]
    tally = run(seed=SEED, seconds=seconds)
    figure(f"fuzzed {name} not answered cleanly / tried", f"{len(tally.unclean)} / {tally.tried}")

    assert tally.unclean[:10] == []
    assert tally.tried > 100
    assert not caplog.records
