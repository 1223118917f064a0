"""The exchange's kernels, and the arithmetic of the memory they share.

`plan` and `status` are plain Python and need neither torch nor a device; `exchange_kernels` is Triton source; `lane`
launches it. Triton is imported by the last two alone.
"""
