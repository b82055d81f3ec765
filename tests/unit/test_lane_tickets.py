"""Tickets: each is good once, and soon."""

from hypothesis import given
from hypothesis import strategies as st

from ps.lanes import tickets as module
from ps.lanes.tickets import TICKET_NUM_BYTES, TICKET_VALID_S, Tickets


@given(st.lists(st.tuples(st.sampled_from(["issue", "redeem", "wait"]), st.integers(0, 9))))
def test_a_ticket_is_good_once_and_before_it_expires(steps):
    now_s = [0.0]
    tickets = Tickets(lambda: now_s[0])
    issued: list[tuple[bytes, float]] = []
    used = set()
    for step, number in steps:
        if step == "issue":
            issued.append((tickets.issue(), now_s[0]))
        elif step == "wait":
            now_s[0] += number
        elif issued:
            ticket, issued_s = issued[number % len(issued)]
            good = ticket not in used and now_s[0] - issued_s < TICKET_VALID_S
            assert tickets.redeem(ticket) == good
            used.add(ticket)


@given(st.binary(max_size=40))
def test_a_guess_is_never_good(guess):
    tickets = Tickets()
    ticket = tickets.issue()
    assert not tickets.redeem(guess)
    assert not tickets.redeem(ticket[:-1])
    assert not tickets.redeem(ticket + b"\0")
    assert tickets.redeem(ticket)


def test_tickets_differ_and_are_long():
    tickets = Tickets()
    issued = [tickets.issue() for _ in range(100)]
    assert len(set(issued)) == 100
    assert {len(ticket) for ticket in issued} == {TICKET_NUM_BYTES}


def test_there_is_an_end_to_outstanding_tickets(monkeypatch):
    monkeypatch.setattr(module, "MAX_OUTSTANDING", 3)
    tickets = Tickets(lambda: 0.0)
    issued = [tickets.issue() for _ in range(5)]
    assert [tickets.redeem(ticket) for ticket in issued] == [False, False, True, True, True]
