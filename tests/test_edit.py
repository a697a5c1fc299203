"""What extras/edit.py promises: kept codes stay, and what is drawn in a hole fits what stands around it."""
import conftest  # noqa: F401  (the project's root on the path)
import numpy as np
import pytest

import data


def test_a_code_is_kept_where_all_its_pixels_are():
    mask = np.ones((16, 24), bool)
    mask[5, 7] = False
    kept = data.kept_cells(mask, 4)
    assert kept.shape == (4, 4) and not kept[1, 1] and kept.sum() == 15
    with pytest.raises(ValueError, match="does not split into 5 x 5 cells"):
        data.kept_cells(mask, 5)
