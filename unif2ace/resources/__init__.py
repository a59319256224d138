"""What every GPU kernel costs a chip that need not be here: registers, shared memory, spills, instructions used.

Triton and nvcc compile for any chip without one. This package compiles each shipped launch configuration for A100
(sm_80) and Hopper (sm_90a), and reads the machine code:

    calls.py     the calls whose launches stand for all configurations, as meta tensors: shapes without memory
    triton.py    makes these calls with Triton's launch replaced by "compile for that chip and remember"
    cuda.py      compiles csrc/cuda/*.cu with nvcc
    cubin.py     reads registers, spills, shared memory and instructions out of the machine code
    kernel.py    one row of the table, and the limits it has to keep
    report.py    all rows; the table as text

The launchers themselves choose the configurations, so nothing is listed twice. Meta tensors have no values: a launcher
that waits for the device or looks into a tensor fails here.

`unif2ace doctor --kernels` prints the table.
"""

from unif2ace.resources.kernel import Kernel
from unif2ace.resources.report import format_kernels, kernels

__all__ = ["Kernel", "format_kernels", "kernels"]
