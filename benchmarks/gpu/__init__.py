"""Correctness and speed on an NVIDIA GPU, in one command of a few minutes: `python -m benchmarks.gpu`.

Compiling takes most of the time and little of the GPU. So every model that is timed is compiled in a process of its own,
many at once. When all variants of a row are ready, the other processes are stopped while these take turns, and then go on.

`plan` says what is measured, in order of worth. `pool` starts the processes and keeps their limits. `member` is such a process;
`correctness`, `speed` and `training` say what it does. `device` holds all that differs between a GPU and the CPU of a dry run.
"""
