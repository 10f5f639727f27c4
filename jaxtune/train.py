"""`python -m jaxtune.train --config FILE [section.key=value ...]`: the same as `jaxtune train`."""

import sys
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    """Importing this file puts it where the function `jaxtune.train` was; so it can be called like it."""

    def __call__(self, config: Any) -> list[dict]:
        from jaxtune import api

        return api.train(config)


sys.modules[__name__].__class__ = _Train

if __name__ == "__main__":
    from jaxtune.__main__ import main

    main(["train", *sys.argv[1:]])
