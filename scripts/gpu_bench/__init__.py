"""What is measured on a GPU: kernels, decode, prefill, blending, and copies that show."""
