"""Lets torchvision's wheel for CUDA be imported beside a torch for CPUs.

Its Python registers shapes for two operators that its library, which does not load here, would define. They
are declared when that module is imported. Python runs this file at its start, in the engine's processes too.
"""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            import torch

            sys.meta_path.remove(self)
            library = torch.library.Library("torchvision", "FRAGMENT")
            _declared.append(library)  # undone where it is collected
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


_declared: list = []
sys.meta_path.insert(0, _Declare())
