"""Writes a small store and the scores that it gives into a folder, by the installed trak_ext.

    PYTHONPATH=tests/helpers python -P tests/vectors/make_store.py tests/vectors/store_0_1_0

store_0_1_0 is what the commit of version 0.1.0 wrote; it is never written again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import old_store


def main(folder: Path) -> None:
    store = folder / "store"
    old_store.attributor(store).fit(old_store.train())
    scores = {}
    for name, options in old_store.ESTIMATORS.items():
        attributor = old_store.attributor(store, **options)
        scores[name] = {
            "attribute": attributor.attribute(old_store.targets()).tolist(),
            "top_k": attributor.attribute(old_store.targets(), top_k=4).indices.tolist(),
            "self_influence": attributor.self_influence().tolist(),
            "fingerprint": attributor.fingerprint,
        }
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
