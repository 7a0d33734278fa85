"""Metadata that the user adds fills gaps and never overrules what a source says."""

from pathlib import Path

import pytest

from ray_pipeline.data.sources.collection import Collection, SourceImage, add_metadata
from ray_pipeline.errors import UserError


def test_added_metadata_fills_gaps_and_stays_shared():
    dapi, plain = {"marker": "DAPI", "NA": 1.4}, {}
    images = [SourceImage("a", "cells", metadata=dapi), SourceImage("b", "cells", metadata=dapi)]
    images += [SourceImage("c", "cells", metadata=plain)]
    before = Collection(Path("."), images, rejected=[("x", "bad")], notes=["n"], ignored=3)
    words = ["marker=actin=F", "lambda=488", "um_pixel=6.5e-2"]
    after = add_metadata(before, words)
    added = {"lambda": 488.0, "um_pixel": 0.065}
    assert [image.metadata for image in after.images] == [dapi | added, dapi | added, added | {"marker": "actin=F"}]
    assert after.images[0].metadata is after.images[1].metadata
    assert dapi == {"marker": "DAPI", "NA": 1.4}
    assert (after.root, after.rejected, after.notes, after.ignored) == (Path("."), [("x", "bad")], ["n"], 3)
    assert add_metadata(before, []) == before


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("stain=DAPI", r"--meta 'stain=DAPI': expected KEY=VALUE with a key of modality, "),
        ("marker", "expected KEY=VALUE"),
        ("marker=", "expected KEY=VALUE"),
        ("=DAPI", "expected KEY=VALUE"),
        ("NA=high", r"--meta 'NA=high': expected a positive number"),
        ("um_pixel=0", "expected a positive number"),
        ("lambda=-488", "expected a positive number"),
        ("NA=inf", "expected a positive number"),
        ("NA=nan", "expected a positive number"),
    ],
)
def test_words_that_say_nothing_are_refused(word, found):
    with pytest.raises(UserError, match=found):
        add_metadata(Collection(Path("."), [SourceImage("a", "cells")]), [word])
