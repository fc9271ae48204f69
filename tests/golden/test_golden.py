"""Every recorded case of the released code, one test each. A case without a check is reported as not covered."""

import harness
import pytest

harness.load_checks()


@pytest.mark.golden
@pytest.mark.parametrize("path", harness.files(), ids=lambda path: path.stem)
def test_recorded_case(path):
    run = harness.check_for(path.stem)
    if run is None:
        pytest.skip("not covered: no check has this prefix yet")
    run(harness.Case(path))


def test_the_folder_has_cases():
    assert harness.files(), f"no .safetensors in {harness.FOLDER}; $PATCHLIGHT_GOLDEN points to the wrong folder"
