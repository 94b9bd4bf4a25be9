"""Small problems whose answers are known, for kernels that have to show that they compute.

Gradients and features are integers (times a power of two per row), so Rademacher projections and
scores are exact whatever the order of their sums, and must agree with the CPU's to the bit. Normal
projections get a bound of rounding errors, below what two exchanged entries of the matrix change.
Values need one, two or three bf16 parts as the precision has them. Workspaces are full of NaN, and
results have a border that must stay as it was.

Every problem is a case (`cases.py`): it reserves places in two buffers, what goes in and what comes
out, launches, and judges what came back. The cases of a self-test share the buffers: one copy back.

The quick form (`quick.py`), by count of work, for wgmma with its 21 tiles: 23 calls with 65 tensors
are 203 launches. 67 split gradients and 68 add partial sums, 5 us each; 68 multiply, whose blocks
go through 16 stages of 128 parameters at most, 20 us for Rademacher and 60 us for normal: 3.5 ms
together. 140 launches fill the buffers and workspaces, 1 ms; the code of 28 kernels is loaded, 5
ms; 1.3 MB come back, 1 ms; and a CPU core takes 6 ms, of which 1.5 ms are the answers, once a
process. That is 17 ms. Scores: 20 calls with 75 launches, 3 ms on the device and 16 ms on the core.
The sparse kind with its 20 kernels: 13 calls with 39 launches of 325 blocks at most, 80 that fill,
1 ms; 4 ms of loading; 0.4 MB back; and 4 ms on the core: 9 ms.
"""
