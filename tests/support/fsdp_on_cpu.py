"""`fsdp_on_cpu.py RECIPE ARGUMENTS`: a recipe under FSDP on CPU processes, where Accelerate itself takes DDP."""

import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
