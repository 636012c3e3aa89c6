"""The training loop's Triton kernels. Importing a file of this folder needs the package triton."""
