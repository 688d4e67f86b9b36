"""Counts what a training step would do on a GPU, without a GPU: `python -m benchmarks.pretended_cuda --help`.

Tensors on the device "cuda:0" have a shape, a type, strides and a device, but no values (torch's FakeTensorMode). Every
operation on them is counted: kernels, FLOPs, bytes moved, memory, copies between host and device, and waits of the host.
Counts are exact and equal in every run, so that two commits can be compared. Times are a roofline estimate.

It cannot see: values, the choice of cuDNN's and cuBLAS' kernels, streams that overlap, NCCL. Backward operators that launch
several kernels count with estimated factors (`counters.KERNELS`), 15 % either way.

Modules: `device` makes a CPU build of torch accept the device, before torch is imported; `mode` is the context;
`counters` holds the counts; `ranks` pretends a process group; `networks`, `stages`, `zero` and `deepspeed_cuda` are measured.
"""
