"""Imported by every Python process that has this folder in PYTHONPATH: poisons the training in Ray's workers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODULE = "arvideo_dist.train.loop"  # only once a process trains, since torch takes seconds to import


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            from tests.train.poison import poisoned

            places = json.loads(os.environ["TEST_POISONED_PLACES"])
            poison = poisoned({int(place): kind for place, kind in places.items()})
            poison.__enter__()
            module.__dict__["_poison"] = poison  # collected, it would end

        spec.loader.exec_module = exec_module
        assert isinstance(spec.loader, Loader)
        return spec


sys.meta_path.insert(0, _Finder())
