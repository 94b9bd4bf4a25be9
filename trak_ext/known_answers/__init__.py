"""Small problems whose answers are known, for kernels that have to show that they compute.

Gradients and features are integers (times a power of two per row), so Rademacher projections and
scores are exact whatever the order of their sums, and must agree with the CPU's to the bit. Normal
projections get a bound of rounding errors, below what two exchanged entries of the matrix change.
Values need one, two or three bf16 parts as the precision has them. Workspaces are full of NaN, and
results have a border that must stay as it was.

Every problem is a case (`cases.py`): it reserves places in two buffers, what goes in and what comes
out, launches, and judges what came back. The cases of a self-test share the buffers: one copy back.

The quick form (`quick.py`), by count of work, for wgmma with its 21 kernels: 23 calls with 65
tensors, about 160 launches whose blocks go through 16 stages of 128 parameters at most, 20 us for
Rademacher and 60 us for normal, 3 ms together; 110 launches to fill the buffers, 1 ms; the code of
21 kernels loaded, 4 ms; 1.3 MB back, 1 ms; and on one CPU core 8 ms, of which 3 ms are the answers,
once a process. That is 17 ms. Scores: 20 calls, 3 ms on the device and 14 ms on the core.
"""
