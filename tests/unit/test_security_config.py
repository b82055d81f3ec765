"""What a recipe may ask of TLS."""

import re

import pytest

from asynception.recipe import validate
from model.errors import InputError
from ps.tls import identities

FILES = {"authority_file": "/a", "certificate_file": "/c", "key_file": "/k"}


def config_of(**sections):
    data, training = {"train": "/a", "val": "/b"}, {"epochs": 1}
    return validate({"data": data, "training": training, **sections})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"security": {"tls": "auto"}, "consistency": {"mode": "allreduce"}}, '"allreduce"'),
        ({"security": {"tls": "files"}}, "security.authority_file"),
        ({"security": {"tls": "auto", "key_file": "/k"}}, "security.key_file = '/k'"),
        ({"security": {"key_file": "/k"}}, "security.key_file = '/k'"),
    ],
)
def test_what_would_not_be_encrypted_or_have_no_effect_is_refused(sections, said):
    with pytest.raises(InputError, match=re.escape(said)):
        config_of(**sections)


@pytest.mark.parametrize("choice", ["auto", "shm", "tcp", "grpc"])
def test_every_lane_goes_with_tls(choice):
    config = config_of(security={"tls": "auto"}, lanes={"choice": choice})
    assert config.lanes.choice == choice


def test_without_tls_nobody_has_an_identity():
    assert identities(config_of().security) is None
    assert identities(config_of(lanes={"choice": "tcp"}).security) is None


def test_files_are_read_when_a_run_starts_and_not_before():
    settings = config_of(security={"tls": "files", **FILES}).security
    with pytest.raises(InputError, match=r"security\.authority_file = '/a'"):
        identities(settings)
