"""Errors: which of them every rank raises, and that the mark belongs to one error alone."""

from __future__ import annotations

import pickle

import pytest

from ldmscale.errors import CheckpointError, ConfigError, DataError, LdmscaleError, StoppedEarlyError
from ldmscale.storage.object_store import AbsentError


def test_which_errors_every_rank_raises_unless_it_is_given() -> None:
    of_all = {kind.__name__: kind("fault").shared for kind in (ConfigError, StoppedEarlyError)}
    of_one = {kind.__name__: kind("fault").shared for kind in (LdmscaleError, DataError, CheckpointError)}
    assert of_all == {"ConfigError": True, "StoppedEarlyError": True}
    assert of_one == {"LdmscaleError": False, "DataError": False, "CheckpointError": False}
    assert DataError("fault", shared=True).shared
    assert not ConfigError("fault", shared=False).shared


@pytest.mark.parametrize("kind", [LdmscaleError, DataError, CheckpointError, AbsentError])
def test_an_error_for_all_ranks_is_a_copy_that_survives_its_way_to_them(kind: type[LdmscaleError]) -> None:
    try:
        try:
            raise OSError("disk")
        except OSError as cause:
            raise kind("one\ntwo") from cause
    except LdmscaleError as error:
        own = error
    for_all = own.for_all_ranks()
    assert type(for_all) is kind and for_all.shared and not own.shared and not kind("another").shared
    assert for_all.__cause__ is own.__cause__ and for_all.__traceback__ is own.__traceback__
    received = pickle.loads(pickle.dumps(for_all))
    assert type(received) is kind and received.shared and str(received) == "one\ntwo"
    assert getattr(received, "faults", None) == getattr(own, "faults", None)
