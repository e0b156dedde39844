"""An interpreter of PTX, the assembly language of NVIDIA's GPUs: GPU kernels run on a CPU.

A kernel's numbers, and mistakes in its synchronisation, are properties of its PTX, which JAX's
plugin for CUDA makes for a device that need not be there. Here that text is executed:

| module            | what                                                                    |
|-------------------|-------------------------------------------------------------------------|
| `program`         | text -> instructions                                                    |
| `memory`          | buffers with bounds and alignment, barriers, boxes of arrays            |
| `machine`         | a block: warps of 32 lanes that take turns in a random order            |
| `operands`        | what an instruction reads                                               |
| `instructions`    | what it does: loads and stores, waits, and what the next four do        |
| `arithmetic`      | registers -> register                                                   |
| `copies`          | copies that run by themselves                                           |
| `products`        | products of matrices that run by themselves, or in a warp               |
| `tensor_cores`    | where their factors lie, in registers and in shared memory              |
| `launch`, `host`  | runs Pallas kernels this way: compiles, does what the host does, starts |

What is checked on the way: addresses are aligned and inside one buffer; memory that nobody wrote is
NaN; plain writes to shared memory are fenced before a copy or a product of a warpgroup reads them;
registers that such a product reads or writes are left alone until it is awaited; a lane executes
no branch that another lane of its warp does not; no block waits for ever. Copies and products that
run by themselves are done as early as they can be or as late as they may, and warps interleave
differently for each seed, so that a missing wait or a slot reused too early gives wrong numbers.

What it cannot see: time, registers spilled, memory that is weakly ordered beyond these fences, and
what `ptxas` makes of the text.
"""
