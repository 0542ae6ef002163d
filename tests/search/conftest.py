"""All tests of the search share one fresh cache, so that each small network is trained once per session."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """The folder of trained weights and calibrations; the user's own cache is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SECATEUR_CACHE", str(folder))
        yield folder
