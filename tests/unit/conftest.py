"""Fixtures of several files."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Workers of a simulated run set this for their process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
