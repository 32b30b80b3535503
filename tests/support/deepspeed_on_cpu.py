"""`deepspeed_on_cpu.py RECIPE ARGUMENTS`: a recipe under DeepSpeed on CPU processes.

The environment of the launcher needs DS_ACCELERATOR=cpu, and no ACCELERATE_USE_CPU.
"""

import runpy
import sys

from accelerate.state import PartialState

PartialState(backend="gloo")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
