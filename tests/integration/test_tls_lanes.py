"""What the tcp lane promises, and its failures: the same tests once more, inside TLS."""

import pytest
import test_lane_cuts
import test_lane_deaths
import test_lane_gate
import test_lane_wire
import test_lanes
from test_lane_deaths import spawn  # noqa: F401 (a fixture of theirs)

from ps.authority import new_identities

pytestmark = pytest.mark.long

IDENTITIES = new_identities()

OF_OTHER_LANES = (
    "test_a_connection_without_a_ticket_is_closed_soon",  # sooner than hands are shaken
    "test_a_grpc_",
    "test_a_lane_that_breaks_again_and_again",
    "test_a_pin_goes_only_after",
    "test_a_reader_killed_while_it_holds_a_pin",
    "test_a_reader_that_is_too_late",
    "test_error_feedback_is_applied_once",  # cuts where frames of the plain lane are
    "test_everything_killed_at_once",
    "test_stopping_ends_connections",
)

globals().update(
    {
        name: test
        for module in (test_lanes, test_lane_cuts, test_lane_deaths, test_lane_gate, test_lane_wire)
        for name, test in vars(module).items()
        if name.startswith("test_") and not name.startswith(OF_OTHER_LANES)
    }
)


@pytest.fixture
def lane():
    return "tcp"


@pytest.fixture
def tls():
    return IDENTITIES
