"""`asynception scale`: another number of workers, or of servers, for a run that goes on."""

import secrets
import time
from pathlib import Path

from asynception.monitoring.status_file import STATUS_FILE, read_status
from asynception.orders import Order, read_answer, withdraw_request, write_request
from asynception.run_files import CONFIG_FILE, is_detached
from model.errors import InputError

ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.1


def scale(run: str, address: str | None, order: Order) -> str:
    """Give a run, its folder or a detached one's name, an order; what becomes of it.

    Raises InputError if it is refused, or if the run doesn't go on.
    """
    folder = Path(run)
    if (folder / CONFIG_FILE).is_file() and not is_detached(folder):
        return _scale_in(folder, order)
    return _scale_detached(run, address, order)


def _scale_detached(run: str, address: str | None, order: Order) -> str:
    """By a call to its driver. What is needed for that takes seconds to import."""
    from asynception.attached import ask, named
    from asynception.cluster import connected
    from asynception.detached import find

    name, config = named(run, address)
    with connected(config):
        driver = find(name)
        if driver is None:
            raise InputError(f"{name} doesn't go on at ray.address = {config.address}")
        return str(ask(driver.scale, order))


def _scale_in(folder: Path, order: Order) -> str:
    """By files in the run's folder."""
    _check_goes_on(folder, order)
    request_id, end_s = secrets.token_hex(8), time.monotonic() + ANSWER_TIMEOUT_S
    try:
        write_request(folder, request_id, order)
    except OSError as error:
        raise InputError(f"{folder} can't be written, where the run is asked: {error}") from None
    while time.monotonic() < end_s:
        answer = read_answer(folder, request_id)
        if answer is not None:
            return answer
        time.sleep(POLL_S)
        _check_goes_on(folder, order)
    withdraw_request(folder)
    raise InputError(
        f"the driver of {folder} hasn't answered in {ANSWER_TIMEOUT_S:g} s: is it dead? "
        f"`asynception status {folder}` says when it was last heard of"
    )


def _check_goes_on(folder: Path, order: Order) -> None:
    if (folder / STATUS_FILE).is_file():
        status = read_status(folder)["status"]
        if status != "running":
            withdraw_request(folder)
            raise InputError(
                f"{folder} is {status}, so it has no workers and no servers: go on with "
                f"`asynception train {folder} --resume {order.setting}`"
            )
