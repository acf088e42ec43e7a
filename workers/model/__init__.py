"""The models: each a page that reads like its paper, made of `kernels` operations."""
