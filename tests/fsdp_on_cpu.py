"""Runs train_dopsd_full.py with FSDP2 on the CPU, for a test.

accelerate shards on accelerators alone; here it takes the CPU for one, with gloo as its backend.
"""

import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


ROOT = Path(__file__).resolve().parents[1]


def main():
    sys.path.insert(0, str(ROOT))
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda *args, **kwargs: barrier()  # gloo knows no device_ids
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    torch.compiler.set_stance("force_eager")  # torchao compiles its optimiser
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
